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


def numbers_of(read: list[bytes]) -> tuple[Any, ...]:
    return struct.unpack(f"{len(read) - 1}qd", b"".join(read))


def test_a_prepared_launch_changes_its_first_arguments_alone(switched: list[int]) -> None:
    kernel, driver = prepared(8, 8, 8, 8)
    run = launching.prepared(kernel, DEVICE, 6, 128, -7, 2.5, shared_bytes=9)
    for pointers in ((1 << 40, 16), (0, 32), (48, 0)):
        run(*pointers)
        numbers, read = driver.launches[-1]
        assert numbers == (5, 6, 1, 1, 128, 1, 1, 9, 77)
        assert numbers_of(read) == (*pointers, -7, 2.5)
    assert not switched


def test_prepared_launches_of_one_kernel_take_turns(switched: list[int]) -> None:
    """Each keeps its own constants, next to those of `launch`."""
    kernel, driver = prepared(8, 8, 8)
    first = launching.prepared(kernel, DEVICE, 1, 32, 10, 0.5)
    second = launching.prepared(kernel, DEVICE, 2, 64, 20, 0.25)
    for address in (16, 32):
        first(address)
        second(address + 1)
        launching.launch(kernel, DEVICE, 3, 96, address + 2, 30, 0.125)
    seen = [(numbers[1], *numbers_of(read)) for numbers, read in driver.launches]
    assert seen[3:] == [(1, 32, 10, 0.5), (2, 33, 20, 0.25), (3, 34, 30, 0.125)]


def test_a_prepared_launch_takes_structs_by_value(switched: list[int]) -> None:
    kernel, driver = prepared(128, 8, 8)
    run = launching.prepared(kernel, DEVICE, 1, 32, None)
    for fill in (b"a", b"b"):
        run(fill * 128, 24)
        assert driver.launches[-1][1] == [fill * 128, struct.pack("q", 24), bytes(8)]


def test_a_prepared_launch_of_no_blocks_or_elsewhere(switched: list[int]) -> None:
    kernel, driver = prepared(8)
    launching.prepared(kernel, DEVICE, 0, 32)(1)
    assert not driver.launches
    launching.prepared(kernel, torch.device("cuda:2"), 1, 32)(1)
    assert switched == [2, -1]
    assert driver.launches[0][0][-1] == 76


def test_a_prepared_launch_refuses_other_kinds_and_numbers(switched: list[int]) -> None:
    kernel, driver = prepared(8, 8)
    run = launching.prepared(kernel, DEVICE, 1, 32, 3)
    run(1)
    for wrong in ((1.5,), (b"a",), (1, 2), ()):
        with pytest.raises(struct.error):
            run(*wrong)
    assert len(driver.launches) == 1


def test_threads_do_not_see_each_others_arguments(switched: list[int]) -> None:
    """Each waits in the driver until the other has packed its own."""
    kernel, _ = prepared()
    both, driver = threading.Barrier(2), Driver((8, 8, 8))
    joined: list[int] = []
    sys.modules["cupy.cuda"].runtime.memGetInfo = lambda: joined.append(threading.get_ident())

    def wait_then_read(*given: int) -> None:
        both.wait(10)
        driver(*given)

    kernel.driver = wait_then_read
    run = launching.prepared(kernel, DEVICE, 1, 32, 7, 0.5)

    def launch_twice(address: int) -> None:
        run(address)
        run(address + 1)

    threads = [threading.Thread(target=launch_twice, args=(address,)) for address in (100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = sorted(numbers_of(read) for _, read in driver.launches)
    assert seen == [(address, 7, 0.5) for address in (100, 101, 200, 201)]
    assert len(joined) == len(set(joined)) == 2, "a new thread joins the device's context, once"
