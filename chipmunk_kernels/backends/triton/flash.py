"""Online softmax over tiles of columns: the inner step that the Triton attention kernels share.

Logits are in base 2: with `scale_log2 = scale · log2 e`, a weight is one multiply-add and one exp2. The
running maximum `m` (already scaled), the normaliser `l` and the unnormalised output `acc` are float32.

A tile that is not full repeats its last column in the slots past the end, so that it changes no maximum and
needs no −∞: such slots then count zero in the normaliser, and their values are loaded as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    q,
    keys,
    values,
    live,
    m,
    l,
    acc,
    scale_log2,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take one tile of columns into the softmax state.

    Args:
        q: `(BLOCK_M, D)` query tile.
        keys, values: pointers `(BLOCK_N, D)` to the tile's rows.
        live: bool `(BLOCK_N,)`, which slots are columns; read only if MASKED.

    Returns:
        m, l, acc, and the tile's weights exp2(s − m) `(BLOCK_M, BLOCK_N)` relative to the new maximum.
    """
    s = tl.dot(q, tl.trans(tl.load(keys)), input_precision=PRECISION)
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    if MASKED:
        total = tl.sum(p * live.to(tl.float32)[None, :], 1)
        v = tl.load(values, mask=live[:, None], other=0.0)
    else:
        total = tl.sum(p, 1)
        v = tl.load(values)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return m_new, l * rescale + total, acc, p


@triton.jit
def key_count(key_length, b, keys):
    """How many keys take part in batch `b`: all, or what the tensor `key_length` says."""
    if key_length is None:
        return keys
    else:
        return tl.minimum(tl.maximum(tl.load(key_length + b).to(tl.int32), 0), keys)


@triton.jit
def log_sum_exp(m, l):
    """Natural-log normaliser; −∞ for a row that took in no column."""
    return tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * LN2, float("-inf"))


@triton.jit
def reciprocal(l):
    """1 / l, and 0 for a row that took in no column."""
    return tl.where(l > 0, 1.0 / tl.where(l > 0, l, 1.0), 0.0)
