"""select.cu and its host code, run warp by warp on the host, against the reference's sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk_kernels.backends.cupy import select
from chipmunk_kernels.backends.cupy.select import SelectSettings, make_plan, topk_columns
from chipmunk_kernels.backends.cupy.vectors import common_bytes
from chipmunk_kernels.problem import Problem
from reference import select as truth
from tests.cupy_backend.nvrtc import compile_for, usage
from tests.cupy_backend.test_sass import instructions
from tests.cupy_backend.warps import Warps
from tests.factories import randn
from tests.triton_mlp.cases import poisoned_memory
from tests.triton_select import cases

GROUP_SIZE = 100
KEEP = ((3, 9), (200, 210))
SMALL = SelectSettings(threads=64, sample=256)
"""Several tiles to each warp."""


@pytest.fixture(autouse=True)
def _on_the_host(host: Warps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "load", host.load)
    monkeypatch.setattr(select, "prepared", host.prepared)
    monkeypatch.setattr(select, "_calls", select._calls.__wrapped__)
    host.watch(monkeypatch)


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some thousand columns count as long: a sample decides what is listed."""
    monkeypatch.setattr(select, "LISTED_WHOLE", 512)
    monkeypatch.setattr(select, "DEPENDENT", 1)


def awkward(*shape: int, seed: int = 0) -> Tensor:
    return cases.awkward_scores(*shape, seed=seed).cpu()


def check(
    scores: Tensor,
    k: int,
    random: int = 0,
    keep: Sequence[tuple[int, int]] = (),
    window: int = 0,
    length: int | None = None,
    seed: int = 12345,
    settings: SelectSettings = SMALL,
) -> None:
    """Select, and compare with the reference; memory that is not written shows."""
    columns = scores.shape[3]
    length = columns if length is None else length
    always = cases.always_mask(scores.shape[2], columns, GROUP_SIZE, keep, window, length)
    kept = 0 if always is None else int(always.sum(-1).max())
    capacity = min(length, kept + k + random)
    with poisoned_memory():
        got = topk_columns(
            scores, k, None if always is None else always.cpu(), random, seed, length, capacity, settings
        )
    expected = truth.topk_columns(scores, k, GROUP_SIZE, keep, window, random, seed, length)
    cases.assert_same_columns(got, expected, max(columns, 1))
    padding = torch.arange(capacity) >= got[1].unsqueeze(-1)
    assert not got[0][padding].any()


@pytest.mark.parametrize(
    ("k", "random"), [(0, 0), (1, 0), (20, 7), (0, 5), (250, 20), (300, 300), (284, 1), (290, 0)]
)
@pytest.mark.parametrize("columns", [300, 2100])
def test_matches_the_reference(k: int, random: int, columns: int) -> None:
    """k and random from nothing to more than there is, beside kept ranges, a window and a key length."""
    check(awkward(1, 2, 2, columns, seed=k), k, random, KEEP, 4, columns - 10)


