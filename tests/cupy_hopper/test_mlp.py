"""Hopper's sparse MLP on the host: its blocks as fibers against the masked dense reference; its host code."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source
from chipmunk_kernels.backends.cupy_hopper import mlp, tensor_maps
from chipmunk_kernels.backends.cupy_hopper.mlp import SparseMlpSettings
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from reference.mlp import sparse_mlp as true_mlp
from tests.cupy_backend.emulate import COMPILER
from tests.cupy_hopper.emulate import BulkEmulator as Emulator
from tests.cupy_hopper.emulate import host_map
from tests.factories import MlpInputs, assert_within_budget, mlp_inputs
from tests.triton_mlp.cases import poisoned_memory

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ or clang++")
BF16, FP16 = torch.bfloat16, torch.float16
SMALL = SparseMlpSettings(width=128, stages=3, band=1, lead_waves=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulated binaries are; one compilation serves all cases with the same tiles."""
    return tmp_path_factory.mktemp("emulated")


def caches(inputs: MlpInputs) -> tuple[Tensor, Tensor]:
    return inputs.activation_cache.clone(), inputs.output_cache.clone()


def call(inputs: MlpInputs, activations: Tensor, output: Tensor, settings: SparseMlpSettings = SMALL) -> None:
    mlp.sparse_mlp(
        inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron, inputs.columns, activations, output,
        "gelu_tanh", settings,
    )  # fmt: skip


@contextmanager
def emulating(emulator: Emulator) -> Iterator[None]:
    """Within, launches run on the host, and scratch starts as NaN."""
    used: dict[int, Tensor] = {}
    mlp._plan.cache_clear()
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        patch.setattr(mlp, "load", emulator.load)
        patch.setattr(mlp, "prepared", emulator.prepared)
        patch.setattr(tensor_maps, "_encode", host_map)
        patch.setattr(mlp, "_multiprocessors", lambda device: emulator.blocks)
        patch.setattr(mlp, "_counters", lambda count, device: used.setdefault(count, zeros(count)))
        tensor_maps._map.cache_clear()
        yield
        for counters in used.values():
            assert not bool(counters.any()), "the next launch would find counters that are not nought"
    mlp._plan.cache_clear()
    tensor_maps._map.cache_clear()


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def emulated(emulator: Emulator, inputs: MlpInputs, settings: SparseMlpSettings) -> tuple[Tensor, Tensor]:
    """Both caches after an emulated call."""
    results = caches(inputs)
    with emulating(emulator):
        call(inputs, *results, settings)
    return results


def check(inputs: MlpInputs, got: tuple[Tensor, Tensor]) -> None:
    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w1, b1, w2 = (
            None if t is None else t.to(dtype) for t in (inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron)
        )
        output = inputs.output_cache.to(torch.promote_types(dtype, inputs.output_cache.dtype))
        lists = inputs.columns.indices, inputs.columns.counts, inputs.columns.group_size
        return true_mlp(x, w1, b1, w2, *lists, inputs.activation_cache.to(dtype), output)

    exact, peer = reference(torch.float64), reference(inputs.x.dtype)
    for name, actual, wanted, other in zip(("activations", "output"), got, exact, peer, strict=True):
        assert_within_budget(actual, wanted, other, name, inputs.x.dtype)


CASES: dict[str, tuple[dict[str, Any], SparseMlpSettings]] = {
    "default tiles": (
        {
            "tokens": 300,
            "width": 64,
            "neurons": 700,
            "width_out": 264,
            "group_size": 128,
            "density": 0.5,
            "dtype": BF16,
        },
        SparseMlpSettings(band=1, lead_waves=1),
    ),
    "ragged depth, small groups": (
        {
            "batch": 3,
            "tokens": 131,
            "width": 72,
            "neurons": 150,
            "width_out": 136,
            "group_size": 64,
            "dtype": FP16,
        },
        SMALL,
    ),
    "groups that are no multiple of 8": (
        {
            "batch": 2,
            "tokens": 200,
            "width": 200,
            "neurons": 300,
            "width_out": 72,
            "group_size": 100,
            "dtype": BF16,
        },
        SparseMlpSettings(width=128, stages=3, band=2, lead_waves=1),
    ),
    "groups of two tiles": (
        {
            "tokens": 400,
            "width": 64,
            "neurons": 300,
            "width_out": 200,
            "group_size": 256,
            "density": 1.0,
            "dtype": BF16,
        },
        SparseMlpSettings(width=192, band=1, lead_waves=1, adds_in_l2=0),
    ),
    "one tile and a half a group": (
        {"tokens": 400, "width": 8, "neurons": 300, "width_out": 8, "group_size": 192, "dtype": FP16},
        SMALL,
    ),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, folder: Path) -> None:
    shape, settings = CASES[name]
    inputs = mlp_inputs(**shape)
    check(inputs, emulated(Emulator(folder, 2), inputs, settings))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("adds_in_l2", [0, 1])
