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
from chipmunk_kernels.backends.hopper import refusal
from chipmunk_kernels.registry import Kernel

FOLDER = Path(__file__).parent
FILES: tuple[str, ...] = ("sparse_attention", "mlp", "colsum_attention", "dense_attention")
"""The files with kernels."""


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot serve `device`, and the remedy; None if they can."""
    return cupy.unavailable(device) or refusal(device, "cupy_hopper", instead="cupy")


@functools.cache
def kernels() -> Mapping[str, Kernel]:
    """Operation → kernel."""
    modules = [importlib.import_module(f"{__name__}.{file}") for file in FILES]
    return {kernel.operation: kernel for module in modules for kernel in module.KERNELS}
