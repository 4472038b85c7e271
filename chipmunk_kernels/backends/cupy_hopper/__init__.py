"""CuPy backend for Hopper: CUDA C++ sources that need the instructions of sm_90a (wgmma, setmaxnreg).

Laid out and compiled as `backends/cupy`, whose `module.py` it uses: a kernel family is `NAME.cu` beside
`NAME.py`; `hopper.cuh` holds the instructions they share. Other GPUs have the portable `cupy` backend.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path

import torch

from chipmunk_kernels.backends import cupy
from chipmunk_kernels.registry import Kernel

CAPABILITY = (9, 0)
FOLDER = Path(__file__).parent
FILES: tuple[str, ...] = ("sparse_attention", "mlp", "colsum_attention", "dense_attention")
"""The files with kernels."""


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot serve `device`, and the remedy; None if they can."""
    reason = cupy.unavailable(device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return (
            f"the cupy_hopper kernels need compute capability 9.0 (Hopper), "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use backend='cupy'"
        )
    return None


@functools.cache
def kernels() -> Mapping[str, Kernel]:
    """Operation → kernel."""
    modules = [importlib.import_module(f"{__name__}.{file}") for file in FILES]
    return {kernel.operation: kernel for module in modules for kernel in module.KERNELS}
