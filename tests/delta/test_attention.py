"""The attention delta against the equations written out, in both merge forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.delta import attention as module
from chipmunk_kernels.delta.attention import AttentionDelta, merge, remainder
from chipmunk_kernels.delta.policy import AttentionPolicy, Merge, Schedule
from tests.delta import equations
from tests.delta.equations import Qkv
from tests.factories import assert_within_budget, max_error, randn

MERGES: tuple[Merge, ...] = ("delta", "lse")


def denoising(
    count: int,
    batch: int = 1,
    heads: int = 2,
    rows: int = 77,
    columns: int | None = None,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    drift: float = 0.3,
) -> list[Qkv]:
    """Steps whose q, k, v drift, as strided views of `(B, N, H, D)`."""
    sizes = (rows, columns or rows, columns or rows)
    start = [randn(batch, n, heads, width, seed=i, scale=1.5) for i, n in enumerate(sizes)]
    steps = []
    for step in range(count):
        moved = [x + drift * step * randn(*x.shape, seed=10 + 3 * step + i) for i, x in enumerate(start)]
        q, k, v = (x.to(dtype).transpose(1, 2) for x in moved)
        steps.append((q, k, v))
    return steps


def policy(
    keep: float, first: int = 2, every: int = 4, merge: Merge = "delta", **more: object
) -> AttentionPolicy:
    values: dict[str, object] = {"random": 0.0, "group_size": 32, **more}
    return AttentionPolicy(keep=keep, schedule=Schedule(first, every), merge=merge, **values)  # type: ignore[arg-type]


def run(
    delta: AttentionDelta, steps: list[Qkv], keep: module.Ranges = ()
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Outputs, and the selection that each refreshing step made."""
    outputs, masks = [], {}
    before = None
    for number, (q, k, v) in enumerate(steps):
        outputs.append(delta(q, k, v, number, keep))
        if delta.columns is not None and delta.columns is not before:
            delta.columns.validate(q.shape[2], k.shape[2])
            masks[number] = delta.columns.to_mask(k.shape[2])
            before = delta.columns
    return outputs, masks


def cast(steps: list[Qkv], dtype: torch.dtype) -> list[Qkv]:
    return [(q.to(dtype), k.to(dtype), v.to(dtype)) for q, k, v in steps]


@pytest.mark.parametrize("merge_form", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "rows", "columns", "keep"), [(1, 77, None, 0.2), (2, 70, 45, 0.4)])
def test_follows_the_equations(
    merge_form: Merge, dtype: torch.dtype, batch: int, rows: int, columns: int | None, keep: float
) -> None:
    steps = denoising(7, batch, rows=rows, columns=columns, dtype=dtype)
    delta = AttentionDelta(policy(keep, merge=merge_form, random=0.05))
    outputs, masks = run(delta, steps, keep=((0, 5),))
    assert sorted(masks) == [1, 4]  # step 0 has a full step after it: nothing to choose yet
    truth = equations.attention(cast(steps, torch.float64), masks, 32, merge_form)
    # In half precision the peer's normalisers are too coarse to subtract; the engine keeps them in float32.
    peer = equations.attention(steps, masks, 32, merge_form, by_difference=dtype == torch.float32)
    for number, (out, exact, near) in enumerate(zip(outputs, truth, peer, strict=True)):
        assert_within_budget(out, exact, near, f"step {number}")


@pytest.mark.parametrize("first", [1, 2, 3])
def test_keeps_the_columns_of_largest_mass(first: int) -> None:
    """Against the normaliser of the full step before, or the step's own if there is none."""
    steps = denoising(first + 1)
    delta = AttentionDelta(policy(0.25, first, every=0))
    _, masks = run(delta, steps)
    ((chosen_at, mask),) = masks.items()
    assert chosen_at == first - 1
    q, k, _ = cast(steps, torch.float64)[chosen_at]
    before_q, before_k, before_v = cast(steps, torch.float64)[max(0, first - 2)]
    ones = torch.ones(77, 77, dtype=torch.bool)
    lse_prev = equations.masked_softmax(before_q, before_k, before_v, ones)[1]
    mass = equations.column_mass(q, k, lse_prev, 32)
    best = torch.zeros_like(mask).scatter_(-1, mass.topk(round(0.25 * 77)).indices, True)
    assert torch.equal(mask, best)


