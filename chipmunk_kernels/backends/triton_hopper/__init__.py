"""Triton backend for Hopper: kernels in Gluon, the dialect in which layouts and barriers are the author's.

What Triton decides by itself everywhere else (which warps fetch and which compute, what waits for what, where
a tile lies) is written out here, with the instructions of sm_90a: wgmma, mbarrier, setmaxnreg. Other GPUs
have the portable `triton` backend. Neither CuPy nor a CUDA toolkit is needed.

Gluon has no interpreter: these kernels are checked on a GPU, and compiled where there is none.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping

import torch

from chipmunk_kernels.backends import triton as portable
from chipmunk_kernels.backends.hopper import refusal
from chipmunk_kernels.registry import Kernel

OLDEST_TRITON = (3, 6)
"""3.6 was run on a GPU, 3.7 compiled; the functions of older versions take other arguments."""
FILES = ("sparse_attention",)
"""The files with kernels: each exports `KERNELS`, and `COMPILE_CASES` for the compile-only report."""
OPERATIONS = ("sparse_attention",)
"""What they offer, for a Triton with which they cannot be imported."""


def without_gluon() -> str | None:
    """Why the Triton that is installed cannot build these kernels, and the remedy; None if it can."""
    import triton

    version = triton.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton_hopper kernels need triton {oldest} or newer, this is {version}; use backend='triton'"
    try:
        kernels()
    except ImportError as error:
        return f"triton {version} has another Gluon than these kernels know ({error}); use backend='triton'"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot serve `device`, and the remedy; None if they can."""
    if portable.interpreted():
        return "triton_hopper kernels have no interpreter; use backend='triton', or unset TRITON_INTERPRET"
    return (
        portable.unavailable(device) or refusal(device, "triton_hopper", instead="triton") or without_gluon()
    )


@functools.cache
def kernels() -> Mapping[str, Kernel]:
    """Operation → kernel. Imports triton; raises ImportError where its Gluon, an experiment, is another."""
    try:
        modules = [importlib.import_module(f"{__name__}.{file}") for file in FILES]
    except (AttributeError, TypeError) as error:  # decorators and layouts are called while it is imported
        raise ImportError(str(error)) from error
    return {kernel.operation: kernel for module in modules for kernel in module.KERNELS}
