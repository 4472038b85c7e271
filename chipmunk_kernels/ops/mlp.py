"""MLP operators: the column-sparse delta, the group means that its change estimate needs, and what makes a
first product the activation cache.

Source: arXiv 2506.03275, section 3. Activations are assigned, not added to, since repeated adding in
    bfloat16 drifts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chipmunk_kernels import checks, dispatch
from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.ops.operator import operator
from chipmunk_kernels.settings import LaunchSettings

ACTIVATIONS = ("gelu_tanh",)


def sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    columns: ColumnSet,
    activation_cache: Tensor,
    output_cache: Tensor,
    *,
    activation: str = "gelu_tanh",
    backend: str | None = None,
    settings: LaunchSettings | None = None,
) -> Tensor:
    """Recompute the neurons that each token group keeps, and add what changed into the cached output.

    Args:
        x: `(B, M, K)` in float16, bfloat16 or float32.
        w1: `(F, K)`, as `nn.Linear` stores it.
        b1: `(F,)` or None.
        w2_by_neuron: `(F, Kout)`: the second `nn.Linear`'s weight transposed, rows contiguous (one neuron,
            one row).
        columns: the neurons that each token group keeps; one head.
        activation_cache: `(B, F, M)` neuron-major, in x's dtype; kept entries are assigned their new
            activation.
        output_cache: `(B, M, Kout)` in x's dtype or float32; gains (new − cached) activations times w2, in
            place.
        activation: one of `ACTIVATIONS`.
        backend, settings: as in `dense_attention`.

    Returns:
        `output_cache`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout.
        RuntimeError: the explicit backend cannot run here.
    """
    checks.floating("x", x, 3, "(B, M, K)")
    checks.floating("w1", w1, 2, "(F, K)")
    batch, tokens, width = x.shape
    neurons = w1.shape[0]
    checks.like("w1", w1, (neurons, width), (x.dtype,), x.device)
    if b1 is not None:
        checks.like("b1", b1, (neurons,), (x.dtype,), x.device)
    _check_w2(w2_by_neuron, neurons, x)
    checks.column_set(columns, batch, 1, tokens, x.device)
    checks.like("activation_cache", activation_cache, (batch, neurons, tokens), (x.dtype,), x.device)
    shape = (batch, tokens, w2_by_neuron.shape[1])
    checks.like("output_cache", output_cache, shape, (x.dtype, torch.float32), x.device)
    for name, tensor in (("x", x), ("w1", w1), ("activation_cache", activation_cache)):
        checks.contiguous_last(name, tensor)
    checks.contiguous_last("output_cache", output_cache)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    chosen = dispatch.encode("sparse_mlp", x.device, backend, settings)
    _sparse_mlp(
        x,
        w1,
        b1,
        w2_by_neuron,
        columns.indices,
        columns.counts,
        columns.group_size,
        activation_cache,
        output_cache,
        activation,
        *chosen,
    )
    return output_cache


def group_mean(
    x: Tensor, group_size: int, *, backend: str | None = None, settings: LaunchSettings | None = None
) -> Tensor:
    """Mean of each token group, accumulated in float32.

    Args:
        x: `(B, M, K)` in float16, bfloat16 or float32, last dimension contiguous.
        group_size: consecutive tokens per group.
        backend, settings: as in `dense_attention`.

    Returns:
        `(B, G, K)` in x's dtype; a ragged last group is averaged over the tokens it has.

    Raises:
        ValueError, RuntimeError: as in `sparse_mlp`.
    """
    checks.floating("x", x, 3, "(B, M, K)")
    checks.contiguous_last("x", x)
    checks.positive("group_size", group_size)
    chosen = dispatch.encode("group_mean", x.device, backend, settings)
    return _group_mean(x, group_size, *chosen)


def bias_gelu(
    mid: Tensor, bias: Tensor | None, *, backend: str | None = None, settings: LaunchSettings | None = None
) -> Tensor:
    """Make a neuron-major product the activation cache: `gelu_tanh(mid + bias)`, in place.

    It is not tuned: one pass over memory, which has little to choose.

    Args:
        mid: `(B, F, M)` in float16, bfloat16 or float32, last dimension contiguous.
        bias: `(F,)` in mid's dtype, or None.
        backend, settings: as in `dense_attention`.

    Returns:
        `mid`.

    Raises:
        ValueError, RuntimeError: as in `sparse_mlp`.
    """
    checks.floating("mid", mid, 3, "(B, F, M)")
    checks.contiguous_last("mid", mid)
    if bias is not None:
        checks.like("bias", bias, (mid.shape[1],), (mid.dtype,), mid.device)
    _bias_gelu(mid, bias, *dispatch.encode("bias_gelu", mid.device, backend, settings))
    return mid


@operator("sparse_mlp", mutates=("activation_cache", "output_cache"))
def _sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    activation_cache: Tensor,
    output_cache: Tensor,
    activation: str,
    backend: str,
    settings: str,
) -> None:
    checks.values("x", x)
    checks.column_values(indices, counts, group_size, x.shape[1], w1.shape[0])
    kernel, launch = dispatch.resolve(
        "sparse_mlp",
        x.device,
        backend,
        settings,
        rows=x.shape[1],
        columns=w1.shape[0],
        width=x.shape[2],
        batch=x.shape[0],
        dtype=x.dtype,
        group_size=group_size,
        kept=indices.shape[3],
    )
    columns = ColumnSet(indices.contiguous(), counts.contiguous(), group_size)
    kernel.run(x, w1, b1, w2_by_neuron, columns, activation_cache, output_cache, activation, launch)


@_sparse_mlp.register_fake
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    indices: Tensor,
    counts: Tensor,
    group_size: int,
    activation_cache: Tensor,
    output_cache: Tensor,
    activation: str,
    backend: str,
    settings: str,
) -> None:
    return None


@operator("group_mean")
def _group_mean(x: Tensor, group_size: int, backend: str, settings: str) -> Tensor:
    batch, tokens, width = x.shape
    kernel, launch = dispatch.resolve(
        "group_mean",
        x.device,
        backend,
        settings,
        rows=tokens,
        columns=width,
        width=width,
        batch=batch,
        dtype=x.dtype,
        group_size=group_size,
    )
    return kernel.run(x, group_size, launch)


@_group_mean.register_fake
def _(x: Tensor, group_size: int, backend: str, settings: str) -> Tensor:
    return x.new_empty(x.shape[0], group_count(x.shape[1], group_size), x.shape[2])


@operator("bias_gelu", mutates=("mid",))
def _bias_gelu(mid: Tensor, bias: Tensor | None, backend: str, settings: str) -> None:
    batch, neurons, tokens = mid.shape
    kernel, launch = dispatch.resolve(
        "bias_gelu",
        mid.device,
        backend,
        settings,
        rows=tokens,
        columns=neurons,
        width=neurons,
        batch=batch,
        dtype=mid.dtype,
    )
    kernel.run(mid, bias, launch)


@_bias_gelu.register_fake
def _(mid: Tensor, bias: Tensor | None, backend: str, settings: str) -> None:
    return None


def _check_w2(w2_by_neuron: Tensor, neurons: int, x: Tensor) -> None:
    checks.floating("w2_by_neuron", w2_by_neuron, 2, "(F, Kout)")
    hint = "one row per neuron, that is nn.Linear's weight transposed: weight.t().contiguous()"
    if w2_by_neuron.shape[0] != neurons:
        raise ValueError(
            f"w2_by_neuron: expected {neurons} rows, got shape {tuple(w2_by_neuron.shape)}; it has {hint}"
        )
    checks.like("w2_by_neuron", w2_by_neuron, w2_by_neuron.shape, (x.dtype,), x.device)
    if w2_by_neuron.stride(1) != 1:
        raise ValueError(
            f"w2_by_neuron: expected contiguous rows, got strides {w2_by_neuron.stride()}; it has {hint}"
        )
