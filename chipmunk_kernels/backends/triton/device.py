"""What launches ask of a device besides its name."""

from __future__ import annotations

import functools

import torch

REGISTERS = 65536
"""Of a multiprocessor, from sm_80 on."""


@functools.cache
def units(device: torch.device) -> int:
    """Multiprocessors of a device; one where the interpreter stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def register_share(programs: int, warps: int, least: int) -> int:
    """The most registers a thread may have for that many programs to share a multiprocessor, or `least`."""
    share = REGISTERS // (programs * warps * 32) // 8 * 8  # they are given out by eights
    return max(least, min(255, share))
