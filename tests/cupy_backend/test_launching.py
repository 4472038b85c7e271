"""What reaches the driver at a launch: arguments as the kernel declares them, and where it is to run."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chipmunk_kernels.backends.cupy import launching

DEVICE = torch.device("cuda:3")


class Driver:
    """Stands in for the driver: reads what the pointers point to, as cuLaunchKernel does."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.launches: list[tuple[tuple[int, ...], list[bytes]]] = []

    def __call__(self, *given: int) -> None:
        *numbers, parameters, extra = given
        assert extra == 0
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        read = [ctypes.string_at(at or 0, size) for at, size in zip(pointers, self.sizes, strict=True)]
        self.launches.append((tuple(numbers), read))


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device 3 that is current, whose current stream is 77; the devices switched to."""
    joined: list[int] = []
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cuda.driver = SimpleNamespace(launchKernel=None)  # type: ignore[attr-defined]
    cuda.runtime = SimpleNamespace(memGetInfo=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(launching, "_current_device", lambda: joined[-1] if joined else 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 74 + index, raising=False)

    class Switch:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            joined.append(self.device.index)

        def __exit__(self, *error: Any) -> None:
            joined.append(-1)

    monkeypatch.setattr(torch.cuda, "device", Switch)
    return joined


def prepared(*sizes: int) -> tuple[launching.Kernel, Driver]:
    kernel = launching.Kernel(SimpleNamespace(kernel=SimpleNamespace(ptr=5)))
    kernel.driver = driver = Driver(sizes)
    return kernel, driver


def test_each_kind_of_argument(switched: list[int]) -> None:
    kernel, driver = prepared(8, 8, 8, 8, 12, 8)
    x = torch.zeros(4)
    value = np.frombuffer(b"abcdefghijkl", np.dtype((np.void, 12)))
    launching.launch(kernel, DEVICE, 6, 128, x, -7, 2.5, None, value, True, shared_bytes=9)
    launching.launch(kernel, DEVICE, 6, 128, None, 1 << 40, -1.0, x, b"mnopqrstuvwx", 0)
    numbers, read = driver.launches[0]
    assert numbers == (5, 6, 1, 1, 128, 1, 1, 9, 77)
    assert struct.unpack("qqdq12sq", b"".join(read[:4]) + read[4] + bytes(4) + read[5]) == (
        x.data_ptr(), -7, 2.5, 0, b"abcdefghijkl", 1,
    )  # fmt: skip
    assert driver.launches[1][1] == [
        bytes(8), struct.pack("q", 1 << 40), struct.pack("d", -1.0), struct.pack("q", x.data_ptr()),
        b"mnopqrstuvwx", bytes(8),
    ]  # fmt: skip
    assert not switched


def test_a_float_where_an_integer_was(switched: list[int]) -> None:
    kernel, driver = prepared(8)
    launching.launch(kernel, DEVICE, 1, 32, 1)
    with pytest.raises(struct.error):
        launching.launch(kernel, DEVICE, 1, 32, 1.5)
    assert len(driver.launches) == 1


def test_another_device_is_switched_to(switched: list[int]) -> None:
    kernel, driver = prepared(8)
    launching.launch(kernel, torch.device("cuda:2"), 1, 32, 1)
    assert switched == [2, -1]
    assert driver.launches[0][0][-1] == 76


def test_no_blocks_launch_nothing(switched: list[int]) -> None:
    kernel, driver = prepared(8)
    launching.launch(kernel, DEVICE, 0, 32, 1)
    assert not driver.launches


def test_threads_have_memory_of_their_own(switched: list[int]) -> None:
    kernel, _ = prepared(8)
    addresses: list[int] = []
    kernel.driver = lambda *given: addresses.append(given[-2])
    threads = [threading.Thread(target=launching.launch, args=(kernel, DEVICE, 1, 32, 1)) for _ in range(2)]
    launching.launch(kernel, DEVICE, 1, 32, 1)
    launching.launch(kernel, DEVICE, 1, 32, 1)
    kept = kernel.own.arguments
    for thread in threads:
        thread.start()
        thread.join()
    assert addresses[0] == addresses[1] == kept.address
    assert kept.address not in addresses[2:]
    assert len(addresses) == 4
