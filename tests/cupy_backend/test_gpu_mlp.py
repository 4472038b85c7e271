"""The portable CuPy MLP on a GPU: real sizes, any alignment, repeats, graphs and streams."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy.mlp import SparseMlpSettings, sparse_mlp
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs
from tests.triton_mlp.cases import HALVES, on_side_stream, poisoned_memory, replay
from tests.triton_mlp.test_gpu import masked_dense

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
DEFAULT = SparseMlpSettings()


@pytest.fixture(autouse=True)
def _needs_cupy() -> None:
    pytest.importorskip("cupy")
    assert registry.unavailable("cupy", GPU) is None


def caches(inputs: MlpInputs) -> tuple[Tensor, Tensor]:
    return inputs.activation_cache.clone(), inputs.output_cache.clone()


def call(inputs: MlpInputs, both: tuple[Tensor, Tensor], settings: SparseMlpSettings = DEFAULT) -> None:
    factors = inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron
    sparse_mlp(*factors, inputs.columns, *both, "gelu_tanh", settings)


def check(inputs: MlpInputs, settings: SparseMlpSettings = DEFAULT) -> None:
    got = caches(inputs)
    with poisoned_memory():
        call(inputs, got, settings)
    exact, plain = masked_dense(inputs, torch.float64), masked_dense(inputs, inputs.x.dtype)
    for name, actual, wanted, other in zip(("activations", "output"), got, exact, plain, strict=True):
        assert_within_budget(actual, wanted, other, name, inputs.x.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "group_size"),
    [(3840, 3072, 12288, 128), (4357, 3072, 12288, 128), (1000, 5120, 13824, 192)],
)
def test_real_sizes(tokens: int, width: int, neurons: int, group_size: int, dtype: torch.dtype) -> None:
    check(mlp_inputs(1, tokens, width, neurons, None, group_size, dtype=dtype, device=GPU))


@pytest.mark.parametrize(
    "settings",
    [
        SparseMlpSettings(256, 128, 32, 8, 4, 128, 256, 32, 8, 4, 8),
        SparseMlpSettings(128, 128, 64, 8, 3, 128, 128, 64, 8, 3, 128),
        SparseMlpSettings(64, 64, 64, 4, 2, 64, 64, 32, 4, 4, 32),
    ],
    ids=lambda settings: "-".join(map(str, settings.as_dict().values())),
)
def test_any_settings(settings: SparseMlpSettings) -> None:
    check(mlp_inputs(2, 300, 256, 1024, 384, 128, dtype=torch.bfloat16, device=GPU), settings)


@pytest.mark.parametrize("width", [100, 257])
def test_unaligned_widths(width: int) -> None:
    check(mlp_inputs(1, 131, width, 500, width + 3, 100, dtype=torch.bfloat16, device=GPU))


def test_a_float32_output() -> None:
    inputs = mlp_inputs(1, 300, 256, 1024, 384, 128, dtype=torch.bfloat16, device=GPU)
    check(dataclasses.replace(inputs, output_cache=inputs.output_cache.float() * 1.001))


def test_repeats_graphs_and_streams_are_bit_identical() -> None:
    inputs = mlp_inputs(1, 1000, 512, 2048, dtype=torch.bfloat16, group_size=128, device=GPU)
    first, again, captured, aside = (caches(inputs) for _ in range(4))
    call(inputs, first)
    call(inputs, again)

    def refresh_and_call() -> None:
        captured[0].copy_(inputs.activation_cache)
        captured[1].copy_(inputs.output_cache)
        call(inputs, captured)

    replay(refresh_and_call)
    late = dataclasses.replace(inputs, x=torch.full_like(inputs.x, float("nan")))

    def fill_then_call() -> None:
        late.x.copy_(inputs.x)
        call(late, aside)

    on_side_stream(fill_then_call)
    for other in (again, captured, aside):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
