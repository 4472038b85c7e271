"""What all kernels written in sm_90a's own instructions ask of a device."""

from __future__ import annotations

import torch

CAPABILITY = (9, 0)


def refusal(device: torch.device, backend: str, instead: str) -> str | None:
    """Why `backend` cannot serve a CUDA device that is no Hopper, and what can; None for one that is."""
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    return (
        f"the {backend} kernels need compute capability 9.0 (Hopper), "
        f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use backend={instead!r}"
    )
