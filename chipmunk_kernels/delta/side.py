"""Work beside the current CUDA stream: selections and cache write-backs hidden behind the next product.

Safe for PyTorch's allocator, which hands memory freed on a stream to that stream again at once, and without
a sync. What the current stream allocated and the side reads stays referenced until the current stream has
joined. What the side allocated may be freed at any time: it is handed out again within a later fork only, and
a fork begins by waiting for all that the current stream was given. (`record_stream` would hold such memory
back until the device is done with it: gigabytes, where the host runs many layers ahead.)

On a CPU everything runs in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The device's side stream. Of high priority: its short kernels start as soon as any unit falls free."""
    return torch.cuda.Stream(device, priority=-1)


class Side:
    """The side stream of one device.

    Attributes:
        enabled: False runs everything in place, as on a CPU.
    """

    enabled = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device) if self.enabled and device.type == "cuda" else None

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched within runs beside what the current stream is given afterwards.

        Whatever it reads and the caller allocated must stay referenced until `join`.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream waits for the side."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
