"""Triton backend: one portable kernel source for every NVIDIA GPU from sm_80 on.

Nothing here imports triton until a kernel is asked for. With `TRITON_INTERPRET=1` the kernels run in Triton's
interpreter, which takes CPU tensors: slow, but it checks their logic on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping

import torch

from chipmunk_kernels.registry import Kernel

OLDEST_CAPABILITY = (8, 0)
FILES = ("dense_attention", "colsum_attention", "sparse_attention", "select", "gather", "mlp", "bias_gelu")
"""The files with kernels: each exports `KERNELS`, and `COMPILE_CASES` for the compile-only report."""


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on (read at import of triton, so set it before)."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "yes", "on", "y")


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot serve `device`, and the remedy; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"triton needs an NVIDIA GPU, got {device}; use backend='torch' (to test: TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "triton needs an NVIDIA GPU and torch sees none; check the driver and the CUDA build of torch"
    if torch.version.hip is not None:
        return "triton kernels here are tuned and tested for NVIDIA GPUs only, this torch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"triton kernels need compute capability 8.0 or newer (Ampere), "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use backend='torch'"
        )
    return None


@functools.cache
def kernels() -> Mapping[str, Kernel]:
    """Operation → kernel. Imports triton."""
    modules = [importlib.import_module(f"{__name__}.{file}") for file in FILES]
    return {kernel.operation: kernel for module in modules for kernel in module.KERNELS}
