"""mlp.cu and its host code, run warp by warp on the host, against the masked dense reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy import mlp as ours
from chipmunk_kernels.backends.cupy.mlp import SparseMlpSettings, sparse_mlp
from chipmunk_kernels.backends.cupy.vectors import common_bytes, whole_vectors
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from tests.cupy_backend.warps import Warps
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs, randn
from tests.triton_mlp.cases import poisoned_memory
from tests.triton_mlp.test_mlp import reference

SMALL = SparseMlpSettings(
    up_columns=64, up_tokens=64, up_depth=32, up_stages=2,
    down_tokens=64, down_width=64, down_depth=32, down_stages=4, band=8,
)  # fmt: skip
EIGHT_WARPS = SparseMlpSettings(up_warps=8, down_warps=8)
GPU_LIMITS = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}


@pytest.fixture(autouse=True)
def _on_the_host(host: Warps, monkeypatch: pytest.MonkeyPatch) -> None:
    host.eager = host.backwards = False
    ours._plan.cache_clear()
    ours._kernels.cache_clear()
    monkeypatch.setattr(ours, "load", host.load)
    monkeypatch.setattr(ours, "prepared", host.prepared)
    host.watch(monkeypatch)


def same_place(x: Tensor) -> Tensor:
    """A copy with the strides of `x` and its offset in memory."""
    return x.new_empty(0).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())


def run(inputs: MlpInputs, settings: SparseMlpSettings = SMALL) -> tuple[Tensor, Tensor]:
    """Both caches after the call, the ones given left as they were."""
    caches = same_place(inputs.activation_cache), same_place(inputs.output_cache)
    factors = inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron
    with poisoned_memory():
        sparse_mlp(*factors, inputs.columns, *caches, "gelu_tanh", settings)
    return caches


def check(inputs: MlpInputs, settings: SparseMlpSettings = SMALL) -> None:
    got = run(inputs, settings)
    exact, peer = reference(inputs, torch.float64), reference(inputs, inputs.x.dtype)
    for name, actual, wanted, other in zip(("activations", "output"), got, exact, peer, strict=True):
        assert_within_budget(actual, wanted, other, name, inputs.x.dtype)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(SparseMlpSettings(), torch.bfloat16), (EIGHT_WARPS, torch.float16), (SMALL, torch.bfloat16)],
    ids=["default", "8 warps", "small"],
)
@pytest.mark.parametrize(("tokens", "group_size"), [(193, 64), (39, 7)])
def test_matches_the_reference(
    tokens: int, group_size: int, settings: SparseMlpSettings, dtype: torch.dtype
) -> None:
    """Ragged groups, a batch of two, sizes that no tile divides, one empty and one full group."""
    check(mlp_inputs(2, tokens, 72, 200, 56, group_size, dtype=dtype), settings)


@pytest.mark.parametrize("backwards", [False, True], ids=["first warp ahead", "last warp ahead"])
@pytest.mark.parametrize("eager", [False, True], ids=["late copies", "early copies"])
def test_any_order_of_warps_and_copies(eager: bool, backwards: bool, host: Warps) -> None:
    """Nothing is read before its copy has landed, nor overwritten while a slower warp still reads it."""
    host.eager, host.backwards = eager, backwards
    check(mlp_inputs(1, 130, 300, 400, 72, 128, 0.9, dtype=torch.bfloat16), SMALL)


@pytest.mark.parametrize("band", [1, 2, 32])
def test_any_program_order(band: int) -> None:
    check(mlp_inputs(2, 200, 32, 150, 130, 32, dtype=torch.float16), dataclasses.replace(SMALL, band=band))


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_caches_of_any_alignment(step: int) -> None:
    """Rows of both caches that begin at multiples of 2, 4, 8 or 16 bytes, vectors cut by the last token."""
    inputs = mlp_inputs(1, 52, 40, 90, 52, 24, dtype=torch.bfloat16)
    activations, output = (
        randn(1, rows, 56 + step, dtype=torch.bfloat16, seed=rows)[..., step : 52 + step] for rows in (90, 52)
    )
    aligned = {1: 2, 2: 4, 4: 8, 8: 16}[step]
    assert common_bytes(activations, 24) == common_bytes(output) == aligned
    check(dataclasses.replace(inputs, activation_cache=activations, output_cache=output))


def test_caches_that_begin_elsewhere_with_the_same_strides() -> None:
    """One shape, one set of strides: still two plans, for the vectors differ."""
    inputs = mlp_inputs(1, 52, 40, 90, 56, 24, dtype=torch.bfloat16)
    for shift in (0, 1, 8, 2):
        activations, output = (
            randn(1, rows, 64, dtype=torch.bfloat16, seed=rows)[..., shift : shift + size]
            for rows, size in ((90, 52), (52, 56))
        )
        check(dataclasses.replace(inputs, activation_cache=activations, output_cache=output))
    assert ours._plan.cache_info().misses == 3


def test_groups_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for one group of both batch entries, then for two: the last launch has one left."""
    inputs = mlp_inputs(2, 130, 40, 90, 52, 30, dtype=torch.bfloat16)
    one = 2 * inputs.columns.capacity * 32 * 2
    for room in (0, 2 * one):
        ours._plan.cache_clear()
        monkeypatch.setattr(ours, "SCRATCH_BYTES", room)
        check(inputs)


def test_rows_that_no_vector_is_aligned_to() -> None:
    """x, w1 and w2 of odd widths are copied first."""
    check(mlp_inputs(1, 70, 35, 90, 51, 64, dtype=torch.bfloat16))
    odd = randn(3, 5, dtype=torch.bfloat16)
    copy = whole_vectors(odd)
    assert torch.equal(copy, odd)
    assert common_bytes(copy) == 16
    assert whole_vectors(copy) is copy