def test_wide_output_and_no_bias(adds_in_l2: int, folder: Path) -> None:
    inputs = mlp_inputs(2, 150, 40, 200, 200, 128, dtype=BF16)
    inputs = dataclasses.replace(inputs, b1=None, output_cache=inputs.output_cache.float())
    settings = dataclasses.replace(SMALL, adds_in_l2=adds_in_l2)
    check(inputs, emulated(Emulator(folder, 2), inputs, settings))


@needs_compiler
@pytest.mark.slow
def test_strided_caches_keep_what_is_not_theirs(folder: Path) -> None:
    inputs = mlp_inputs(1, 150, 40, 200, 64, 128, dtype=BF16)
    wide = torch.full((1, 200, 160), 7.0, dtype=BF16)
    wide[..., :150] = inputs.activation_cache
    activations, output = wide[..., :150], inputs.output_cache.clone()
    with emulating(Emulator(folder, 1)):
        call(inputs, activations, output)
    check(inputs, (activations, output))
    assert bool((wide[..., 150:] == 7.0).all())


@needs_compiler
@pytest.mark.slow
def test_caches_that_begin_elsewhere_with_the_same_strides(folder: Path) -> None:
    """One shape, one set of strides: still other plans, for 16-byte stores need aligned rows."""
    inputs = mlp_inputs(1, 150, 40, 200, 64, 128, dtype=BF16)
    with emulating(Emulator(folder, 2)):
        for shift in (0, 1, 8):
            activations = torch.zeros(1, 200, 168, dtype=BF16)[..., shift : 150 + shift]
            output = torch.zeros(1, 150, 80, dtype=BF16)[..., shift : 64 + shift]
            activations.copy_(inputs.activation_cache)
            output.copy_(inputs.output_cache)
            call(inputs, activations, output)
            check(inputs, (activations, output))
        assert mlp._plan.cache_info().misses == 2


@needs_compiler
@pytest.mark.slow
def test_a_batch_that_shares_its_tokens_is_copied(folder: Path) -> None:
    inputs = mlp_inputs(2, 150, 40, 200, 64, 128, dtype=BF16)
    inputs = dataclasses.replace(inputs, x=inputs.x[:1].expand_as(inputs.x))
    check(inputs, emulated(Emulator(folder, 2), inputs, SMALL))


@needs_compiler
@pytest.mark.slow
def test_any_order_gives_the_same_bits(folder: Path) -> None:
    """Bands of one group and a lead of one: the ring of three groups is reused by every later one."""
    inputs = mlp_inputs(2, 900, 32, 200, 160, 128, 0.7, dtype=BF16)
    assert mlp.order(SMALL, 16, inputs.columns.capacity, 160, 128, 1).ring < 16
    results = [emulated(Emulator(folder, 1 + seed, seed), inputs, SMALL) for seed in range(4)]
    check(inputs, results[0])
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@needs_compiler
@pytest.mark.slow
def test_empty_groups_between_two_that_share_a_place(folder: Path) -> None:
    """A place in the ring is free when the last group that had one there has been read, however far back."""
    inputs = mlp_inputs(1, 1000, 8, 700, 520, 128, 0.95, dtype=BF16)
    columns = inputs.columns
    ring = mlp.order(SMALL, columns.groups, columns.capacity, 520, 128, 2).ring
    assert 2 * ring < columns.groups
    some = torch.arange(columns.groups) % (2 * ring) == 1
    counts = torch.where(some, columns.counts, 0)
    inputs = dataclasses.replace(inputs, columns=dataclasses.replace(columns, counts=counts))
    for seed in range(4):
        check(inputs, emulated(Emulator(folder, 2, seed), inputs, SMALL))


