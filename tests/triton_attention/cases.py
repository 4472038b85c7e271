"""What the Triton attention tests share: where they run, and calls that hide nothing.

Without a GPU the kernels run in Triton's interpreter: float32 and float16 only, since its bfloat16 products
are wrong. With one they run on it, in the two dtypes that tensor cores take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet
from reference import attention as truth
from tests.factories import assert_within_budget, max_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float32, torch.float16)
EXACT = DTYPES[0]
"""The dtype for tests of logic, where one dtype is enough."""

T = TypeVar("T")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN within, so that an output element never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(function: Callable[..., T], *args: object) -> T:
    """Call with poisoned outputs."""
    with poisoned_memory():
        return function(*args)


def fused_qkv(
    batch: int, heads: int, rows: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as slices of one `(B, N, 3, H, D)` projection: strided in every dimension but D."""
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(batch, rows, 3, heads, width, generator=generator).to(DEVICE, dtype)
    q, k, v = (x.transpose(1, 2) for x in projected.unbind(2))
    return q, k, v


def check_sparse(
    got: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: ColumnSet,
    base: Tensor | None,
    sign: int,
    scale: float,
) -> None:
    """Compare out and lse with the float64 reference, within the error budget."""

    def compute(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        onto = None if base is None else base.to(dtype)
        lists = columns.indices, columns.counts, columns.group_size
        return truth.sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), *lists, onto, sign, scale)

    check(got, compute(torch.float64), compute(q.dtype), q.dtype)


def check(
    got: tuple[Tensor, ...], exact: tuple[Tensor, ...], peer: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Compare (out, lse[, mass]) with a float64 computation, and one in the kernel's dtype for the budget.

    lse and mass are float32 throughout, so they must be far better than that budget: 1e-5 of the logits' size
    is 80 roundings, where a tensor core truncates the sum of 128 products about 8 times.
    """
    for name, a, b, c in zip(("out", "lse", "mass"), got, exact, peer, strict=False):
        assert_within_budget(a, b, c, name, dtype)
    for name, a, b in list(zip(("out", "lse", "mass"), got, exact, strict=False))[1:]:
        lse = exact[1][exact[1].isfinite()].abs()
        largest = float(b.max()) if name == "mass" and b.numel() else 1.0
        tolerance = 1e-5 * (1.0 + (float(lse.max()) if lse.numel() else 0.0)) * largest
        error = max_error(a, b)
        assert error <= tolerance, f"{name}: error {error:.3e} exceeds {tolerance:.3e}"
