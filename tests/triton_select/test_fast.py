"""Selection of long rows in one read: the list and its contest, and what they leave to the radix search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.triton import select, select_fast, select_scratch
from chipmunk_kernels.backends.triton.device import register_share
from chipmunk_kernels.backends.triton.select import Row, SelectSettings, coverage_columns, topk_columns
from chipmunk_kernels.backends.triton.select_fast import Plan, packed
from chipmunk_kernels.backends.triton.select_scratch import SCRATCH_BYTES, Chunk, chunk
from reference import select as truth
from tests.triton_select.cases import DEVICE, SMALL, always_mask, assert_same_columns, awkward_scores

GROUP_SIZE = 100
KEEP = ((3, 9), (200, 210))


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some hundred columns count as long, so that the interpreter can walk them."""
    for name, value in {"LISTS": (64, 128, 256), "EFFECTIVE_SAMPLE": 64, "DEVIATIONS": 1.0}.items():
        monkeypatch.setattr(select_fast, name, value)
    monkeypatch.setattr(select, "SAMPLE", 64)
    monkeypatch.setattr(select, "CLUSTER", 4)


def shortlist(scores: Tensor, k: int, random: int = 0, always: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the fast path alone decides; rows that it leaves over have the count -1."""
    length, at_most = scores.shape[-1], 0 if always is None else int(always.sum(-1).max())
    capacity = at_most + k + random
    indices = torch.zeros(*scores.shape[:3], capacity, dtype=torch.int32, device=scores.device)
    counts = torch.full(scores.shape[:3], -7, dtype=torch.int32, device=scores.device)
    plan = Plan.make(length, k, at_most, random)
    assert plan is not None
    Row(scores, always, indices, counts, k, None, random, 5, length).shortlist(plan, SMALL)
    return indices, counts


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("columns", [704, 1023])
@pytest.mark.parametrize(("k", "random"), [(30, 0), (30, 11), (0, 20)])
@pytest.mark.parametrize("kept", [False, True], ids=["scores", "kept"])
def test_matches_the_reference(columns: int, k: int, random: int, kept: bool) -> None:
    """Smooth scores, which the sample serves, and awkward ones, which it does not: the same exact answer."""
    smooth = torch.randn(1, 1, 2, columns, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    for scores in (smooth, awkward_scores(1, 1, 2, columns, seed=k)):
        length = columns - 3
        keep, window = (KEEP, 4) if kept else ((), 0)
        always = always_mask(2, columns, GROUP_SIZE, keep, window, length)
        capacity = (0 if always is None else int(always.sum(-1).max())) + k + random
        got = topk_columns(scores, k, always, random, 77, length, capacity, SMALL)
        expected = truth.topk_columns(scores.cpu(), k, GROUP_SIZE, keep, window, random, 77, length)
        assert_same_columns(got, expected, columns)


@pytest.mark.usefixtures("short_lists")
def test_ordinary_rows_need_no_second_look() -> None:
    scores = torch.randn(2, 3, 2, 1000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    indices, counts = shortlist(scores, 40, 10)
    assert counts.tolist() == [[[50] * 2] * 3] * 2
    assert_same_columns(
        (indices, counts), truth.topk_columns(scores.cpu(), 40, GROUP_SIZE, random=10, seed=5), 1000
    )


@pytest.mark.usefixtures("short_lists")
def test_equal_scores_at_the_edge_go_to_the_lower_columns() -> None:
    """The list alone decides them, below zero too: several stand where the wanted ones end."""
    scores = torch.randn(1, 2, 3, 1000, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    scores = (scores * 32).round() / 32 - 5
    indices, counts = shortlist(scores, 40, 10)
    assert counts.eq(50).all()
    kept = scores.gather(-1, indices.long())
    assert (scores == kept.kthvalue(11, dim=-1, keepdim=True).values).sum(-1).max() > 4
    assert_same_columns(
        (indices, counts), truth.topk_columns(scores.cpu(), 40, GROUP_SIZE, random=10, seed=5), 1000
    )


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("misleading", ["ties", "nan", "hidden"])
def test_what_the_sample_misjudges_is_left_over(misleading: str) -> None:
    """All equal: the list overflows. Next to no numbers, or fewer numbers than wanted: it holds too few."""
    scores = torch.randn(1, 1, 2, 1000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if misleading == "ties":
        scores[0, 0, 1] = 0.25
    else:
        scores[0, 0, 1, (10 if misleading == "nan" else 39) :] = math.nan
    _, counts = shortlist(scores, 40)
    assert counts.flatten().tolist() == [40, -1]
    got = topk_columns(scores, 40, None, 0, 0, 1000, 40, SMALL)
    assert_same_columns(got, truth.topk_columns(scores.cpu(), 40, GROUP_SIZE), 1000)


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_radix_search_decides_any_row(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many columns for a list, and coverage, whose number of columns nobody knows beforehand."""
    settings = SelectSettings(block=128, bits=bits)
    scores = awkward_scores(1, 1, 2, 700, seed=3)
    assert Plan.make(690, 400, 20, 30) is None
    always = always_mask(2, 700, GROUP_SIZE, KEEP, 0, 690)
    got = topk_columns(scores, 400, always, 30, 9, 690, 450, settings)
    assert_same_columns(got, truth.topk_columns(scores.cpu(), 400, GROUP_SIZE, KEEP, 0, 30, 9, 690), 700)
    whole = torch.randint(0, 9, (1, 1, 2, 700), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    for coverage in (0.0, 0.4, 1.0):
        got = coverage_columns(whole, coverage, 690, always, 5, 9, 690, 700, settings)
        expected = truth.coverage_columns(whole.cpu(), coverage, GROUP_SIZE, 690, KEEP, 0, 5, 9, 690)
        assert_same_columns(got, expected, 700)


def test_a_plan_leaves_room_on_both_sides() -> None:
    """At HunyuanVideo's size: five per cent of 119 056 columns, 256 of text, one per cent of extras."""
    plan = Plan.make(119056, 5953, 256, 1191)
    assert plan is not None and plan.size == 16384
    listed = plan.share * (119056 - 256)
    drawn = 1191 + 6 * 1191**0.5
    assert 5953 + 3300 < listed < 16384 - 256 - drawn - 3300
    expected_draws = (1 - plan.bound / 2**32) * (119056 - 256 - 5953)
    assert drawn <= expected_draws <= drawn + 12
    assert Plan.make(119056, 20000, 0, 0) is None, "does not fit a list"
    assert Plan.make(100, 60, 30, 10) is None, "everything is kept"


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 5000])
def test_packed_marks(columns: int) -> None:
    mask = (torch.rand(3, columns, generator=torch.Generator().manual_seed(2)) < 0.5).to(DEVICE)
    for marks in (mask, mask[:1].expand(3, columns)):
        words = packed(marks, columns).cpu()
        assert words.shape == (3, -(-columns // 32))
        n = torch.arange(columns)
        assert torch.equal((words[:, n // 32] >> (n % 32)) & 1 != 0, marks.cpu())


def test_contests_that_share_a_multiprocessor_fit_its_registers() -> None:
    """Up to 32 warps; more would have to do with fewer registers than a contest can."""
    for warps, per_unit in ((4, 2), (4, 6), (4, 8), (8, 2), (8, 3), (8, 4)):
        registers = register_share(per_unit, warps, 64)
        assert 64 <= registers <= 255 and registers * 32 * warps * per_unit <= 65536
    assert register_share(8, 8, 64) == 64


def scratch_of(groups: int, columns: int, heads: int, plan: Plan, shared: bool) -> tuple[Chunk, int]:
    """The chunk on an H200 and all scratch of the call; `shared`: one row of always-kept columns for all."""
    width = math.ceil(columns / 32)
    row_bytes, list_bytes, taken = 4 * width + 4, 8 * plan.size, 4 * width * (1 if shared else groups)
    part = chunk(heads * groups, row_bytes, list_bytes, 4 * 132, 132, taken)
    return part, part.bytes(row_bytes, list_bytes) + taken


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(24, 619), (24, 931), (3, 619), (1, 7), (240, 619)])
def test_scratch_stays_below_the_bound_at_the_size_of_a_video(heads: int, groups: int, shared: bool) -> None:
    plan = Plan.make(119056, 5953, 256, 1191)
    assert plan is not None
    part, total = scratch_of(groups, 119056, heads, plan, shared)
    assert total <= SCRATCH_BYTES < 64 << 20
    assert 1 <= part.programs <= part.rows <= heads * groups
    if part.programs >= 132:
        assert part.programs % 132 == 0, "no multiprocessor has less to do than another"
    assert part.rows in (heads * groups, part.rows // part.programs * part.programs)


def test_a_chunk_of_hunyuan_video_fills_the_device_twice() -> None:
    plan = Plan.make(119056, 5953, 256, 1191)
    assert plan is not None
    part, _ = scratch_of(619, 119056, 24, plan, shared=False)
    assert part == Chunk(rows=1056, programs=264)


def test_even_one_row_beyond_the_bound_is_a_chunk() -> None:
    assert chunk(100, 2 * SCRATCH_BYTES, 3 * SCRATCH_BYTES, 528, 132) == Chunk(1, 1)
    assert chunk(100, 4, 8, 528, 132, taken=2 * SCRATCH_BYTES) == Chunk(100, 100)


@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("kept", [False, True], ids=["scores", "kept"])
def test_chunks_choose_what_one_would(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks over two batch entries, the last one ragged; some rows mislead the sample."""
    batch, heads, groups, columns, k, random = 2, 2, 3, 704, 30, 11
    scores = awkward_scores(batch, heads, groups, columns, seed=3)
    smooth = torch.randn(batch, heads, groups, columns, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    scores[:, 0], length = smooth[:, 0], columns - 3
    keep, window = (KEEP, 4) if kept else ((), 0)
    always = always_mask(groups, columns, GROUP_SIZE, keep, window, length)
    capacity = (0 if always is None else int(always.sum(-1).max())) + k + random
    arguments = (scores, k, always, random, 77, length, capacity, SMALL)
    whole = topk_columns(*arguments)

    chunks: list[Chunk] = []

    def small(rows: int, *sizes: int) -> Chunk:
        chunks.append(Chunk(rows=5, programs=2))
        return chunks[-1]

    monkeypatch.setattr(select, "chunk", small)
    parts = topk_columns(*arguments)
    assert len(chunks) == 1 and batch * heads * groups % 5 != 0
    assert torch.equal(whole[1], parts[1])
    slots = torch.arange(capacity, device=DEVICE) < whole[1].unsqueeze(-1)
    assert torch.equal(whole[0].where(slots, 0), parts[0].where(slots, 0))
    expected = truth.topk_columns(scores.cpu(), k, GROUP_SIZE, keep, window, random, 77, length)
    assert_same_columns(parts, expected, columns)


@pytest.mark.usefixtures("short_lists")
def test_a_small_bound_makes_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated stays below it; marks of all 60 rows at once would not."""
    scores = torch.randn(1, 10, 6, 1000, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    monkeypatch.setattr(select_scratch, "SCRATCH_BYTES", 4096)
    made: list[int] = []
    empty = torch.empty

    def note(*shape: int, **options: object) -> Tensor:
        result = empty(*shape, **options)  # type: ignore[call-overload]
        made.append(result.nbytes)
        return result

    monkeypatch.setattr(select.torch, "empty", note)
    counts = shortlist(scores, 40, 10)[1]
    assert 2048 < sum(made) <= 4096 < 60 * 4 * 32
    assert counts.eq(50).all()
