"""The sparse MLP kernels against the masked dense reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.triton import launch, mlp
from chipmunk_kernels.backends.triton.mlp import SparseMlpSettings, sparse_mlp
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from reference.mlp import sparse_mlp as true_mlp
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs, scattered_columns
from tests.triton_mlp.cases import DEVICE, DTYPES, poisoned_memory

SMALL = SparseMlpSettings(
    up_columns=64, up_tokens=64, up_depth=32, up_warps=4,
    down_tokens=64, down_width=64, down_depth=32, down_warps=4, band=8,
)  # fmt: skip


def reference(inputs: MlpInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    def cast(x: Tensor) -> Tensor:
        return x.to(dtype)

    return true_mlp(
        cast(inputs.x), cast(inputs.w1), None if inputs.b1 is None else cast(inputs.b1),
        cast(inputs.w2_by_neuron), inputs.columns.indices, inputs.columns.counts, inputs.columns.group_size,
        cast(inputs.activation_cache), cast(inputs.output_cache),
    )  # fmt: skip


def run(inputs: MlpInputs, settings: SparseMlpSettings = SMALL) -> tuple[Tensor, Tensor]:
    """Both caches after the call, the ones given left as they were (copies keep their strides)."""
    caches = inputs.activation_cache.clone(), inputs.output_cache.clone()
    with poisoned_memory():
        sparse_mlp(
            inputs.x,
            inputs.w1,
            inputs.b1,
            inputs.w2_by_neuron,
            inputs.columns,
            *caches,
            "gelu_tanh",
            settings,
        )
    return caches


def check(inputs: MlpInputs, settings: SparseMlpSettings = SMALL) -> None:
    got = run(inputs, settings)
    exact, peer = reference(inputs, torch.float64), reference(inputs, inputs.x.dtype)
    for name, actual, wanted, other in zip(("activations", "output"), got, exact, peer, strict=True):
        assert_within_budget(actual, wanted, other, name, inputs.x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "group_size"), [(193, 64), (193, 50), (39, 7), (193, 300)])
def test_matches_the_reference(tokens: int, group_size: int, dtype: torch.dtype) -> None:
    """Ragged groups, a batch of two, sizes that no tile divides, one empty and one full group."""
    check(mlp_inputs(2, tokens, 72, 200, 56, group_size, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("band", [8, 32, 128])
def test_any_program_order(band: int) -> None:
    settings = dataclasses.replace(SMALL, band=band)
    check(mlp_inputs(1, 200, 32, 150, 130, 16, device=DEVICE), settings)


@pytest.mark.parametrize("whole", [0, 3, 7])
def test_halved_tiles(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any tile on, whatever its group keeps."""
    monkeypatch.setattr(mlp, "_whole_tiles", lambda tiles, batch, wave: min(whole, tiles))
    check(mlp_inputs(2, 193, 72, 300, 56, 64, device=DEVICE))


def test_which_tiles_are_halved() -> None:
    """On 132 multiprocessors: 420 tiles leave 24 after three waves, whose halves fit one; 96 do not."""
    tiles = (420, 360, 264, 100, 150)
    assert [mlp._whole_tiles(count, 1, 132) for count in tiles] == [396, 360, 264, 100, 132]
    assert mlp._whole_tiles(420, 2, 132) == 420