@pytest.mark.parametrize(
    ("dtype", "stride", "vector"),
    [
        (torch.float32, 1200, 16),
        (torch.float32, 1201, 4),
        (torch.bfloat16, 1200, 16),
        (torch.float16, 1201, 2),
    ],
    ids=str,
)
def test_every_score_dtype_and_stride(dtype: torch.dtype, stride: int, vector: int) -> None:
    scores = awkward(2, 1, 3, stride, seed=3).to(dtype)[..., :1199]
    assert common_bytes(scores) == vector
    check(scores, 131, 9, KEEP, 4)


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("backwards", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("threads", [64, 160])
def test_ordinary_rows_are_read_once(threads: int, backwards: bool, host: Warps) -> None:
    """Whichever warp runs ahead; with kept columns that would crowd the list, were they counted."""
    host.backwards = backwards
    try:
        scores = randn(2, 2, 3, 4096)
        scores[..., 200:1200] += 10.0
        before = host.streamed_bytes
        check(scores, 200, 40, [(200, 1200)], 4, settings=SelectSettings(threads=threads, sample=512))
    finally:
        host.backwards = False
    assert host.streamed_bytes - before == 4 * scores.numel()


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize(
    ("k", "random", "length"), [(150, 0, 3000), (150, 33, 2999), (1, 1, 3000), (0, 90, 3000)]
)
def test_long_rows(k: int, random: int, length: int) -> None:
    """Smooth scores, which the sample serves, and awkward ones, which it does not: the same exact answer."""
    for scores in (randn(1, 2, 2, 3000, seed=k), awkward(1, 2, 2, 3000, seed=k)):
        check(scores, k, random, KEEP, 4, length)


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("misleading", ["ties", "zeros", "nan", "hidden", "infinite", "sampled"])
def test_what_misleads_the_sample_is_read_again(misleading: str, host: Warps) -> None:
    """Too many reach the floor, or too few: all equal, both zeros, next to no numbers, fewer than wanted."""
    scores = randn(1, 1, 1, 3072)
    if misleading == "ties":
        scores[:] = 0.25
    elif misleading == "zeros":
        scores[:] = 0.0
        scores[..., ::3] = -0.0
        scores[..., ::7] = -1.0
    elif misleading == "infinite":
        scores[..., ::2] = math.inf
        scores[..., 1::4] = -math.inf
    elif misleading == "sampled":
        # Where the sample looks the best of all stand, and nowhere else anything.
        scores[:] = -5.0
        scores[..., 2048:2304] = 7.0
        scores[..., torch.arange(3072) % 96 < 40] = 9.0
    else:
        scores[..., (10 if misleading == "nan" else 149) :] = math.nan
    before = host.streamed_bytes
    check(scores, 150, 20)
    assert host.streamed_bytes - before > 2 * 4 * scores.numel()


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("keep", [(), [(900, 1500)]], ids=["scores", "kept"])
def test_equal_scores_at_the_edge_go_to_the_lower_columns(
    keep: Sequence[tuple[int, int]], host: Warps
) -> None:
    """The list alone decides them, in whichever tile the last one taken is."""
    scores = (randn(1, 3, 2, 4096) * 8).round() / 8
    before = host.streamed_bytes
    for k in (150, 170, 190):
        check(scores, k, 10, keep)
    assert host.streamed_bytes - before == 3 * 4 * scores.numel()
    check(torch.zeros(1, 1, 1, 3000), 1500)


def test_more_than_a_list_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the scores nor the extras fit what shared memory is left: every pass reads the row."""
    monkeypatch.setattr(select, "shared_limit", lambda device: 7500)
    for k, random in ((1500, 900), (1500, 0), (2, 900)):
        plan = make_plan(3000, k, 0, random, 256, 64, 7500)
        assert plan is not None and plan.lots_room == 0
        assert plan.room == 0
        check(awkward(1, 1, 2, 3000, seed=k), k, random, KEEP, 4, 2990)


def test_rows_too_long_for_the_marks_go_to_torch(monkeypatch: pytest.MonkeyPatch, host: Warps) -> None:
    monkeypatch.setattr(select, "shared_limit", lambda device: 2000)
    monkeypatch.setattr(select, "prepared", None)
    check(awkward(1, 1, 2, 300), 20, 5, KEEP)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, -1])
def test_the_hash_is_the_reference_bit_for_bit(seed: int) -> None:
    """The draw of extras depends on every bit of the hash through its order; scores play no part here."""
    check(torch.zeros(2, 2, 2, 1130), 0, 17, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_hash_of_far_columns(dtype: torch.dtype) -> None:
    """Past column 65536 the hash folds other bits; without scores to read, any row is short."""
    scores = torch.zeros(1, 1, 1, 70_000, dtype=dtype)
    indices, counts = topk_columns(scores, 0, None, 300, 5, 70_000, 300, SMALL)
    assert counts.tolist() == [[[300]]]
    hashes = sorted(((truth.extras_hash(5, 0, 0, 0, n), n) for n in range(70_000)), reverse=True)
    assert indices.flatten().tolist() == sorted(n for _, n in hashes[:300])


def test_strided_scores() -> None:
    scores = awkward(2, 2, 2, 1100, seed=5)
    check(scores.transpose(1, 2).contiguous().transpose(1, 2), 20)
    check(scores.transpose(2, 3).contiguous().transpose(2, 3), 20)
    check(scores[:, :1].expand(2, 3, 2, 1100), 20, 4)


def test_kept_columns_of_any_layout() -> None:
    """One row expanded, every second row of a mask, and one whose columns are not neighbours."""
    scores = awkward(1, 2, 3, 1100, seed=6)
    one = torch.rand(1, 1100, generator=torch.Generator().manual_seed(0)) < 0.05
    rows = torch.cat([one, ~one, one])
    views = {
        "expanded": (one.expand(3, 1100), [one, one, one]),
        "strided": (torch.cat([rows, rows], 1).view(6, 1100)[:, :].reshape(3, 2200)[:, :1100], list(rows)),
        "transposed": (rows.t().contiguous().t(), list(rows)),
    }
    for mask, kept in views.values():
        indices, counts = topk_columns(scores, 30, mask, 0, 0, 1090, 1100, SMALL)
        for g, row in enumerate(kept):
            always = set(row.flatten()[:1090].nonzero().flatten().tolist())
            for h in range(2):
                values = scores[0, h, g, :1090]
                others = [n for n in range(1090) if n not in always]
                best = truth._ranking(values.tolist(), others)[:30]
                expected = sorted(always | set(best))
                assert indices[0, h, g, : counts[0, h, g]].tolist() == expected


def test_nothing_to_choose_from() -> None:
    check(torch.rand(1, 1, 2, 50), 5, 3, length=0)
    empty = topk_columns(torch.rand(1, 0, 2, 50), 5, None, 0, 0, 50, 5, SMALL)
    assert empty[0].shape == (1, 0, 2, 5)


def test_no_more_than_the_capacity() -> None:
    indices, counts = topk_columns(awkward(1, 1, 1, 2000), 500, None, 0, 0, 2000, 37, SMALL)
    whole, _ = topk_columns(awkward(1, 1, 1, 2000), 500, None, 0, 0, 2000, 500, SMALL)
    assert counts.tolist() == [[[37]]]
    assert torch.equal(indices, whole[..., :37])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_row_matches_the_reference(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 200), label="columns")
    values = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")]), st.floats(width=32)
    )
    row = data.draw(st.lists(values, min_size=columns, max_size=columns), label="scores")
    length = data.draw(st.integers(0, columns), label="length")
    k, random = (data.draw(st.integers(0, columns), label=name) for name in ("k", "random"))
    keep = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns)), label="keep"))
    scores = torch.tensor(row, dtype=torch.float32).view(1, 1, 1, columns)
    check(scores, k, random, [(keep[0], keep[1])], 0, length)


@pytest.mark.usefixtures("short_lists")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_long_row_matches_the_reference(data: st.DataObject) -> None:
    """Rows made of few distinct scores or of many, with what a sample may miss anywhere."""
    columns = data.draw(st.integers(1100, 2600), label="columns")
    scores = randn(1, 1, 1, columns, seed=data.draw(st.integers(0, 99), label="seed"))
    steps = data.draw(st.sampled_from([0, 1, 4, 64]), label="steps")
    scores = (scores * steps).round() if steps else scores
    start = data.draw(st.integers(0, columns), label="start")
    special = st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 9.0])
    scores[..., start : start + data.draw(st.integers(0, 400), label="run")] = data.draw(special)
    k = data.draw(st.integers(0, 500), label="k")
    random = data.draw(st.integers(0, 200), label="random")
    first = data.draw(st.integers(0, columns - 1), label="first")
    keep = [(first, min(columns, first + data.draw(st.integers(0, 300), label="kept")))]
    check(scores, k, random, keep, 0, data.draw(st.integers(columns - 90, columns), label="length"))


def test_plans_at_the_size_of_a_video() -> None:
    """HunyuanVideo: three blocks share an sm_90 multiprocessor; lists take the sample's error both ways."""
    length, k = 119056, 5953
    plan = make_plan(length, k, 256, 1190, 8192, 256, 227 * 1024)
    assert plan is not None
    assert 3 * (plan.shared_bytes + 1024) <= 228 * 1024
    aim = plan.share * (length - 256)
    deviation = math.sqrt(0.07 * 0.93 / (8192 / 4)) * length
    assert min(aim - k, plan.room - aim * (1 + 1 / 32)) > 3.5 * deviation
    drawn = (length - 256) * (1 - plan.bound / 2**32)
    assert drawn * (1 - k / (length - 256)) - 1190 > 5 * math.sqrt(1190)
    assert plan.lots_room - drawn > 5 * math.sqrt(drawn)
    assert make_plan(length, k, 256, 1190, 8192, 256, 99 * 1024) == plan
    short = make_plan(4352, 718, 512, 0, 8192, 256, 99 * 1024)
    assert short is not None and (short.room, short.sample) == (4352, 0)
    wide = make_plan(length, 60000, 256, 1190, 8192, 256, 227 * 1024)
    assert wide is not None and wide.room == 0 and wide.lots_room > 1190


def test_settings_say_what_does_not_fit() -> None:
    video = Problem("topk_columns", rows=100, columns=119056, width=1)
    assert SelectSettings().misfit(video) is None
    assert "42 registers" in str(SelectSettings(threads=512, blocks=3).misfit(video))
    assert SelectSettings(sample=2048).misfit(video) is None
    short = Problem("topk_columns", rows=100, columns=4096, width=1)
    assert SelectSettings().misfit(short) is None
    assert "an eighth of 4096" in str(SelectSettings(sample=4096).misfit(short))


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("dtype", "vector_bytes", "threads", "blocks"), [(torch.float32, 16, 256, 4), (torch.float16, 2, 512, 2)]
)
def test_other_launches_spill_nothing(
    dtype: torch.dtype, vector_bytes: int, threads: int, blocks: int, tmp_path: Path
) -> None:
    """The fullest, and scores that lie anywhere."""
    source = select.source(dtype, vector_bytes, SelectSettings(threads=threads, blocks=blocks))
    used = usage(compile_for(source, "sm_90a"), tmp_path)["topk_columns"]
    assert used.stack_bytes == used.local_bytes == 0
    assert used.registers <= select.FEWEST_REGISTERS


@pytest.mark.compile_only
def test_a_tile_is_loaded_at_once_to_be_evicted_first(tmp_path: Path) -> None:
    """Eight 16-byte loads, one after the other; bins count with the cheap atomic."""
    found = instructions(select.SOURCES[0], "sm_90a", tmp_path)
    first = found.index("LDG.E.EF.128")
    assert found[first : first + 8] == ["LDG.E.EF.128"] * 8
    assert sum(name.startswith("CCTL.E.PF2") for name in found) > 0
    assert sum(name.startswith("ATOMS.POPC.INC") for name in found) > 0