def test_a_float32_output_and_no_bias() -> None:
    inputs = mlp_inputs(1, 70, 40, 90, 52, 64, dtype=torch.bfloat16)
    check(dataclasses.replace(inputs, b1=None, output_cache=inputs.output_cache.float() * 1.001))


def test_only_kept_entries_change() -> None:
    inputs = mlp_inputs(1, 130, 72, 100, group_size=64, dtype=torch.float16)
    activations, output = run(inputs)
    tokens = inputs.columns.to_mask(100)[0, 0].repeat_interleave(64, dim=0)[:130].t()
    assert torch.equal(activations[0][~tokens], inputs.activation_cache[0][~tokens])
    assert not torch.equal(activations[0][tokens], inputs.activation_cache[0][tokens])
    assert torch.equal(output[0, :64], inputs.output_cache[0, :64]), "the first group keeps nothing"


def test_the_output_gains_what_the_cache_gains() -> None:
    """A second call with the same input changes nothing: the delta is taken from the value as stored."""
    inputs = mlp_inputs(1, 130, 32, 100, group_size=64, dtype=torch.bfloat16)
    activations, output = run(inputs)
    again = run(dataclasses.replace(inputs, activation_cache=activations, output_cache=output))
    assert torch.equal(again[0], activations)
    assert torch.equal(again[1], output)


def test_gelu_over_its_whole_range() -> None:
    """Activations far out: no overflow, and no lost digits on the negative side."""
    x = torch.linspace(-12, 12, 64).view(1, 64, 1).repeat(1, 1, 16).to(torch.float16) / 16
    inputs = dataclasses.replace(
        mlp_inputs(1, 64, 16, 32, 16, 64, dtype=torch.float16),
        w1=torch.ones(32, 16, dtype=torch.float16), b1=None,
        columns=ColumnSet.full(1, 1, 64, 32, 64),
        activation_cache=torch.zeros(1, 32, 64, dtype=torch.float16),
    )  # fmt: skip
    for factor in (40, 1, 0.5):
        check(dataclasses.replace(inputs, x=x * factor))


def test_a_few_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a video's MLP needs: its packed delta would take gigabytes. Bit for bit as all at once."""
    inputs = mlp_inputs(2, 193, 40, 90, 48, 32, dtype=torch.bfloat16)
    whole = run(inputs)
    monkeypatch.setattr(ours, "SCRATCH_BYTES", 3 * 2 * inputs.columns.capacity * 32 * 2)
    in_parts = run(inputs)
    assert torch.equal(in_parts[0], whole[0])
    assert torch.equal(in_parts[1], whole[1])


def test_no_bank_conflicts(host: Warps) -> None:
    before = host.conflicts
    check(mlp_inputs(1, 64, 72, 100, 64, 64, dtype=torch.bfloat16), SMALL)
    check(mlp_inputs(1, 130, 72, 100, 64, 128, dtype=torch.bfloat16), SparseMlpSettings())
    assert host.conflicts == before


def test_nothing_kept_launches_nothing() -> None:
    inputs = mlp_inputs(1, 64, 32, 40, dtype=torch.bfloat16)
    empty = ColumnSet.from_lists([[[[]]]], 64)
    activations, output = run(dataclasses.replace(inputs, columns=empty))
    assert torch.equal(activations, inputs.activation_cache)
    assert torch.equal(output, inputs.output_cache)


def test_unknown_activation() -> None:
    inputs = mlp_inputs(dtype=torch.bfloat16)
    caches = inputs.activation_cache, inputs.output_cache
    with pytest.raises(ValueError, match=r"activation.*'relu'"):
        sparse_mlp(inputs.x, inputs.w1, None, inputs.w2_by_neuron, inputs.columns, *caches, "relu", SMALL)


def test_the_default_fits_every_gpu() -> None:
    problem = Problem("sparse_mlp", rows=3840, columns=12288, width=3072, density=0.3)
    default = SparseMlpSettings()
    for limit in GPU_LIMITS.values():
        assert default.misfit(problem, limit) is None
    deep = dataclasses.replace(default, up_stages=4)
    assert "shared memory" in str(deep.misfit(problem, GPU_LIMITS["sm_89"]))
    assert deep.misfit(problem, GPU_LIMITS["sm_90"]) is None
    assert "registers" in str(dataclasses.replace(default, down_width=256).misfit(problem))
    assert "64 rows" in str(default.misfit(dataclasses.replace(problem, group_size=64)))


def test_how_warps_share_a_tile() -> None:
    """In parts as near to squares as can be; each has 16 padded rows of scratch."""
    assert ours.Tile(128, 128, 64, 3, 4).warps_across == 2
    assert ours.Tile(128, 256, 32, 4, 8).warps_across == 4
    assert ours.Tile(256, 128, 32, 4, 8).warps_across == 2
    assert ours.Tile(32, 128, 32, 2, 8).warps_across == 4
    assert ours.Tile(128, 128, 64, 3, 4).shared_bytes == 3 * 2 * 128 * 64 * 2 + 6 * 64 * 4
    assert ours.Tile(32, 32, 32, 2, 4).shared_bytes == max(2 * 64 * 32 * 2 + 4 * 32 * 4, 4 * 16 * 24 * 4)


def test_what_the_kernels_take() -> None:
    (kernel,) = ours.KERNELS
    assert kernel.unsupported(torch.bfloat16, 3072) is None
    assert "float32" in str(kernel.unsupported(torch.float32, 3072))
