"""On a CPU without 16-bit products all are made in float32: PyTorch's own would take 200 times as long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chipmunk_kernels.backends.torch import attention, mlp
from chipmunk_kernels.backends.torch import products as products_module
from chipmunk_kernels.backends.torch.attention import MOST_SCRATCH_BYTES
from chipmunk_kernels.backends.torch.products import fused_dtype, product_dtype
from reference import attention as reference
from tests.factories import assert_within_budget, attention_inputs, mlp_inputs, randn, scattered_columns

HALVES = (torch.bfloat16, torch.float16)


class Products(TorchDispatchMode):
    """Collects the types of matrices that are multiplied, or attended by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if "mm" in name or "flash_attention_for_cpu" in name:
            self.dtypes |= {each.dtype for each in args if isinstance(each, Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["own", "float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype | None]:
    """A CPU that multiplies 16-bit matrices, and one that does not: the type that the latter computes in."""
    wide = torch.float32 if request.param else None
    for module in (attention, mlp):
        monkeypatch.setattr(module, "product_dtype", lambda dtype, device: wide or dtype)
    monkeypatch.setattr(attention, "fused_dtype", lambda dtype: wide or dtype)
    yield wide


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("based", [False, True])
def test_attention(dtype: torch.dtype, based: bool, products: torch.dtype | None) -> None:
    q, k, v = attention_inputs(1, 2, 193, width=32, dtype=dtype)
    columns, base = scattered_columns(1, 2), torch.full_like(q, 2.0) if based else None

    def call(convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        below = None if base is None else convert(base)
        return attention.sparse_attention(
            convert(q), convert(k), convert(v), columns, below, 1, 0.2, attention.SparseSettings()
        )

    with Products() as seen:
        out, lse = call(lambda tensor: tensor)
        dense, _ = attention.dense_attention(q, k, v, 190, 0.2, attention.DenseSettings())
    assert seen.dtypes == {products or dtype}
    assert out.dtype == dense.dtype == dtype
    assert bool(dense.isfinite().all())
    if products is not None:
        exact_out, exact_lse = call(Tensor.float)
        assert torch.equal(out, exact_out.to(dtype))
        assert torch.equal(lse, exact_lse)


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [(torch.float32, True), *((half, fused) for half in HALVES for fused in (False, True))],
)
@pytest.mark.parametrize("scratch_bytes", [MOST_SCRATCH_BYTES, 1])
def test_sparse_attention_is_right_fused_or_in_blocks_at_once_or_in_parts(
    dtype: torch.dtype, fused: bool, scratch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever this CPU would take by itself; 1 byte of scratch makes parts of 1024 columns."""
    monkeypatch.setattr(attention, "product_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(attention, "MOST_SCRATCH_BYTES", scratch_bytes)
    q, k, v = attention_inputs(1, 2, 193, 1500, width=64, dtype=dtype, strided=True)
    columns = scattered_columns(1, 2, 193, 1500, 64, 0.8, uniform=False)
    base = randn(*q.shape, dtype=dtype, seed=5)
    for below, sign in ((None, -1), (base, 1), (base, -1)):
        settings = attention.SparseSettings(fused=fused)
        out, lse = attention.sparse_attention(q, k, v, columns, below, sign, 0.125, settings)
        chosen = columns.indices, columns.counts, 64
        truth = reference.sparse_attention(
            q.double(), k.double(), v.double(), *chosen, None if below is None else below.double(), sign
        )
        peer = reference.sparse_attention(q, k, v, *chosen, below, sign)
        assert_within_budget(out, truth[0], peer[0])
        assert_within_budget(lse, truth[1], peer[1], "lse")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mlp(dtype: torch.dtype, products: torch.dtype | None) -> None:
    inputs = mlp_inputs(1, 193, 64, 256, dtype=dtype)
    caches = inputs.activation_cache.clone(), inputs.output_cache.clone()
    given = inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron
    with Products() as seen:
        mlp.sparse_mlp(*given, inputs.columns, *caches, "gelu_tanh", mlp.SparseMlpSettings())
    assert seen.dtypes == {products or dtype}
    assert all(cache.dtype == dtype and bool(cache.isfinite().all()) for cache in caches)
    assert not torch.equal(caches[1], inputs.output_cache)
    if products is not None:  # the new activations are those of a float32 computation, rounded once
        wide = inputs.activation_cache.float(), inputs.output_cache.float()
        mlp.sparse_mlp(
            *(each.float() for each in given), inputs.columns, *wide, "gelu_tanh", mlp.SparseMlpSettings()
        )
        assert torch.equal(caches[0], wide[0].to(dtype))


def test_only_half_precision_on_a_cpu_is_computed_in_another_type() -> None:
    assert product_dtype(torch.float32, "cpu") == torch.float32
    assert product_dtype(torch.float64, "cpu") == torch.float64
    for dtype in HALVES:
        assert product_dtype(dtype, "cuda") == dtype
        assert product_dtype(dtype, "cpu") in (dtype, torch.float32)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mkl", [False, True])
def test_the_fused_kernel_takes_bfloat16_where_a_library_multiplies_it(
    own: bool, mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "product_dtype", lambda dtype, _: dtype if own else torch.float32)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert fused_dtype(torch.float32) == torch.float32
    assert fused_dtype(torch.bfloat16) == (torch.bfloat16 if own or mkl else torch.float32)
    assert fused_dtype(torch.float16) == (torch.float16 if own else torch.float32)