@needs_compiler
@pytest.mark.slow
def test_counts_past_the_capacity_end_there(folder: Path) -> None:
    inputs = mlp_inputs(1, 150, 40, 200, 64, 128, 0.8, uniform=True, dtype=BF16)
    columns = inputs.columns
    over = dataclasses.replace(columns, counts=columns.counts + 300)
    check(inputs, emulated(Emulator(folder, 2), dataclasses.replace(inputs, columns=over), SMALL))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "broken"),
    [
        (
            "barrier_init(shared.empty(i), CONSUMER_WARPS)",
            "barrier_init(shared.empty(i), CONSUMER_WARPS + 1)",
        ),
        ("p.down_blocks * CONSUMERS", "p.down_blocks * CONSUMERS + 1"),
    ],
)
def test_the_emulator_sees_a_deadlock(
    line: str, broken: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (mlp.FOLDER / "mlp.cu").read_text()
    assert line in text
    (tmp_path / "mlp.cu").write_text(text.replace(line, broken))
    right = mlp.source
    monkeypatch.setattr(mlp, "source", lambda *given: Source("mlp.cu", right(*given).defines, tmp_path))
    inputs = mlp_inputs(1, 900, 256, 200, 64, 128, 0.9, dtype=BF16)
    with pytest.raises(AssertionError, match="deadlock"):
        emulated(Emulator(folder, 2), inputs, SMALL)


def test_counters_are_kept_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: dict[int, tuple[int, int, int]] = {}
    streams, device = [7], torch.device("cuda:0")

    def clear(address: int, value: int, size: int, on: int) -> None:
        cleared[address] = (value, size, on)

    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(malloc=lambda size: 4096 + len(cleared), memsetAsync=clear)
    cupy.cuda = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: streams[index], raising=False)
    mlp._own_counters.cache_clear()
    try:
        first = mlp._counters(62, device)
        assert first == mlp._counters(40, device) == mlp._counters(64, device)
        assert cleared == {first: (0, 64 * 4, 7)}
        assert mlp._counters(65, device) != first
        streams[0] = 8
        assert mlp._counters(62, device) != first
        assert sorted(cleared.values()) == [(0, 256, 7), (0, 256, 8), (0, 512, 7)]
    finally:
        mlp._own_counters.cache_clear()


def test_nothing_to_do() -> None:
    inputs = mlp_inputs(1, 100, 64, 128, dtype=BF16)
    indices = torch.empty(1, 1, 2, 0, dtype=torch.int32)
    none = ColumnSet(indices, torch.zeros(1, 1, 2, dtype=torch.int32), 64)
    results = caches(inputs)
    call(dataclasses.replace(inputs, columns=none), *results)
    assert torch.equal(results[0], inputs.activation_cache)
    assert torch.equal(results[1], inputs.output_cache)


def test_what_it_cannot_run() -> None:
    inputs = mlp_inputs(1, 100, 64, 128, dtype=BF16)
    with pytest.raises(ValueError, match="gelu_tanh"):
        mlp.sparse_mlp(
            inputs.x, inputs.w1, inputs.b1, inputs.w2_by_neuron, inputs.columns, *caches(inputs),
            "relu", SMALL,
        )  # fmt: skip
    narrow = mlp_inputs(1, 100, 64, 128, 100, dtype=BF16)
    with pytest.raises(ValueError, match=r"whole 16 bytes.* widths 64 and 100"):
        call(narrow, *caches(narrow))
    shifted = dataclasses.replace(inputs, x=torch.zeros(1, 100, 72, dtype=BF16)[..., 1:65])
    with pytest.raises(ValueError, match="whole 16 bytes"):
        call(shifted, *caches(inputs))
    kernel = mlp.KERNELS[0]
    assert "float32" in str(kernel.unsupported(torch.float32, 64))
    assert "multiples of 8" in str(kernel.unsupported(BF16, 100))
    assert kernel.unsupported(FP16, 3072) is None


def test_settings_that_do_not_fit() -> None:
    flux = Problem("sparse_mlp", rows=3840, columns=12288, width=3072, density=0.3)
    for settings in (SparseMlpSettings(), *SparseMlpSettings.presets()):
        assert settings.misfit(flux) is None
    assert "shared memory" in str(SparseMlpSettings(stages=5).misfit(flux))
    assert "registers" in str(SparseMlpSettings(width_warpgroups=2).misfit(flux))
    small = dataclasses.replace(flux, group_size=64)
    assert "64 tokens" in str(SparseMlpSettings().misfit(small))
    assert mlp.fitted(SparseMlpSettings(), 64).misfit(small) is None
    for values in (dataclasses.asdict(SparseMlpSettings()), dataclasses.asdict(SMALL)):
        assert SparseMlpSettings.from_mapping(values).misfit(flux) is None


@pytest.mark.parametrize("kept", [1280, 2560, 3584, 12288])
@pytest.mark.parametrize("tokens", [3840, 119056])
def test_scratch_is_small_however_long_the_sequence(tokens: int, kept: int) -> None:
    settings = SparseMlpSettings()
    rows = -(-tokens // 128)
    order = mlp.order(settings, rows, kept, 3072, 128, 132)
    up_blocks = -(-kept // 256)
    assert order.packed_elements == order.ring * order.parts * up_blocks * 256 * 128
    assert 2 * order.packed_elements <= mlp.RING_BYTES <= 64 << 20
    # A down tile of a band comes more than a wave of tiles after the band's up tiles, if there are that many.
    across = order.band * order.parts
    assert order.lead * across * up_blocks >= min(132, rows * order.parts * up_blocks)
    # And an up tile more than a wave after the down tiles that read what was in its place.
    assert (order.ring // order.band - order.lead - 1) * across * (
        up_blocks + 12
    ) >= 132 or order.ring == rows
