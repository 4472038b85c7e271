"""CuPy backend: CUDA C++ sources, compiled at run time with NVRTC and launched through CuPy.

A kernel family is two files side by side: `NAME.cu` with the kernels, and `NAME.py` with their launch
settings, the host functions, `KERNELS`, and `SOURCES` for the compile-only tests. `module.py` compiles and
launches; it needs neither a CUDA toolkit nor its headers. Nothing imports cupy until a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping

import torch

from chipmunk_kernels.registry import Kernel

OLDEST_CAPABILITY = (8, 0)
FILES = ("gather", "mlp", "select", "sparse_attention")
"""The files with kernels."""


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why CuPy cannot serve `device`, and the remedy; None if it can."""
    if device.type != "cuda":
        return f"cupy needs an NVIDIA GPU, got device {device}; use backend='torch'"
    if not torch.cuda.is_available():
        return "cupy needs an NVIDIA GPU and torch sees none; check the driver and the CUDA build of torch"
    if torch.version.hip is not None:
        return "the cupy kernels are CUDA sources, this torch is built for ROCm; use backend='torch'"
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed; run {_install_command()}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"the cupy kernels need compute capability 8.0 or newer (Ampere), "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use backend='torch'"
        )
    return None


def _install_command() -> str:
    """How to get the CuPy that fits the CUDA which torch was built with."""
    majors = [torch.version.cuda.split(".")[0]] if torch.version.cuda else ["12", "13"]
    return " or ".join(f"`pip install 'chipmunk-kernels[cuda{major}]'`" for major in majors)


@functools.cache
def kernels() -> Mapping[str, Kernel]:
    """Operation → kernel."""
    modules = [importlib.import_module(f"{__name__}.{file}") for file in FILES]
    return {kernel.operation: kernel for module in modules for kernel in module.KERNELS}
