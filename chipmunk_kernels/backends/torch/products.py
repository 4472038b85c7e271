"""The type in which 16-bit matrices are multiplied: their own, unless a CPU has no instructions for it.

PyTorch multiplies them all the same there, without a library: 2048³ in bfloat16 took 61 s on two cores of an
AMD EPYC 7003 (AVX2), in float32 0.27 s.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """`dtype`, or float32 for a 16-bit one that this CPU's library does not multiply."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device_type != "cpu" or dtype not in checks:
        return dtype
    supported = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, checks[dtype])()
    return dtype if supported else torch.float32


def fused_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which PyTorch's fused attention kernel for CPUs takes inputs of `dtype`.

    Its bfloat16 products are MKL's, with float32 sums, and quick on any x86: 8 groups of 192 over 718 columns
    take 6.5 ms on those cores, as in float32, and half the bytes are gathered. float16 takes 15.7 ms.
    """
    by_library = dtype == torch.bfloat16 and torch.backends.mkl.is_available()
    return dtype if by_library or product_dtype(dtype, "cpu") == dtype else torch.float32
