"""Compile a .cu file for a device with NVRTC.

A `Source` names a .cu file beside this one and its compile-time parameters, which reach the code as macros,
so that every tile size is a constant there. `load` compiles it for the device's own architecture and keeps
the kernel for the process; `launch` and `prepared`, from `launching.py`, run it. RawModule by itself compiles
for plain architectures only, and the fastest instructions of sm_90 and later (wgmma, tcgen05) exist under the
name with an "a" alone: so NVRTC is called here, the binary kept in CuPy's cache folder, and RawModule loads
it from there.

The sources include no header but their neighbours, whose text is put in their place: a CuPy that came from
pip finds NVRTC, but often no CUDA toolkit.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from chipmunk_kernels.backends.cupy.launching import Kernel
from chipmunk_kernels.backends.cupy.launching import launch as launch
from chipmunk_kernels.backends.cupy.launching import prepared as prepared
from chipmunk_kernels.registry import BuildError

FOLDER = Path(__file__).parent
SHARED_BYTES_WITHOUT_ASKING = 48 * 1024
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A .cu file with its compile-time parameters: what one binary is made of.

    Attributes:
        file: name of the file.
        defines: macro names and values.
        folder: where the file and those that it includes are.
    """

    file: str
    defines: tuple[tuple[str, int], ...] = ()
    folder: Path = FOLDER

    def code(self) -> str:
        """The file, with each `#include "NAME"` replaced by that neighbour's text."""
        text = (self.folder / self.file).read_text(encoding="utf-8")
        return _INCLUDE.sub(lambda line: (self.folder / line[1]).read_text(encoding="utf-8"), text)

    def options(self, architecture: str) -> tuple[str, ...]:
        """NVRTC options for an architecture such as "sm_90a", or "compute_90" for portable PTX."""
        return (
            "--std=c++17",
            f"--gpu-architecture={architecture}",
            *(f"-D{name}={value}" for name, value in self.defines),
        )


def architecture(capability: tuple[int, int], supported: tuple[int, ...]) -> str:
    """What to compile for: the device's own architecture with all it has, else PTX of the newest older one.

    Args:
        capability: of the device, e.g. `(9, 0)`.
        supported: what this NVRTC knows, e.g. `(80, 90, 100)`.

    Raises:
        BuildError: NVRTC knows nothing that old.
    """
    own = capability[0] * 10 + capability[1]
    if own in supported:
        return f"sm_{own}a" if own >= 90 else f"sm_{own}"
    older = [known for known in supported if known < own]
    if not older:
        raise BuildError(
            f"NVRTC compiles for capabilities {', '.join(map(str, supported))}, the device has {own}; "
            "install a CuPy for an older CUDA, or use backend='triton'"
        )
    return f"compute_{max(older)}"


@functools.cache
def load(source: Source, name: str, device: torch.device, shared_bytes: int = 0) -> Kernel:
    """The kernel `name` (declared extern "C") of a source, compiled for `device`.

    Args:
        source: what to compile. Only the first call for each compiles, and only if no earlier process did.
        name: of the kernel.
        device: CUDA device, with its index.
        shared_bytes: the most dynamic shared memory that launches will ask for.

    Raises:
        BuildError: there is no NVRTC, or the source does not compile; the message is theirs.
    """
    import cupy

    with torch.cuda.device(device):
        try:
            supported = tuple(cupy.cuda.nvrtc.getSupportedArchs())
        except (ImportError, OSError, RuntimeError) as error:
            raise BuildError(
                f"CuPy cannot load NVRTC, which compiles its kernels ({error}); install it, for example with "
                "`pip install nvidia-cuda-nvrtc-cu12`, or use backend='triton'"
            ) from error
        binary = _binary(source, architecture(torch.cuda.get_device_capability(device), supported))
        kernel = cupy.RawModule(path=str(binary)).get_function(name)
        if shared_bytes > SHARED_BYTES_WITHOUT_ASKING:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        return Kernel(kernel)


def _binary(source: Source, target: str) -> Path:
    """The compiled file: from the cache, or compiled into it. Other processes may do the same meanwhile."""
    import cupy

    code, options = source.code(), source.options(target)
    identity = repr((code, options, cupy.cuda.nvrtc.getVersion()))
    path = _cache_folder() / f"chipmunk-{hashlib.sha256(identity.encode()).hexdigest()}.bin"
    if not path.is_file():
        binary = compile_binary(code, source.file, options)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)
    return path


def compile_binary(code: str, file: str, options: tuple[str, ...]) -> bytes:
    """A cubin, or PTX where the options name a portable architecture.

    Raises:
        BuildError: with the compiler's messages.
    """
    import cupy

    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(code, file, (), ())
    try:
        nvrtc.compileProgram(program, options)
        portable = any(option.startswith("--gpu-architecture=compute_") for option in options)
        return nvrtc.getPTX(program) if portable else nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise BuildError(f"{file} does not compile with {' '.join(options)}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def _cache_folder() -> Path:
    """CuPy's kernel cache, or a folder of this process's own where that one cannot be written."""
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="chipmunk-kernels-"))
    return folder
