"""The SM clock while a sample was taken: cycles over nanoseconds between two stamps on its stream.

Clocks follow power: between calls of dense attention an H200 runs a sparse one at 1500 MHz, which by itself
it runs at 1670. So of two times, the clocks beside them tell how much is the kernel's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def stamp_kernel(stamps):
    """Of the multiprocessor that this runs on: its cycle counter, the time in ns, and which one it is."""
    multiprocessor = cuda.smid()
    cycles = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l,r", [multiprocessor], dtype=tl.int64, is_pure=False, pack=1
    )
    tl.store(stamps, cycles)
    tl.store(stamps + 1, cuda.globaltimer())
    tl.store(stamps + 2, multiprocessor.to(tl.int64))


class SmClock:
    """Mean SM clock between `begin` and `end`, which enqueue a stamp each on the current stream of `device`,
    the current device then.

    Cycle counters of different multiprocessors do not compare. On an idle device a kernel of one block is
    always given the same one; where it is not, there is no clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._stamps = torch.zeros(2, 3, dtype=torch.int64, device=device)
        with torch.cuda.device(device):  # compiles here, not beside a sample
            self.begin()
            self.end()

    def begin(self) -> None:
        stamp_kernel[(1,)](self._stamps[0], num_warps=1)

    def end(self) -> None:
        stamp_kernel[(1,)](self._stamps[1], num_warps=1)

    def mhz(self) -> float | None:
        """Waits for both stamps. None where the clock cannot be told."""
        begin, end = self._stamps.tolist()
        return clock_mhz(begin, end)


def clock_mhz(begin: list[int], end: list[int]) -> float | None:
    """From two stamps of cycles, nanoseconds and multiprocessor."""
    cycles, nanoseconds = end[0] - begin[0], end[1] - begin[1]
    if begin[2] != end[2] or cycles <= 0 or nanoseconds <= 0:
        return None
    return 1e3 * cycles / nanoseconds
