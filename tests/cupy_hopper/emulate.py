"""A Hopper .cu file as ordinary C++: its blocks run on the host, every thread a fiber (see hopper_on_host.h).

Checks what a compiler cannot: barrier phases, swizzles, descriptors, fragments, the order of tiles, and the
host code that launches. A deadlock is found and reported, not suffered.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source
from tests.cupy_backend.emulate import built

HEADER = Path(__file__).parent / "hopper_on_host.h"
BULK_HEADERS = (HEADER.with_name("colsum_on_host.h"), HEADER.with_name("bulk_on_host.h"))
MAP_ALIGNMENT = 64
FLAGS = ("-O1", "-march=native", "-U_FORTIFY_SOURCE")
"""What -O2 makes takes half as long again and is no faster; a fortified longjmp would keep to one stack."""

SHARED = re.compile(r"extern __shared__ unsigned char (\w+)\[\];")


class Emulator:
    """Stands in for `module.load`, and for `module.prepared` by way of `launch`.

    Kernels take pointers, `long long`s and tensor maps.

    `blocks` is how many run at once, whatever the launch asks for; `seed` sets the order in which they do.
    """

    more_headers: tuple[Path, ...] = ()

    def __init__(self, folder: Path, blocks: int, seed: int = 0) -> None:
        self.folder, self.blocks, self.seed = folder, blocks, seed

    def load(
        self, source: Source, name: str, device: torch.device, shared_bytes: int = 0
    ) -> Callable[..., None]:
        return getattr(self._library(source, name), f"run_{name}")

    def launch(
        self,
        kernel: Any,
        device: torch.device,
        blocks: int,
        threads: int,
        *arguments: Any,
        shared_bytes: int = 0,
    ) -> None:
        maps = [_aligned(each) for each in arguments if isinstance(each, bytes)]
        places = iter(ctypes.addressof(each) for each in maps)
        values = [next(places) if isinstance(each, bytes) else _word(each) for each in arguments]
        numbers = (ctypes.c_longlong * len(values))(*values)
        stuck = kernel(numbers, self.blocks, threads, shared_bytes, ctypes.c_ulonglong(self.seed + 1))
        assert not stuck, f"deadlock with {self.blocks} blocks, seed {self.seed}"

    def prepared(
        self,
        kernel: Any,
        device: torch.device,
        blocks: int,
        threads: int,
        *constants: Any,
        shared_bytes: int = 0,
    ) -> Callable[..., None]:
        """Stands in for `module.prepared`."""

        def launch_with(*changing: int | bytes) -> None:
            self.launch(kernel, device, blocks, threads, *changing, *constants, shared_bytes=shared_bytes)

        return launch_with

    def _library(self, source: Source, name: str) -> ctypes.CDLL:
        return built(self._code(source, name), source, self.folder, *FLAGS)

    def _code(self, source: Source, name: str) -> str:
        """The source with the host's header for Hopper's, and a function that runs the kernel `name`."""
        text = (source.folder / source.file).read_text(encoding="utf-8")
        headers = (HEADER, *self.more_headers)
        text = text.replace('#include "hopper.cuh"', "".join(each.read_text("utf-8") for each in headers))
        text = SHARED.sub(r"unsigned char* \1 = here().memory.data();", text)
        parameters = re.search(rf"__global__[^{{]*?\b{name}\((.*?)\)\s*{{", text, re.DOTALL)
        assert parameters is not None
        types = [re.sub(r"\w+$", "", each.strip()) for each in parameters[1].split(",")]
        passed = ", ".join(_parameter(kind.strip(), i) for i, kind in enumerate(types))
        return f"""{text}
            static const long long* numbers;
            extern "C" int run_{name}(
                const long long* given, int count, int threads, int bytes, unsigned long long seed) {{
                numbers = given;
                return run_blocks([] {{ {name}({passed}); }}, count, threads, bytes, seed);
            }}
        """


class BulkEmulator(Emulator):
    """For kernels with tensor maps and bulk copies."""

    more_headers = BULK_HEADERS


def host_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box_rows: int
) -> bytes:
    """What the driver's encoder is asked for, as colsum_on_host.h reads it."""
    assert all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides) and address % 16 == 0
    assert all(0 < size < 2**32 for size in sizes) and 0 < box_rows <= 256
    return struct.pack("<Q4Q3QI60x", address, *sizes, *strides, box_rows)


def _aligned(data: bytes) -> ctypes.Array[ctypes.c_char]:
    """A copy at a multiple of a tensor map's alignment."""
    room = (ctypes.c_char * (len(data) + MAP_ALIGNMENT))()
    skip = -ctypes.addressof(room) % MAP_ALIGNMENT
    copy = (ctypes.c_char * len(data)).from_buffer(room, skip)
    ctypes.memmove(copy, data, len(data))
    return copy


def _parameter(kind: str, i: int) -> str:
    """Parameter `i` of a kernel, from the 64 bits that stand for it."""
    if kind == "double":
        return f"*(double*)(numbers + {i})"
    if kind.endswith("TensorMap"):
        return f"*(const TensorMap*)numbers[{i}]"
    return f"({kind})numbers[{i}]"


def _word(argument: Any) -> int:
    """A kernel argument as 64 bits."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return struct.unpack("q", struct.pack("d", argument))[0]
    return int(argument or 0)
