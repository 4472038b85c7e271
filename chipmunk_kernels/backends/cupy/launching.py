"""Launching a compiled kernel from Python in a few microseconds.

CuPy boxes every argument of a launch anew, which for thirty of them takes longer than the launch itself. Here
each thread keeps one block of memory for a kernel's arguments, with the list of pointers into it that the
driver wants; a launch packs the arguments there in one call and goes straight to the driver, whose
cuLaunchKernel has copied them when it returns. CuPy's driver module takes plain integers for all of that.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_WORD = 8
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class Kernel:
    """A kernel, ready to launch on the device that was current when it was made.

    Args:
        raw: the CuPy RawKernel.
    """

    def __init__(self, raw: Any) -> None:
        from cupy.cuda import driver

        self.raw = raw  # keeps the module loaded
        self.function = int(raw.kernel.ptr)
        self.driver = driver.launchKernel
        self.own = threading.local()


class Arguments:
    """Memory for the arguments of a launch, laid out for the kinds of those given.

    Integers and pointers take 8 bytes, floats 8 as doubles, bytes what they have, rounded up.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        codes, offsets, size = ["="], [], 0
        for value in values:
            room = -(-len(value) // _WORD) * _WORD if isinstance(value, bytes) else _WORD
            codes.append("d" if isinstance(value, float) else f"{room}s" if isinstance(value, bytes) else "q")
            offsets.append(size)
            size += room
        self.memory = ctypes.create_string_buffer(max(size, _WORD))
        self.pack_into = struct.Struct("".join(codes)).pack_into
        start = ctypes.addressof(self.memory)
        self.pointers = (ctypes.c_void_p * max(len(offsets), 1))(*(start + offset for offset in offsets))
        self.address = ctypes.addressof(self.pointers)


def plain(argument: Any) -> Any:
    """An argument as an int, float or bytes: tensors and None are pointers, numpy values are bytes."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    if isinstance(argument, (int, float, bytes)):
        return argument
    return argument.tobytes()


def launch(
    kernel: Kernel, device: torch.device, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0
) -> None:
    """Run a kernel from `load` on the current stream of `device`, without waiting for it.

    Arguments come in the kernel's order: tensors pass as pointers, integers as `long long`, floats as
    `double`, None as a null pointer, bytes (or a numpy value) as a struct of that size. Each position has one
    kind for good, as the kernel declares it; only a tensor may be None another time. No blocks: no launch.
    """
    if not blocks:
        return
    index = device.index
    if index != _current_device():  # CUDA launches where it stands; switching costs microseconds
        with torch.cuda.device(device):
            launch(kernel, device, blocks, threads, *arguments, shared_bytes=shared_bytes)
        return
    values = [each if type(each) is int or type(each) is float else plain(each) for each in arguments]
    own = getattr(kernel.own, "arguments", None)
    if own is None:
        join_context()
        own = kernel.own.arguments = Arguments(values)
    own.pack_into(own.memory, 0, *values)
    kernel.driver(
        kernel.function, blocks, 1, 1, threads, 1, 1, shared_bytes,
        torch._C._cuda_getCurrentRawStream(index), own.address, 0,
    )  # fmt: skip


def join_context() -> None:
    """Have the device's context current in this thread, as any call of CUDA's runtime that needs it does."""
    from cupy.cuda import runtime

    runtime.memGetInfo()