@pytest.mark.parametrize("merge_form", MERGES)
@pytest.mark.parametrize("rows", [64, 77])
def test_everything_kept_is_dense(merge_form: Merge, rows: int) -> None:
    steps = denoising(5, rows=rows)
    delta = AttentionDelta(policy(1.0, every=0, merge=merge_form))
    outputs, _ = run(delta, steps)
    assert delta._rest is not None
    assert float(delta._rest.abs().max()) < 1e-5
    ones = torch.ones(rows, rows, dtype=torch.bool)
    for out, (q, k, v), exact in zip(outputs, steps, cast(steps, torch.float64), strict=True):
        truth = equations.masked_softmax(*exact, ones)[0]
        assert_within_budget(out, truth, equations.masked_softmax(q, k, v, ones)[0])


@pytest.mark.parametrize("merge_form", MERGES)
def test_everything_kept_is_dense_after_logits_fell(merge_form: Merge) -> None:
    """The rounding left in an empty remainder must not win when every fresh logit is far below the cached
    ones.
    """
    (q, k, v), *_ = denoising(1)
    delta = AttentionDelta(policy(1.0, first=1, every=0, merge=merge_form))
    delta(8 * q, k, v, 0)
    out = delta(0.01 * q, k, v, 1)
    ones = torch.ones(77, 77, dtype=torch.bool)
    assert max_error(out, equations.masked_softmax(0.01 * q, k, v, ones)[0]) < 1e-5


def test_nothing_kept_repeats_the_last_full_step() -> None:
    steps = denoising(4)
    for form in MERGES:
        outputs, _ = run(AttentionDelta(policy(0.0, every=0, merge=form)), steps)
        assert max_error(outputs[3], outputs[1]) < 1e-5
        assert torch.equal(outputs[2], outputs[3])


def test_errors_do_not_build_up_over_sparse_steps() -> None:
    """The cache stays fixed between full steps: with inputs that come back, the output comes back to the
    bit.
    """
    steps = denoising(4)
    delta = AttentionDelta(policy(0.3, every=0))
    outputs, _ = run(delta, [*steps[:3], steps[3], steps[2]])
    assert torch.equal(outputs[4], outputs[2])


def test_always_kept_columns_and_window_come_on_top() -> None:
    steps = denoising(2, rows=128)
    delta = AttentionDelta(policy(0.1, first=1, every=0, window=4))
    _, masks = run(delta, steps, keep=((100, 128),))
    mask = masks[0]
    assert bool(mask[..., 100:128].all())
    for group in range(4):
        first, last = max(0, 32 * group - 4), min(128, 32 * (group + 1) + 4)
        assert bool(mask[:, :, group, first:last].all())
        always = len(set(range(100, 128)) | set(range(first, last)))
        assert int(mask[0, 0, group].sum()) == min(128, always + round(0.1 * 128))


def test_columns_past_the_first_thousand_are_seen() -> None:
    """A threshold taken from the first 1024 columns would miss that all the mass lies behind them."""
    q, k, v = (randn(1, 1, n, 64, seed=i) for i, n in enumerate((64, 1100, 1100)))
    q[..., 0] = 40.0
    k[..., 0] = 0.0
    k[:, :, 1050:, 0] = 2.0
    delta = AttentionDelta(policy(50 / 1100, first=1, every=0))
    delta(q, k, v, 0)
    assert delta.columns is not None
    assert delta.columns.indices[0, 0].tolist() == [list(range(1050, 1100))] * 2


def test_random_extras_differ_between_layers_and_refreshes() -> None:
    steps = denoising(6)
    drawn = []
    for seed in (1, 2):
        _, masks = run(AttentionDelta(policy(0.0, first=1, every=2, random=0.2), seed=seed), steps)
        drawn += [masks[0], masks[2]]
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
    _, again = run(AttentionDelta(policy(0.0, first=1, every=2, random=0.2), seed=1), steps)
    assert torch.equal(drawn[0], again[0])


