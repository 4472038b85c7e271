"""Online softmax over tiles of columns: the steps that the Triton attention kernels share.

Logits are in base 2: with `scale_log2 = scale · log2 e`, a weight is one multiply-add and one exp2. The
running maximum `m` (already scaled), the normaliser `l` and the unnormalised output `acc` are float32.

A tile that is not full repeats its last column in the slots past the end, so that it changes no maximum and
needs no −∞: such slots then count zero in the normaliser, and their values are loaded as zeros.

A loop may take each tile's product with its values one tile late (`hold` and `held`): that product then runs
on the tensor cores while the next tile's exponentials run beside it. In the natural order each waits for the
other, and only a second program on the same multiprocessor can fill the gaps.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logits(q, keys, PRECISION: tl.constexpr):
    """Unscaled logits `(BLOCK_M, BLOCK_N)` of a query tile and the rows that the pointers `keys` name."""
    return tl.dot(q, tl.trans(tl.load(keys)), input_precision=PRECISION)


@triton.jit
def weigh(s, live, m, l, scale_log2, MASKED: tl.constexpr):
    """Take one tile of logits into the running maximum and normaliser.

    Args:
        s: `(BLOCK_M, BLOCK_N)` unscaled logits.
        live: bool `(BLOCK_N,)`, which slots are columns; read only if MASKED.

    Returns:
        The tile's weights exp2(s − m) relative to the new maximum, m, l, and exp2(m before − m), by which
        whatever was accumulated before must be multiplied.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    total = tl.sum(p * live.to(tl.float32)[None, :], 1) if MASKED else tl.sum(p, 1)
    return p, m_new, l * rescale + total, rescale


@triton.jit
def only(s, slots, live, BRANCH: tl.constexpr):
    """Logits `(BLOCK_M, BLOCK_N)` of the first `live` slots, −∞ for the rest.

    With BRANCH a full tile skips it; but a branch makes a product that is in flight wait.
    """
    if BRANCH:
        if live < s.shape[1]:
            s = tl.where((slots < live)[None, :], s, float("-inf"))
        return s
    else:
        return tl.where((slots < live)[None, :], s, float("-inf"))


@triton.jit
def rows_of(pointers, live, MASKED: tl.constexpr):
    """Load rows `(BLOCK_N, D)`; if MASKED, zeros for the slots that are not live."""
    if MASKED:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def attend(q, keys, values, live, m, l, acc, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take one tile of columns into the softmax state, in the natural order.

    Args:
        q: `(BLOCK_M, D)` query tile.
        keys, values: pointers `(BLOCK_N, D)` to the tile's rows.
        live: bool `(BLOCK_N,)`, which slots are columns; read only if MASKED.

    Returns:
        m, l, acc, and the tile's weights exp2(s − m) `(BLOCK_M, BLOCK_N)` relative to the new maximum.
    """
    s = logits(q, keys, PRECISION)
    p, m, l, rescale = weigh(s, live, m, l, scale_log2, MASKED)
    v = rows_of(values, live, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return m, l, acc, p


@triton.jit
def hold(p, dtype: tl.constexpr):
    """A tile's weights, rounded to `dtype`, as integers: what a loop carries to the next tile.

    The compiler sends an operand that is a loop's carried value through shared memory, at once and waiting
    for it; a reinterpreted one it leaves in registers, and the product in flight.
    """
    return p.to(dtype).to(tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)


@triton.jit
def held(bits, dtype: tl.constexpr):
    """The weights that `hold` took."""
    return bits.to(dtype, bitcast=True)


@triton.jit
def sweep(
    q, k, v, K_N: tl.constexpr, V_N: tl.constexpr, n, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A query tile against the first `n` columns; k and v are pointers `(1, D)` to the first of their rows.

    K_N and V_N are their strides. Returns m, l and acc.
    """
    half = v.dtype.element_ty
    slots = tl.arange(0, BLOCK_N)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    full = n // BLOCK_N * BLOCK_N
    if OVERLAP:
        rescale = tl.full((BLOCK_M,), 1.0, tl.float32)
        waiting = hold(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), half)
        for start in tl.range(0, full, BLOCK_N):
            column = (start + slots).to(tl.int64)
            behind = (tl.maximum(start - BLOCK_N, 0) + slots).to(tl.int64)
            values = tl.load(v + behind[:, None] * V_N)
            s = logits(q, k + column[:, None] * K_N, PRECISION)
            acc = tl.dot(held(waiting, half), values, acc * rescale[:, None], input_precision=PRECISION)
            p, m, l, rescale = weigh(s, slots < BLOCK_N, m, l, scale_log2, False)
            waiting = hold(p, half)
        if full > 0:
            values = tl.load(v + (full - BLOCK_N + slots).to(tl.int64)[:, None] * V_N)
            acc = tl.dot(held(waiting, half), values, acc * rescale[:, None], input_precision=PRECISION)
    else:
        for start in tl.range(0, full, BLOCK_N):
            column = (start + slots).to(tl.int64)
            m, l, acc, p = attend(
                q, k + column[:, None] * K_N, v + column[:, None] * V_N, slots < BLOCK_N,
                m, l, acc, scale_log2, False, PRECISION,
            )  # fmt: skip
    if full < n:
        live = full + slots < n
        column = tl.minimum(full + slots, n - 1).to(tl.int64)
        m, l, acc, p = attend(
            q, k + column[:, None] * K_N, v + column[:, None] * V_N, live,
            m, l, acc, scale_log2, True, PRECISION,
        )  # fmt: skip
    return m, l, acc


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
