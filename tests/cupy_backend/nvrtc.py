"""NVRTC from its pip package, through ctypes, behind the few functions of `cupy.cuda.nvrtc` that we call.

With `installed_as_cupy` the package's own code compiles .cu files for any GPU on a machine that has neither a
GPU, nor CuPy, nor a CUDA toolkit. What a binary takes is read with the `cuobjdump` that Triton ships.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from chipmunk_kernels.backends.cupy.module import Source, compile_binary
from chipmunk_kernels.backends.triton.resources import cuobjdump


class NVRTCError(RuntimeError):
    """As cupy.cuda.nvrtc.NVRTCError."""


@functools.cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations if package else None
    found = sorted(path for root in roots or () for path in Path(root).glob("*/lib/libnvrtc.so.*"))
    if not found:
        raise FileNotFoundError("NVRTC is missing; run `pip install 'nvidia-cuda-nvrtc-cu12==12.9.*'`")
    library = ctypes.CDLL(str(found[0]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _check(status: int) -> None:
    if status:
        raise NVRTCError(_library().nvrtcGetErrorString(status).decode())


def _bytes_of(what: str, program: int) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(ctypes.c_void_p(program), ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(ctypes.c_void_p(program), buffer))
    return buffer.raw


def getVersion() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def getSupportedArchs() -> tuple[int, ...]:
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(found))
    return tuple(found)


def createProgram(code: str, name: str, headers: Sequence[str], include_names: Sequence[str]) -> int:
    assert not headers and not include_names, "our sources include nothing"
    program = ctypes.c_void_p()
    _check(_library().nvrtcCreateProgram(ctypes.byref(program), code.encode(), name.encode(), 0, None, None))
    assert program.value is not None
    return program.value


def compileProgram(program: int, options: Sequence[str]) -> None:
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(_library().nvrtcCompileProgram(ctypes.c_void_p(program), len(options), encoded))


def getCUBIN(program: int) -> bytes:
    return _bytes_of("CUBIN", program)


def getPTX(program: int) -> bytes:
    return _bytes_of("PTX", program)


def getProgramLog(program: int) -> str:
    return _bytes_of("ProgramLog", program).rstrip(b"\0").decode()


def destroyProgram(program: int) -> None:
    _check(_library().nvrtcDestroyProgram(ctypes.byref(ctypes.c_void_p(program))))


@contextmanager
def installed_as_cupy() -> Iterator[None]:
    """This module stands in for `cupy.cuda.nvrtc` within."""
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.cuda, cuda.nvrtc = cuda, sys.modules[__name__]  # type: ignore[attr-defined]
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = cupy
    try:
        yield
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before


@dataclass(frozen=True)
class Usage:
    """What a thread, and a block, of one kernel takes. Without local arrays, a stack is for spills only."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


@functools.cache
def compile_for(source: Source, architecture: str) -> bytes:
    """The source, compiled by the package's own code, once for all tests that look at it."""
    with installed_as_cupy():
        return compile_binary(source.code(), source.file, source.options(architecture))


def usage(cubin: bytes, folder: Path) -> dict[str, Usage]:
    """Kernel name → what it takes."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [cuobjdump(), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: Usage(int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in found
    }
