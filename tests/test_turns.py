"""Tests that measure time wait for the others, and the others for them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.turns import turn


class Guest:
    """Another worker, which comes in and stays until it is told to leave."""

    def __init__(self, alone: bool, folder: Path) -> None:
        self.inside, self.may_leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._visit, args=(alone, folder), daemon=True)
        self._thread.start()

    def _visit(self, alone: bool, folder: Path) -> None:
        with turn(alone, folder / "queue", folder / "room"):
            self.inside.set()
            self.may_leave.wait()

    def leave(self) -> None:
        self.may_leave.set()
        self._thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "queue").touch()
    (tmp_path / "room").touch()
    return tmp_path


def test_many_share_the_room(folder: Path) -> None:
    guests = [Guest(False, folder) for _ in range(3)]
    assert all(guest.inside.wait(10) for guest in guests)
    for guest in guests:
        guest.leave()


def test_one_that_is_alone_waits_and_is_waited_for(folder: Path) -> None:
    """And comes before those that came later, who could keep the room full for ever."""
    first = Guest(False, folder)
    assert first.inside.wait(10)
    alone = Guest(True, folder)
    assert not alone.inside.wait(0.2)
    late = Guest(False, folder)
    assert not late.inside.wait(0.2), "the one that waits comes first"
    first.leave()
    assert alone.inside.wait(10) and not late.inside.wait(0.2)
    alone.leave()
    assert late.inside.wait(10)
    late.leave()
