"""A .cu file as ordinary C++: its kernels run on the host, one thread after another.

Good for kernels whose threads do not talk to each other: it checks their indexing, and the host code that
launches them, on a machine without a GPU. Inline PTX does nothing here, so float16 arithmetic is out.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source

COMPILER = shutil.which("g++") or shutil.which("clang++")

BEFORE = """
#include <algorithm>
#include <cstring>
using std::min;
using std::max;
struct Index { unsigned x; } blockIdx, threadIdx;
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads)
#define asm(...)
"""

AFTER = """
typedef long long number;
typedef void (*Kernel)(
    number, number, number, number, number, number, number, number, number, number, number);
extern "C" void run_all(Kernel kernel, number blocks, number threads, const number* a) {
    for (number block = 0; block < blocks; ++block)
        for (number thread = 0; thread < threads; ++thread) {
            blockIdx.x = block;
            threadIdx.x = thread;
            kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
        }
}
"""


class Emulator:
    """Stands in for `module.load` and `module.launch`. Kernels take eleven pointers or `long long`s."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: list[Source] = []
        self.libraries: dict[Source, ctypes.CDLL] = {}

    def load(self, source: Source, name: str, device: torch.device) -> Callable[..., None]:
        library = self.libraries.get(source) or self._compile(source)
        kernel = getattr(library, name)

        def run(blocks: int, threads: int, arguments: tuple[int, ...]) -> None:
            assert len(arguments) == 11
            library.run_all(
                kernel, ctypes.c_longlong(blocks), ctypes.c_longlong(threads),
                (ctypes.c_longlong * 11)(*arguments),
            )  # fmt: skip

        return run

    def launch(self, kernel: Any, device: torch.device, blocks: int, threads: int, *arguments: Any) -> None:
        pointers = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
        kernel(blocks, threads, tuple(pointers))

    def _compile(self, source: Source) -> ctypes.CDLL:
        code = BEFORE + source.code() + AFTER
        self.libraries[source] = built(code, source, self.folder, "-O1")
        return self.libraries[source]


def built(code: str, source: Source, folder: Path, *flags: str) -> ctypes.CDLL:
    """`code` with the macros of `source`, compiled once for all processes that share the folder."""
    assert COMPILER is not None
    macros = (f"-D{name}={value}" for name, value in source.defines)
    options = ["-std=c++17", "-w", "-shared", "-fPIC", *flags, *macros]
    library = folder / f"{hashlib.sha256(repr((code, options)).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        own = Path(tempfile.mkdtemp(dir=folder))
        (own / "kernels.cpp").write_text(code)
        subprocess.run([COMPILER, *options, "-o", own / "kernels.so", own / "kernels.cpp"], check=True)
        (own / "kernels.so").replace(library)
    return ctypes.CDLL(str(library))
