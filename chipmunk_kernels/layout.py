"""How attention outputs lie in memory: as the queries do, so that a model's transposes stay free."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def empty_like_queries(q: Tensor) -> Tensor:
    """An uninitialised, dense `(B, H, N, D)` tensor in the order of q: a transposed view if q is one.

    Unlike `torch.empty_like`, q may be a slice of a fused projection.
    """
    batch, heads, rows, width = q.shape
    if _rows_before_heads(q):
        return torch.empty(batch, rows, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    return torch.empty(batch, heads, rows, width, dtype=q.dtype, device=q.device)


@functools.lru_cache(maxsize=1024)
def strides_like_queries(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of `empty_like_queries` of a tensor of this shape and these strides. Cached: 4 µs else."""
    return empty_like_queries(torch.empty_strided(shape, strides, device="meta")).stride()


def maker(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Callable[[], Tensor]:
    """A function that gives an uninitialised tensor at each call, contiguous without `strides`.

    It goes where the code that `torch.compile` generates goes, past the dispatcher: with `new_empty_strided`
    two results were 4.7 of the 14 µs that a launch took the host of an H200, with `torch.empty` more. Where
    somebody watches what is allocated (a torch function mode, or deterministic algorithms, which fill it with
    NaN), and on another than the current device, it goes the long way.
    """
    if strides is None:
        strides = torch.empty(shape, device="meta").stride()
    layout = tuple(shape), tuple(strides)
    long_way = functools.partial(torch.empty(0, dtype=dtype, device=device).new_empty_strided, *layout)
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    quick = getattr(guards, f"_empty_strided_{device.type}", None)
    if quick is None:
        return long_way
    short_way = functools.partial(quick, *layout, dtype)
    modes, deterministic = torch._C._len_torch_function_stack, torch._C._get_deterministic_algorithms
    index = device.index
    current = torch._C._cuda_getDevice if device.type == "cuda" else lambda: index

    def new() -> Tensor:
        return long_way() if modes() or deterministic() or current() != index else short_way()

    return new


def laid_out_like_queries(out: Tensor, q: Tensor) -> Tensor:
    """`out` itself where it already has the layout of `empty_like_queries`, else a copy that has."""
    wanted, got = strides_like_queries(q.shape, q.stride()), out.stride()
    if got == wanted or all(size == 1 or a == b for size, a, b in zip(out.shape, got, wanted, strict=True)):
        return out
    return empty_like_queries(q).copy_(out)


def _rows_before_heads(q: Tensor) -> bool:
    return q.shape[1] > 1 and q.shape[2] > 1 and q.stride(1) < q.stride(2)
