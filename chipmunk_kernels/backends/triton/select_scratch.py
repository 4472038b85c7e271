"""How much of a selection is in flight: long rows are decided in chunks, to bound the scratch memory.

A row's marks are a bit a column, a contest's lists two words a candidate: 211 MiB for all 14 856 rows of
HunyuanVideo at once, 66 MiB for four contests on each of 132 multiprocessors. Rows know nothing of each
other, so what is chosen does not depend on the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

SCRATCH_BYTES = 60 << 20
"""Most scratch memory of a call. Any sparse call may take 64 MiB beyond its results; the rest is the
allocator's rounding."""
LEAST_SHARE = 4
"""That part of it is for rows whatever the always-kept columns take: one row needs its marks and lists."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are decided together.

    Attributes:
        rows: how many; the last chunk may have fewer.
        programs: that hold their contests, each with lists of its own.
    """

    rows: int
    programs: int

    def bytes(self, row_bytes: int, list_bytes: int) -> int:
        """Scratch memory of a chunk."""
        return self.rows * row_bytes + self.programs * list_bytes


def chunk(rows: int, row_bytes: int, list_bytes: int, wanted: int, units: int, taken: int = 0) -> Chunk:
    """The largest chunk that fits `SCRATCH_BYTES`, marks in a third of them and lists in two.

    Contests wait for memory, so as many programs as fit are worth more than long chunks; whole numbers of
    both, programs a multiprocessor and rows a program, leave no unit idle at the end.

    Args:
        rows: of the call.
        row_bytes: scratch of a row: marks and floor.
        list_bytes: scratch of a program.
        wanted: most programs at once.
        units: multiprocessors.
        taken: bytes of scratch that the call needs besides.

    Returns:
        At least one row and one program, even where these exceed the bound.
    """
    room = max(SCRATCH_BYTES - taken, SCRATCH_BYTES // LEAST_SHARE)
    marks = min(rows * row_bytes, room // 3)
    programs = max(1, min(rows, wanted, (room - marks) // list_bytes))
    if programs > units:
        programs -= programs % units
    fitting = max(1, min(rows, (room - programs * list_bytes) // row_bytes))
    programs = min(programs, fitting)
    return Chunk(fitting if fitting == rows else fitting - fitting % programs, programs)
