"""PyTorch's own fused attention kernels, asked for their log-sum-exp as well."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """out `(B, H, Nq, D)` and lse `(B, H, Nq)` from the fastest fused kernel that takes these inputs, or
    None."""
    for attend in _cuda(q.dtype) if q.device.type == "cuda" else _host(q):
        try:
            out, lse = attend(q, k, v, scale)
        except RuntimeError:  # how a kernel says that it does not take these inputs, or is not built in here
            continue
        # Some kernels pad the rows of the log-sum-exp to their tile, some append a dimension of one.
        return out, lse.reshape(*q.shape[:2], -1)[:, :, : q.shape[2]].contiguous()
    return None


def fused_on_host(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out `(n, R, D)` and lse `(n, R)` on a CPU: q `(n, R, D)`, k and v `(n, C, D)`, kept `(n, 1, C)` or None
    for all, at least one of each n."""
    mask = None
    if kept is not None:
        mask = q.new_zeros(kept.shape).masked_fill_(~kept, float("-inf")).unsqueeze(1)
    heads = (each.unsqueeze(1) for each in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, attn_mask=mask, scale=scale)
    return found[0].squeeze(1), found[1].squeeze(1)


_Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _host(q: Tensor) -> tuple[_Attend, ...]:
    return (_host_flash,) if q.device.type == "cpu" else ()


def _cuda(dtype: torch.dtype) -> tuple[_Attend, ...]:
    """On an H200 cuDNN is 1.7 times as fast as PyTorch's flash kernel; float32 has the memory-efficient
    one only."""
    return (_efficient,) if dtype == torch.float32 else (_cudnn, _flash, _efficient)


def _host_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return found[0], found[1]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return found[0], found[1]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return found[0], found[1]


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return found[0], found[1]
