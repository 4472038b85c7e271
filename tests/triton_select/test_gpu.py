"""Selection on a GPU: full video rows, every setting, repeats, graphs, streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.backends.torch import select as peer
from chipmunk_kernels.backends.triton.select import (
    SelectSettings,
    columns_from_mask,
    coverage_columns,
    topk_columns,
)
from chipmunk_kernels.backends.triton.select_scratch import SCRATCH_BYTES
from tests.triton_mlp.cases import on_side_stream, poisoned_memory, replay

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
VIDEO_COLUMNS = 119056
DEFAULT = SelectSettings()


def mass(*shape: int, seed: int = 0) -> Tensor:
    """Long-tailed scores, as column masses are."""
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.rand(shape, generator=generator, device=GPU) ** 8


def text_and_window(groups: int, columns: int, key_length: int) -> Tensor:
    """Always-kept columns as the operations pass them on: none from the key length on."""
    n = torch.arange(columns, device=GPU)
    start = torch.arange(groups, device=GPU).unsqueeze(1) * 128
    return ((n >= columns - 256) | ((n >= start - 64) & (n < start + 192))) & (n < key_length)


def assert_equal_sets(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[1], theirs[1])
    slots = torch.arange(ours[0].shape[-1], device=GPU) < ours[1].unsqueeze(-1)
    assert torch.equal(ours[0].where(slots, 0), theirs[0].where(slots, 0))


@pytest.mark.parametrize(("k", "random"), [(5953, 1190), (1, 0), (100_000, 30_000)])
def test_video_rows(k: int, random: int) -> None:
    scores, groups = mass(1, 2, 12, VIDEO_COLUMNS), 12
    key_length = VIDEO_COLUMNS - 100
    always = text_and_window(groups, VIDEO_COLUMNS, key_length)
    capacity = min(VIDEO_COLUMNS, 512 + k + random)
    arguments = (scores, k, always, random, 42, key_length, capacity)
    ours = topk_columns(*arguments, DEFAULT)
    assert_equal_sets(ours, peer.topk_columns(*arguments, peer.SelectSettings()))
    assert int(ours[0].min()) >= 0
    assert int(ours[0].max()) < VIDEO_COLUMNS


def test_chunks_of_video_rows_stay_within_the_scratch_memory() -> None:
    """Three chunks of four heads: the same columns as the peer's, every time, in a graph too."""
    scores, k, random = mass(1, 4, 619, VIDEO_COLUMNS), 5953, 1190
    always = text_and_window(619, VIDEO_COLUMNS, VIDEO_COLUMNS)
    arguments = (k, always, random, 42, VIDEO_COLUMNS, 512 + k + random)

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        return topk_columns(x, *arguments, DEFAULT)

    ours = choose(scores)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = choose(scores)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in again)
    assert extra <= SCRATCH_BYTES + (1 << 20)
    assert_equal_sets(ours, peer.topk_columns(scores, *arguments, peer.SelectSettings()))
    del again
    check_repeats(scores, choose)


@pytest.mark.parametrize(
    ("block", "bits", "warps"), [(1024, 4, 4), (1024, 8, 16), (4096, 8, 4), (8192, 4, 8), (16384, 8, 16)]
)
def test_every_setting_selects_the_same(block: int, bits: int, warps: int) -> None:
    """Whole-number scores: their sums are exact, so that coverage has one answer too."""
    scores = (mass(1, 2, 5, 5000) * 50).round()
    always = text_and_window(5, 5000, 4900)
    settings = SelectSettings(block, bits, warps)
    counted = (scores, 700, always, 50, 7, 4900, 5000)
    assert_equal_sets(topk_columns(*counted, settings), peer.topk_columns(*counted, peer.SelectSettings()))
    covered = (scores, 0.75, 5000, always, 50, 7, 4900, 5000)
    assert_equal_sets(
        coverage_columns(*covered, settings), peer.coverage_columns(*covered, peer.SelectSettings())
    )
    mask = scores > 3
    assert_equal_sets(
        columns_from_mask(mask, 900, settings), peer.columns_from_mask(mask, 900, peer.SelectSettings())
    )


