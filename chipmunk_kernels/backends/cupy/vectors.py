"""16-byte vectors of 16-bit elements: what the portable kernels read global memory by."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = {torch.float16: 1, torch.bfloat16: 2}
"""The KIND macro of each dtype."""

VECTOR_BYTES = 16


def whole_vectors(x: Tensor) -> Tensor:
    """`x`, or a copy of it whose rows begin at multiples of 16 bytes. The last dimension is contiguous."""
    if common_bytes(x) == VECTOR_BYTES:
        return x
    words = VECTOR_BYTES // x.element_size()
    padded = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // words) * words)[..., : x.shape[-1]]
    return padded.copy_(x)


def common_bytes(x: Tensor, *steps: int) -> int:
    """The widest vector, at most 16 bytes, that rows of `x` and offsets of `steps` in them start at."""
    return vector_bytes(x.data_ptr(), x.element_size(), *x.stride()[:-1], *steps)


def vector_bytes(address: int, item: int, *steps: int) -> int:
    """The widest vector, at most 16 bytes, that `address` and steps of `item` bytes are multiples of."""
    bits = address | VECTOR_BYTES
    for step in steps:
        bits |= step * item
    return bits & -bits  # the lowest bit set: a gcd takes twice as long
