"""Launching a compiled kernel from Python in a few microseconds.

CuPy boxes every argument of a launch anew, which for thirty of them takes longer than the launch itself. Here
each thread keeps one block of memory for a kernel's arguments, with the list of pointers into it that the
driver wants; a launch packs the arguments there in one call and goes straight to the driver, whose
cuLaunchKernel has copied them when it returns. CuPy's driver module takes plain integers for all of that.

Where shapes stay the same, so do most arguments. `prepared` packs those once: of thirty, ten are left, the
addresses of tensors.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
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
    """Memory for the arguments of a launch, laid out for the kinds of those given, and holding them.

    Integers and pointers take 8 bytes, floats 8 as doubles, bytes what they have, rounded up.

    Args:
        values: integers, floats and bytes.
        changing: how many of them, the first, `pack_into` will replace.
    """

    def __init__(self, values: Sequence[Any], changing: int) -> None:
        codes, offsets, size = [], [], 0
        for value in values:
            room = -(-len(value) // _WORD) * _WORD if isinstance(value, bytes) else _WORD
            codes.append("d" if isinstance(value, float) else f"{room}s" if isinstance(value, bytes) else "q")
            offsets.append(size)
            size += room
        self.memory = ctypes.create_string_buffer(max(size, _WORD))
        struct.pack_into("=" + "".join(codes), self.memory, 0, *values)
        self.pack_into = struct.Struct("=" + "".join(codes[:changing])).pack_into
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
        own = kernel.own.arguments = Arguments(values, len(values))
    own.pack_into(own.memory, 0, *values)
    kernel.driver(
        kernel.function, blocks, 1, 1, threads, 1, 1, shared_bytes,
        torch._C._cuda_getCurrentRawStream(index), own.address, 0,
    )  # fmt: skip


def prepared(
    kernel: Kernel,
    device: torch.device,
    blocks: int,
    threads: int,
    *constants: Any,
    shared_bytes: int = 0,
) -> Callable[..., None]:
    """A launch to be made many times, of which only the kernel's first arguments change: a function of those.

    It takes integers and bytes, as many and of the same kinds each time. Tensors come as addresses, 0 for
    none: to tell kinds apart would take half as long as all the rest. The caller keeps them alive meanwhile.

    Args:
        kernel: from `load`.
        device: where it was loaded.
        blocks, threads, shared_bytes: of the launch.
        constants: the kernel's last arguments, as `launch` takes them.
    """
    index, own, driver, function = device.index, threading.local(), kernel.driver, kernel.function

    def launch_with(*changing: int | bytes) -> None:
        if not blocks:
            return
        if index != _current_device():
            with torch.cuda.device(device):
                launch_with(*changing)
            return
        try:
            arguments = own.arguments
        except AttributeError:
            arguments = own.arguments = _arguments(kernel, changing, constants)
        arguments.pack_into(arguments.memory, 0, *changing)
        stream = torch._C._cuda_getCurrentRawStream(index)
        driver(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, arguments.address, 0)

    return launch_with


def _arguments(kernel: Kernel, changing: Sequence[int | bytes], constants: Sequence[Any]) -> Arguments:
    """This thread's own, which packs the first ones anew."""
    if not hasattr(kernel.own, "joined"):
        join_context()
        kernel.own.joined = True
    return Arguments([*changing, *(plain(each) for each in constants)], len(changing))


def join_context() -> None:
    """Have the device's context current in this thread, as any call of CUDA's runtime that needs it does."""
    from cupy.cuda import runtime

    runtime.memGetInfo()