@pytest.mark.parametrize("mark_columns", [8, 16, 32])
@pytest.mark.parametrize(("contest_warps", "per_unit"), [(4, 8), (8, 2), (8, 4)])
def test_every_way_to_list_candidates(mark_columns: int, contest_warps: int, per_unit: int) -> None:
    """Beside long-tailed rows one of ties alone and one of NaN, which are left to the radix search."""
    scores = mass(1, 2, 4, VIDEO_COLUMNS)
    scores[0, 0, 1], scores[0, 1, 2] = 0.5, float("nan")
    settings = SelectSettings(mark_columns=mark_columns, contest_warps=contest_warps, per_unit=per_unit)
    for always, random in ((text_and_window(4, VIDEO_COLUMNS, VIDEO_COLUMNS), 1190), (None, 0)):
        arguments = (scores, 5953, always, random, 42, VIDEO_COLUMNS, 5953 + random + 512)
        assert_equal_sets(
            topk_columns(*arguments, settings), peer.topk_columns(*arguments, peer.SelectSettings())
        )


@pytest.mark.parametrize("columns", [4096, 4097, 8193, 16384, 16385, 33001, 75600])
def test_rows_of_every_length(columns: int) -> None:
    """On both sides of each contest's size, and lengths that no vector of loads divides."""
    scores = mass(2, 3, 2, columns, seed=columns)
    arguments = (scores, columns // 20, None, columns // 100, 7, columns, columns // 20 + columns // 100)
    assert_equal_sets(topk_columns(*arguments, DEFAULT), peer.topk_columns(*arguments, peer.SelectSettings()))


@pytest.mark.parametrize("coverage", [0.3, 0.9, 0.999])
def test_coverage_of_video_rows_is_tight(coverage: float) -> None:
    """Reaches the share to rounding, and would not without its weakest column."""
    scores = mass(1, 2, 6, VIDEO_COLUMNS)
    indices, counts = coverage_columns(
        scores, coverage, VIDEO_COLUMNS, None, 0, 0, VIDEO_COLUMNS, VIDEO_COLUMNS, DEFAULT
    )
    kept = torch.arange(VIDEO_COLUMNS, device=GPU) < counts.unsqueeze(-1)
    values = scores.gather(-1, indices.long()).double().where(kept, 0)
    covered, total = values.sum(-1), scores.double().sum(-1)
    weakest = values.where(kept, torch.inf).amin(-1)
    slack = 1e-5 * total
    assert (covered >= coverage * total - slack).all()
    assert (covered - weakest <= coverage * total + slack).all()
    best = (
        scores.double()
        .sort(-1, descending=True)
        .values.cumsum(-1)
        .gather(-1, counts.unsqueeze(-1).long() - 1)
    )
    torch.testing.assert_close(covered, best[..., 0], rtol=1e-9, atol=0)


def test_repeats_graphs_and_streams_are_bit_identical() -> None:
    covered, counted = mass(1, 4, 30, 4352), mass(1, 2, 8, VIDEO_COLUMNS)
    always = text_and_window(30, 4352, 4352)
    for scores, choose in (
        (covered, lambda x: coverage_columns(x, 0.8, 2000, always, 40, 3, 4352, 2600, DEFAULT)),
        (counted, lambda x: topk_columns(x, 5953, None, 1190, 3, VIDEO_COLUMNS, 7143, DEFAULT)),
    ):
        check_repeats(scores, choose)


def check_repeats(scores: Tensor, select: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Twice, in a graph, and on a side stream behind the work that makes the scores."""

    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        with poisoned_memory():
            return select(x)

    first, again = choose(scores), choose(scores)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])

    kept: list[Tensor] = []
    replay(lambda: kept.__setitem__(slice(None), choose(scores)))
    assert torch.equal(first[0], kept[0])
    assert torch.equal(first[1], kept[1])

    late = torch.zeros_like(scores)

    def fill_then_choose() -> None:
        late.copy_(scores)
        kept[:] = choose(late)

    on_side_stream(fill_then_choose)
    assert torch.equal(first[0], kept[0])
    assert torch.equal(first[1], kept[1])
