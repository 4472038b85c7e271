"""What launches ask of a device besides its name."""

from __future__ import annotations

import functools

import torch


@functools.cache
def units(device: torch.device) -> int:
    """Multiprocessors of a device; one where the interpreter stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
