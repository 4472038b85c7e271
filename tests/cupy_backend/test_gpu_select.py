"""The CuPy selection on a GPU: full video rows, every setting, repeats, graphs, streams.

Twins on the host are in `test_select.py`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy import select
from chipmunk_kernels.backends.cupy.select import SelectSettings, topk_columns
from chipmunk_kernels.backends.torch import select as peer
from chipmunk_kernels.problem import Problem
from reference import select as truth
from tests.triton_mlp.cases import poisoned_memory
from tests.triton_select.cases import always_mask, assert_same_columns, awkward_scores
from tests.triton_select.test_gpu import assert_equal_sets, check_repeats, mass, text_and_window

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
VIDEO_COLUMNS = 119056
VIDEO = Problem("topk_columns", rows=79232, columns=VIDEO_COLUMNS, width=1, heads=24, density=0.05)
DEFAULT = SelectSettings()
SPACE = [
    settings
    for values in itertools.product(*SelectSettings.space().values())
    if (settings := SelectSettings(*values)).misfit(VIDEO) is None
]


@pytest.fixture(autouse=True)
def _needs_cupy() -> None:
    pytest.importorskip("cupy")
    assert registry.unavailable("cupy", GPU) is None


def check(
    scores: Tensor,
    k: int,
    always: Tensor | None,
    random: int,
    length: int,
    settings: SelectSettings = DEFAULT,
) -> None:
    """Against the torch backend, with memory that shows what was not written."""
    kept = 0 if always is None else int(always[:, :length].sum(-1).max())
    arguments = (scores, k, always, random, 42, length, min(length, kept + k + random))
    with poisoned_memory():
        ours = topk_columns(*arguments, settings)
    assert_equal_sets(ours, peer.topk_columns(*arguments, peer.SelectSettings()))
    padding = torch.arange(ours[0].shape[-1], device=GPU) >= ours[1].unsqueeze(-1)
    assert not ours[0].where(padding, 0).any()


@pytest.mark.parametrize(
    ("k", "random"), [(0, 0), (1, 0), (20, 7), (0, 5), (250, 20), (300, 300), (284, 1), (290, 0)]
)
@pytest.mark.parametrize("columns", [300, 2100])
def test_matches_the_reference(k: int, random: int, columns: int) -> None:
    scores, keep, length = awkward_scores(1, 2, 2, columns, seed=k), ((3, 9), (200, 210)), columns - 10
    always = always_mask(2, columns, 100, keep, 4, length)
    assert always is not None
    capacity = min(length, int(always.sum(-1).max()) + k + random)
    got = topk_columns(scores, k, always, random, 12345, length, capacity, DEFAULT)
    assert_same_columns(
        got, truth.topk_columns(scores.cpu(), k, 100, keep, 4, random, 12345, length), columns
    )


@pytest.mark.parametrize(("k", "random"), [(5953, 1190), (1, 0), (0, 1190), (40_000, 0), (100_000, 15_000)])
def test_video_rows(k: int, random: int) -> None:
    length = VIDEO_COLUMNS - 100
    check(mass(1, 2, 12, VIDEO_COLUMNS), k, text_and_window(12, VIDEO_COLUMNS, length), random, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [0, 1], ids=["aligned", "odd"])
def test_every_score_dtype(dtype: torch.dtype, odd: int) -> None:
    """In bfloat16 thousands of scores equal the last one taken."""
    columns = 40_000 + odd
    scores = mass(2, 2, 3, columns).to(dtype)
    check(scores, 2000, text_and_window(3, columns, columns), 400, columns)
    check(scores, 2000, None, 0, columns - 7)


@pytest.mark.parametrize("settings", SPACE[:: max(1, len(SPACE) // 24)], ids=str)
def test_every_setting_selects_the_same(settings: SelectSettings) -> None:
    """Beside long-tailed rows one of ties alone and one of NaN, which the sample does not serve."""
    scores = mass(1, 2, 4, VIDEO_COLUMNS)
    scores[0, 0, 1], scores[0, 1, 2] = 0.5, float("nan")
    check(scores, 5953, text_and_window(4, VIDEO_COLUMNS, VIDEO_COLUMNS), 1190, VIDEO_COLUMNS, settings)
    check(scores, 5953, None, 0, VIDEO_COLUMNS, settings)


@pytest.mark.parametrize("columns", [1, 31, 1024, 1025, 4096, 8193, 16385, 33001, 75600])
def test_rows_of_every_length(columns: int) -> None:
    check(mass(2, 3, 2, columns, seed=columns), columns // 20 + 1, None, columns // 100, columns)


def test_rows_with_windows_of_their_own_and_ties_everywhere() -> None:
    scores = (mass(1, 3, 40, 30_000) * 50).round()
    check(scores, 1500, text_and_window(40, 30_000, 29_000), 300, 29_000)


def test_rows_too_long_for_the_marks() -> None:
    check(mass(1, 1, 2, 2_000_000), 1000, None, 50, 2_000_000)


def test_hunyuan_video_whole() -> None:
    """14856 rows: two heads against the torch backend, all of them by what a selection must satisfy."""
    groups, k, random, text = 619, 5953, 1190, 256
    capacity = text + k + random
    scores = torch.empty(1, 24, groups, VIDEO_COLUMNS, device=GPU)
    for h in range(24):
        scores[:, h] = mass(1, groups, VIDEO_COLUMNS, seed=h)
    always = torch.zeros(1, VIDEO_COLUMNS, dtype=torch.bool, device=GPU)
    always[:, -text:] = True
    always = always.expand(groups, VIDEO_COLUMNS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    indices, counts = topk_columns(scores, k, always, random, 7, VIDEO_COLUMNS, capacity, DEFAULT)
    torch.cuda.synchronize()
    results = indices.nbytes + counts.nbytes
    assert torch.cuda.max_memory_allocated() - before - results < 1 << 20
    assert counts.eq(capacity).all()
    assert (indices.diff(dim=-1) > 0).all()
    assert (indices[..., -text:] == torch.arange(VIDEO_COLUMNS - text, VIDEO_COLUMNS, device=GPU)).all()
    for h in range(24):
        others = scores[0, h, :, :-text]
        last = others.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        kept = others.gather(-1, indices[0, h, :, :-text].long())
        assert ((kept > last).sum(-1) == (others > last).sum(-1)).all()
        assert ((kept >= last).sum(-1) >= k).all()
    heads = (scores[:, :2], k, always, random, 7, VIDEO_COLUMNS, capacity)
    assert_equal_sets((indices[:, :2], counts[:, :2]), peer.topk_columns(*heads, peer.SelectSettings()))


@pytest.mark.parametrize("kept", [False, True], ids=["scores", "kept"])
def test_repeats_graphs_and_streams_are_bit_identical(kept: bool) -> None:
    always = text_and_window(8, VIDEO_COLUMNS, VIDEO_COLUMNS) if kept else None
    capacity = 7143 + 448 * kept
    check_repeats(
        mass(1, 2, 8, VIDEO_COLUMNS),
        lambda x: topk_columns(x, 5953, always, 1190, 3, VIDEO_COLUMNS, capacity, DEFAULT),
    )


def test_the_device_has_the_memory_that_plans_count_on() -> None:
    limit = select.shared_limit(GPU)
    assert limit >= select.SHARED_BYTES
    plan = select.make_plan(VIDEO_COLUMNS, 5953, 256, 1190, DEFAULT.sample, DEFAULT.threads, limit)
    assert plan is not None
    assert plan.room > 5953