@pytest.mark.parametrize(
    ("dtype", "major", "cap"), [(torch.float16, 9, 128), (torch.float16, 8, None), (torch.float32, 9, None)]
)
def test_no_cap_where_operands_take_registers(
    dtype: torch.dtype, major: int, cap: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: launches.append(options)

    monkeypatch.setattr(launch, "_capability", lambda device: major)
    monkeypatch.setattr(mlp, "up_kernel", Recorder())
    monkeypatch.setattr(mlp, "down_kernel", Recorder())
    run(mlp_inputs(1, 64, 64, 64, dtype=dtype, device=DEVICE), SparseMlpSettings(up_registers=128))
    assert [options["maxnreg"] for options in launches if "maxnreg" in options] == [cap]


def test_groups_at_once_fill_the_last_wave() -> None:
    """73 groups of 14 tiles fit the scratch memory; 66 of them are seven waves of 132 to the last tile."""
    assert mlp._groups_at_once(930, 3584 * 128 * 2, 14, 132) == 66
    assert mlp._groups_at_once(30, 3584 * 128 * 2, 14, 132) == 30
    assert mlp._groups_at_once(5, mlp.SCRATCH_BYTES * 2, 14, 132) == 1


def test_a_few_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a video's MLP needs: its packed delta would take gigabytes. Bit for bit as all at once."""
    inputs = mlp_inputs(2, 193, 40, 90, 48, 32, device=DEVICE)
    whole = run(inputs)
    monkeypatch.setattr(mlp, "SCRATCH_BYTES", 3 * 2 * inputs.columns.capacity * 32 * 4)
    in_parts = run(inputs)
    assert torch.equal(in_parts[0], whole[0])
    assert torch.equal(in_parts[1], whole[1])


def test_default_settings() -> None:
    check(mlp_inputs(1, 130, 64, 160, group_size=128, device=DEVICE), SparseMlpSettings())


def test_without_bias_and_with_strided_operands() -> None:
    """Weights and activations as slices of wider tensors, as a fused projection stores them."""
    inputs = mlp_inputs(2, 100, 40, 90, 48, 64, device=DEVICE)
    wide = {name: torch.cat([getattr(inputs, name)] * 2, dim=-1) for name in ("x", "w1", "w2_by_neuron")}
    sliced = {name: x[..., : x.shape[-1] // 2] for name, x in wide.items()}
    assert not any(x.is_contiguous() for x in sliced.values())
    check(dataclasses.replace(inputs, b1=None, **sliced))


def test_float32_output_cache() -> None:
    inputs = mlp_inputs(1, 100, 40, 90, 48, 64, dtype=torch.float16, device=DEVICE)
    inputs = dataclasses.replace(inputs, output_cache=inputs.output_cache.float())
    _, output = run(inputs)
    assert output.dtype == torch.float32
    exact, peer = reference(inputs, torch.float64)[1], reference(inputs, torch.float16)[1]
    assert_within_budget(output, exact, peer, dtype=torch.float16)


def test_what_is_not_kept_does_not_change() -> None:
    inputs = mlp_inputs(1, 130, 32, 100, group_size=64, dtype=torch.float16, device=DEVICE)
    activations, output = run(inputs)
    tokens = inputs.columns.to_mask(100)[0, 0].repeat_interleave(64, dim=0)[:130].t()
    assert torch.equal(activations[0][~tokens], inputs.activation_cache[0][~tokens])
    assert not torch.equal(activations[0][tokens], inputs.activation_cache[0][tokens])
    assert torch.equal(output[0, :64], inputs.output_cache[0, :64]), "the first group keeps nothing"


def test_the_output_gains_what_the_cache_gains() -> None:
    """A second call with the same input changes nothing: the delta is taken from the value as stored."""
    inputs = mlp_inputs(1, 130, 32, 100, group_size=64, dtype=torch.float16, device=DEVICE)
    activations, output = run(inputs)
    again = run(dataclasses.replace(inputs, activation_cache=activations, output_cache=output))
    assert torch.equal(again[0], activations)
    assert torch.equal(again[1], output)


def test_all_neurons_kept_is_the_dense_mlp() -> None:
    inputs = mlp_inputs(1, 130, 32, 100, group_size=64, device=DEVICE)
    inputs = dataclasses.replace(
        inputs,
        columns=ColumnSet.full(1, 1, 130, 100, 64, DEVICE),
        activation_cache=torch.zeros_like(inputs.activation_cache),
        output_cache=torch.zeros_like(inputs.output_cache),
    )
    dense = torch.nn.functional.gelu(inputs.x @ inputs.w1.t() + inputs.b1, approximate="tanh")
    activations, output = run(inputs)
    torch.testing.assert_close(activations, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, dense @ inputs.w2_by_neuron, rtol=1e-5, atol=1e-5)


def test_gelu_over_its_whole_range() -> None:
    """Activations far out: no overflow, and no lost digits on the negative side."""
    x = torch.linspace(-12, 12, 96, device=DEVICE).view(1, 96, 1).repeat(1, 1, 16) / 16
    inputs = dataclasses.replace(
        mlp_inputs(1, 96, 16, 32, 16, 96, device=DEVICE),
        x=x * 40, w1=torch.ones(32, 16, device=DEVICE), b1=None,
        columns=scattered_columns(1, 1, 96, 32, 96, 0.5, uniform=True, device=DEVICE),
        activation_cache=torch.zeros(1, 32, 96, device=DEVICE),
    )  # fmt: skip
    for scale in (1.0, 1 / 40, 1 / 80):
        check(dataclasses.replace(inputs, x=inputs.x * scale))
    activations, output = run(inputs)
    assert activations.isfinite().all()
    assert output.isfinite().all()


def test_unknown_activation() -> None:
    inputs = mlp_inputs(device=DEVICE)
    caches = inputs.activation_cache, inputs.output_cache
    with pytest.raises(ValueError, match=r"activation.*'relu'"):
        sparse_mlp(inputs.x, inputs.w1, None, inputs.w2_by_neuron, inputs.columns, *caches, "relu", SMALL)


def test_settings_say_what_does_not_fit() -> None:
    problem = Problem("sparse_mlp", rows=3840, columns=12288, width=3072, density=0.3)
    default = SparseMlpSettings()
    assert default.misfit(problem, 99 * 1024) is None
    assert "shared memory" in str(
        dataclasses.replace(default, up_stages=4, up_depth=128).misfit(problem, 99 * 1024)
    )
    assert "registers" in str(dataclasses.replace(default, down_width=256, down_warps=4).misfit(problem))
    assert "spill" in str(dataclasses.replace(default, up_columns=256, up_registers=128).misfit(problem))
    narrow = dataclasses.replace(problem, group_size=64)
    assert "64 rows" in str(default.misfit(narrow))
