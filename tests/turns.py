"""Turns among the workers of pytest-xdist: a test that measures time has the machine to itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

QUEUE, ROOM = Path(__file__), Path(__file__).with_name("__init__.py")
"""What the workers of a checkout lock; neither is written."""


@contextmanager
def turn(alone: bool, queue: Path = QUEUE, room: Path = ROOM) -> Iterator[None]:
    """In the room there are many, or one that is alone.

    Who waits to be alone holds the queue up meanwhile: so the room empties.
    """
    import fcntl  # POSIX only, as are several workers here

    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with room.open() as inside:
        with queue.open() as waiting:
            fcntl.flock(waiting, kind)
            fcntl.flock(inside, kind)
        try:
            yield
        finally:  # closing it would not do where a test has forked: the lock is also the child's
            fcntl.flock(inside, fcntl.LOCK_UN)
