"""Bias and GELU of a neuron-major product, in place: one read and one write of memory.

cuBLAS adds a bias along the other side only: a neuron-major product's would have to be copied into the output
before, and read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_kernels.backends.triton.launch import on_device, signature
from chipmunk_kernels.backends.triton.mlp import _gelu_tanh
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice


@dataclass(frozen=True)
class BiasGeluSettings(LaunchSettings):
    """How many tokens of one neuron a program takes: by default, two loads of 16 bytes a thread."""

    block: int = choice(2048, 1024, 2048, 4096)
    num_warps: int = choice(4, 2, 4, 8)


@triton.jit(do_not_specialize=["neurons", "blocks"])
def bias_gelu_kernel(mid, bias, neurons, tokens, blocks, mid_b, mid_f, BLOCK: tl.constexpr):
    """A block of one neuron's row."""
    program = tl.program_id(0)
    row = program // blocks
    neuron = row % neurons
    m = program % blocks * BLOCK + tl.arange(0, BLOCK)
    place = mid + (row // neurons).to(tl.int64) * mid_b + neuron.to(tl.int64) * mid_f + m
    value = tl.load(place, mask=m < tokens, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + neuron).to(tl.float32)
    tl.store(place, _gelu_tanh(value).to(mid.dtype.element_ty), mask=m < tokens)


def bias_gelu(mid: Tensor, bias: Tensor | None, settings: BiasGeluSettings) -> None:
    """mid `(B, F, M)` becomes gelu_tanh(mid + bias `(F,)`), in float32 up to the one rounding.

    The last dimension must be contiguous. Rows and strides of a multiple of 16 elements move 16 bytes a load.
    """
    batch, neurons, tokens = mid.shape
    block = min(settings.block, triton.next_power_of_2(tokens))
    blocks = triton.cdiv(tokens, block)
    with on_device(mid):
        bias_gelu_kernel[(batch * neurons * blocks,)](
            mid, None if bias is None else bias.contiguous(), neurons, tokens, blocks, *mid.stride()[:2],
            BLOCK=block, num_warps=settings.num_warps,
        )  # fmt: skip


KERNELS = (Kernel("bias_gelu", "triton", bias_gelu, BiasGeluSettings),)

_DEFAULT = BiasGeluSettings()
_TYPES = {"mid": "*bf16", "bias": "*bf16", "tokens": "i32:16", "mid_f": "i32:16"}
_CONSTANTS = {"BLOCK": _DEFAULT.block}
COMPILE_CASES = (
    (
        "bias_gelu", bias_gelu_kernel, signature(bias_gelu_kernel, _TYPES, _CONSTANTS), _CONSTANTS,
        _DEFAULT.num_warps, 3,
    ),
)  # fmt: skip