def test_few_heads_at_a_time_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = denoising(4, heads=3)
    whole, masks = run(AttentionDelta(policy(0.2, first=1, every=2)), steps)
    monkeypatch.setattr(module, "MASS_BYTES", 2 * 4 * 3 * 77)
    parts, masks_of_parts = run(AttentionDelta(policy(0.2, first=1, every=2)), steps)
    assert all(torch.equal(masks[step], masks_of_parts[step]) for step in (0, 2))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_missed_refresh_is_made_up_for() -> None:
    """Another cache skipped this layer on the full step: its caches are too old, so the next call runs
    full.
    """
    steps = denoising(8)
    delta = AttentionDelta(policy(0.2, first=2, every=4))
    for number in (0, 1, 2, 5, 6):
        delta(*steps[number], number)
    assert (delta.usage.full, delta.usage.sparse) == (3, 2)
    first_seen_late = AttentionDelta(policy(0.2, first=2, every=4))
    out = first_seen_late(*steps[3], 3)
    ones = torch.ones(77, 77, dtype=torch.bool)
    assert max_error(out, equations.masked_softmax(*steps[3], ones)[0]) < 1e-5


def test_another_shape_starts_anew() -> None:
    delta = AttentionDelta(policy(0.2, first=1, every=0))
    delta(*denoising(1)[0], 0)
    delta(*denoising(1, rows=40)[0], 1)
    assert (delta.usage.full, delta.usage.sparse) == (2, 0)


def test_the_output_is_never_a_cache() -> None:
    steps = denoising(6)
    for form in MERGES:
        kept = AttentionDelta(policy(0.2, merge=form))
        spoilt = AttentionDelta(policy(0.2, merge=form))
        for number, (q, k, v) in enumerate(steps):
            expected = kept(q, k, v, number)
            out = spoilt(q, k, v, number)
            assert torch.equal(out, expected)
            out.fill_(math.nan)


def test_cache_bytes_count_what_is_held() -> None:
    q, k, v = denoising(1, rows=64)[0]
    delta = AttentionDelta(policy(0.25, first=1, every=0))
    assert delta.cache_bytes == 0
    delta(q, k, v, 0)
    kept = 16
    assert delta.cache_bytes == q.nbytes + 4 * 2 * 64 + 4 * 2 * 2 * kept + 4 * 2 * 2
    delta.reset()
    assert delta.cache_bytes == 0


def test_remainder_of_everything_is_empty() -> None:
    out, lse = randn(1, 1, 3, 4), randn(1, 1, 3)
    everything = torch.tensor([[[True, False, False]]])
    chosen_lse = lse + torch.tensor([0.01, -1e-7, -1.0])  # rounding above, below EMPTY_SHARE, a true part
    rest, rest_lse = remainder(out, lse, out, chosen_lse, everything)
    assert torch.isneginf(rest_lse[0, 0, :2]).all() and torch.isfinite(rest_lse[0, 0, 2])
    assert bool((rest[0, 0, :2] == 0).all()) and torch.isfinite(rest).all()
    fresh = randn(1, 1, 3, 4, seed=5)
    merged = merge(rest, rest_lse, lse, fresh, chosen_lse)
    assert torch.equal(merged[0, 0, :2], fresh[0, 0, :2])


def test_merge_ignores_an_empty_fresh_part() -> None:
    rest, fresh = randn(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    lse = torch.full((1, 1, 2), math.log(2.0))
    merged = merge(rest, torch.zeros(1, 1, 2), lse, fresh, torch.full((1, 1, 2), -math.inf))
    assert torch.equal(merged, rest)


@pytest.mark.parametrize(("share", "weight"), [(0.5, 1.0), (0.1, 0.4), (0.001, 0.004)])
def test_merge_trusts_a_small_cached_part_only_so_far(share: float, weight: float) -> None:
    """Where the fresh logits collapsed, the cached part would take the whole row."""
    rest, fresh = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    rest_lse, lse = torch.zeros(1, 1, 1), torch.full((1, 1, 1), -math.log(share))
    merged = merge(rest, rest_lse, lse, fresh, torch.full((1, 1, 1), -50.0))
    torch.testing.assert_close(merged, torch.full_like(merged, weight))
