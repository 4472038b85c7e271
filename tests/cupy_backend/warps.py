"""A .cu file whose threads work together, run on the host: warps, barriers and asynchronous copies.

`warps.cpp` stands in for mma.cuh. It also complains of what a GPU would pass over or hang in: a copy from
outside every tensor, a shared address out of bounds, a barrier that not all threads reach; and it counts the
bank conflicts of ldmatrix.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source
from tests.cupy_backend.emulate import built

_RUNTIME = Path(__file__).with_name("warps.cpp")
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(.*?\) (\w+)\(')


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_longlong) for name in ("blocks", "threads", "shared_bytes")),
        *((name, ctypes.c_longlong) for name in ("eager", "backwards", "tensors")),
        ("ranges", ctypes.POINTER(ctypes.c_longlong)),
        ("trouble", ctypes.c_char_p),
        ("conflicts", ctypes.c_longlong),
        ("streamed", ctypes.c_longlong),
    )


class Warps:
    """Stands in for `module.load` and `module.launch`.

    Attributes:
        eager: asynchronous copies land at once rather than as late as they may.
        backwards: the last warp runs first.
        conflicts: of 8×8 matrices loaded so far, how many met a bank conflict.
        streamed_bytes: read so far by loads that are marked as streaming.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[Source, ctypes.CDLL] = {}
        self.seen: dict[int, Tensor] = {}
        self.eager = False
        self.backwards = False
        self.conflicts = 0
        self.streamed_bytes = 0

    def load(self, source: Source, name: str, device: torch.device, shared_bytes: int = 0) -> Any:
        library = self.libraries.get(source) or self._compile(source)
        return getattr(library, f"run_{name}")

    def launch(
        self,
        kernel: Callable[..., None],
        device: torch.device,
        blocks: int,
        threads: int,
        *arguments: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Raises AssertionError with what went wrong on the way."""
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        ends = [end for tensor in tensors for end in _storage(tensor)]
        words = [_bits(each) for each in arguments]
        trouble = ctypes.create_string_buffer(200)
        launch = _Launch(
            blocks, threads, shared_bytes, self.eager, self.backwards, len(tensors),
            (ctypes.c_longlong * len(ends))(*ends), ctypes.cast(trouble, ctypes.c_char_p), 0, 0,
        )  # fmt: skip
        kernel((ctypes.c_longlong * len(words))(*words), ctypes.byref(launch))
        assert not trouble.value, trouble.value.decode()
        self.conflicts += launch.conflicts
        self.streamed_bytes += launch.streamed

    def prepared(
        self,
        kernel: Callable[..., None],
        device: torch.device,
        blocks: int,
        threads: int,
        *constants: Any,
        shared_bytes: int = 0,
    ) -> Callable[..., None]:
        """Stands in for `module.prepared`, once `watch` has been called."""

        def launch_with(*changing: int) -> None:
            tensors = [self.seen.get(each, each) for each in changing]
            self.launch(kernel, device, blocks, threads, *tensors, *constants, shared_bytes=shared_bytes)

        return launch_with

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Know tensors by their addresses, which is all that prepared launches are given, from now on."""
        self.seen.clear()
        address_of = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            address = address_of(tensor)
            if address:
                self.seen[address] = tensor
            return address

        patch.setattr(Tensor, "data_ptr", data_ptr)

    def text(self, source: Source) -> str:
        """The kernels of a source in C++ for the host."""
        main = (source.folder / source.file).read_text(encoding="utf-8")
        text = re.sub(
            r'^#include "([\w.]+)"$',
            lambda line: (_RUNTIME if line[1] == "mma.cuh" else source.folder / line[1]).read_text(),
            main,
            flags=re.MULTILINE,
        )
        for name in _KERNEL.findall(main):
            text += (
                f'\nextern "C" void run_{name}(const long long* arguments, host::Launch* launch) '
                f"{{ host::run({name}, arguments, launch); }}\n"
            )
        return text

    def _compile(self, source: Source) -> ctypes.CDLL:
        self.libraries[source] = built(self.text(source), source, self.folder, "-O1", "-U_FORTIFY_SOURCE")
        return self.libraries[source]


def _storage(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.untyped_storage().data_ptr()
    return begin, begin + tensor.untyped_storage().nbytes()


def _bits(argument: Any) -> int:
    """A kernel argument as 64 bits, by the rules of `module.launch`."""
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(struct.unpack("q", struct.pack("d", argument))[0])
    return int(argument)
