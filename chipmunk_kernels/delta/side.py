"""Work beside the current CUDA stream: selections hidden behind the next heads' column sums.

Safe for PyTorch's allocator, which hands memory freed on a stream to that stream again at once, and without
a sync. What the current stream allocated and the side reads or writes stays referenced until the current
stream has joined. What the side allocated may be freed at any time: it is handed out again within a later
fork only, and a fork begins by waiting for all that the current stream was given. So each stream has a side
of its own: a fork from another one would not wait for this one's readers. (`record_stream` would hold such
memory back until the device is done with it: gigabytes, where the host runs many layers ahead.)

On a CPU everything runs in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch


@functools.cache
def _beside(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """The side of a stream. Of high priority: its short kernels start as soon as any unit falls free."""
    return torch.cuda.Stream(current.device, priority=-1)


class Side:
    """The side stream of a device's current stream. As a context, it joins at the end, also after an error.

    Attributes:
        enabled: False runs everything in place, as on a CPU.
    """

    enabled = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        beside = self.enabled and device.type == "cuda"
        self._stream = _beside(torch.cuda.current_stream(device)) if beside else None
        self._forked = False

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.join()

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched within runs beside what the current stream is given afterwards.

        Whatever it reads and the caller allocated must stay referenced until `join`.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._forked = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream waits for what was forked.

        Without a fork since the last join there is nothing to wait for, and a graph's capture forbids it: the
        side belongs to the capture only once it has been forked from there.
        """
        if self._stream is not None and self._forked:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._forked = False
