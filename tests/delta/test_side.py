"""Who waits for whom when work runs beside the current stream: told by streams that only take notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from chipmunk_kernels.delta import side
from chipmunk_kernels.delta.side import Side

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Noted:
    """Stands in for a CUDA stream."""

    made = 0

    def __init__(self, device: torch.device = GPU, priority: int = 0) -> None:
        Noted.made += 1
        self.device = device
        self.waited_for: list[Noted] = []

    def wait_stream(self, other: Noted) -> None:
        self.waited_for.append(other)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Noted]]:
    """A stack whose top is the current stream."""
    stack = [Noted()]

    @contextmanager
    def within(stream: Noted) -> Iterator[None]:
        stack.append(stream)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Noted)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stack[-1])
    side._beside.cache_clear()
    yield stack
    side._beside.cache_clear()


def test_both_wait_for_each_other_once(current: list[Noted]) -> None:
    main = current[0]
    beside = Side(GPU)
    with beside.fork():
        aside = current[-1]
        assert aside is not main and aside.waited_for == [main]
    assert current == [main] and main.waited_for == []
    beside.join()
    beside.join()
    assert main.waited_for == [aside] and aside.waited_for == [main]


def test_nothing_is_waited_for_that_was_not_forked(current: list[Noted]) -> None:
    """In a capture, to wait for a stream from outside it is an error."""
    with Side(GPU) as beside:
        beside.join()
    assert current[0].waited_for == []


def test_an_error_still_joins(current: list[Noted]) -> None:
    """The side may yet write into memory that the current stream would hand out again."""
    with pytest.raises(KeyError), Side(GPU) as beside:
        with beside.fork():
            aside = current[-1]
        raise KeyError
    assert current[0].waited_for == [aside]


def test_each_stream_has_a_side_of_its_own(current: list[Noted]) -> None:
    """Memory of the side is handed out again in a fork, which waits only for the stream it forks from."""
    sides = []
    for stream in (current[0], current[0], Noted()):
        current[-1] = stream
        with Side(GPU).fork():
            sides.append(current[-1])
    assert sides[0] is sides[1] and sides[2] is not sides[0]


@pytest.mark.parametrize(("device", "enabled"), [(CPU, True), (GPU, False)])
def test_in_place(
    device: torch.device, enabled: bool, current: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Side, "enabled", enabled)
    made = Noted.made
    with Side(device) as beside, beside.fork():
        assert len(current) == 1
    assert Noted.made == made and current[0].waited_for == []
