"""The references for selection, gathering, the MLP and the group mean, by hand on small cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chipmunk_kernels.columns import ColumnSet
from reference import gather, group_mean, mlp, select
from tests.factories import mlp_inputs

NAN = float("nan")


def chosen(result: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    indices, counts = result
    return indices[0, 0, 0, : int(counts[0, 0, 0])].tolist()


def row(*scores: float) -> torch.Tensor:
    return torch.tensor(scores).view(1, 1, 1, -1)


def test_topk_takes_the_best_ties_to_the_lower_index_nan_last() -> None:
    scores = row(3.0, NAN, 5.0, 3.0, 1.0, 5.0)
    assert [chosen(select.topk_columns(scores, k, 8)) for k in range(7)] == [
        [], [2], [2, 5], [0, 2, 5], [0, 2, 3, 5], [0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip


def test_topk_counts_k_on_top_of_what_is_always_kept() -> None:
    scores = row(9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
    assert chosen(select.topk_columns(scores, 2, 8, keep=[(0, 2)])) == [0, 1, 2, 3]
    assert chosen(select.topk_columns(scores, 2, 8, keep=[(4, 6)], key_length=5)) == [0, 1, 4]


def test_the_window_surrounds_the_group_s_own_rows() -> None:
    assert [sorted(select.always_kept(g, 10, 4, (), 1, 10)) for g in range(3)] == [
        [0, 1, 2, 3, 4],
        [3, 4, 5, 6, 7, 8],
        [7, 8, 9],
    ]
    assert select.always_kept(1, 10, 4, (), 0, 10) == set()


def test_coverage_stops_as_soon_as_it_is_reached() -> None:
    scores = row(1.0, 4.0, 2.0, 3.0, 0.0)
    reached = {0.0: [], 0.4: [1], 0.41: [1, 3], 0.7: [1, 3], 0.9: [1, 2, 3], 1.0: [0, 1, 2, 3]}
    for coverage, expected in reached.items():
        assert chosen(select.coverage_columns(scores, coverage, 8)) == expected
    assert chosen(select.coverage_columns(scores, 0.7, 8, max_columns=1)) == [1]
    assert chosen(select.coverage_columns(scores, 0.5, 8, keep=[(0, 1)])) == [0, 1]
    assert chosen(select.coverage_columns(scores, 1.0, 8, key_length=2)) == [0, 1]


def test_the_hash_is_what_every_backend_must_draw() -> None:
    """Values of the definition, so that no backend and reference can drift together."""
    assert (select.mix(0), select.mix(1), select.mix(0xDEADBEEF)) == (0, 0x688990C0, 0xE628C683)
    assert select.extras_hash(7, 0, 1, 2, 3) == 0x91AB7F2B
    assert select.extras_hash(-1, 1, 2, 3, 119055) == 0x3A1A30A6
    drawn = [select.extras_hash(7, 0, 1, 2, n) for n in range(200)]
    assert len(set(drawn)) == 200 and all(0 <= x < 2**32 for x in drawn)
    assert select.extras_hash(-1, 0, 0, 0, 0) == select.extras_hash(2**32 - 1, 0, 0, 0, 0)


def test_extras_are_the_largest_hashes_of_the_rest() -> None:
    scores = row(*range(50))
    kept = chosen(select.topk_columns(scores, 5, 64, random=4, seed=3))
    assert {45, 46, 47, 48, 49} < set(kept) and len(kept) == 9
    rest = sorted(range(45), key=lambda n: -select.extras_hash(3, 0, 0, 0, n))
    assert set(kept) - set(range(45, 50)) == set(rest[:4])


def test_a_mask_is_cut_at_the_capacity() -> None:
    mask = torch.tensor([1, 0, 1, 1]).bool().view(1, 1, 1, -1)
    assert chosen(select.columns_from_mask(mask)) == [0, 2, 3]
    assert chosen(select.columns_from_mask(mask, 2)) == [0, 2]


def test_gather_and_scatter_by_hand() -> None:
    columns = ColumnSet.from_lists([[[[0, 2], [1]]]], group_size=2)
    x = torch.arange(9.0).view(1, 1, 3, 3)
    packed = gather.gather_columns(x, columns.indices, columns.counts, 2, per_group=True)
    assert packed[0, 0].tolist() == [[[0, 1], [6, 7]], [[5, 0], [0, 0]]]
    whole = gather.gather_columns(x, columns.indices, columns.counts, 2)
    assert whole[0, 0].tolist() == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [0, 0, 0]]]
    out = gather.scatter_columns(packed, columns.indices, columns.counts, 2, torch.full_like(x, -1))
    assert out[0, 0].tolist() == [[0, 1, -1], [-1, -1, 5], [6, 7, -1]]
    out = gather.scatter_columns(packed, columns.indices, columns.counts, 2, x, accumulate=True)
    assert out[0, 0].tolist() == [[0, 2, 2], [3, 4, 10], [12, 14, 8]]


def test_the_mlp_delta_brings_kept_neurons_up_to_date() -> None:
    """From old tokens' caches to the dense MLP of new ones if all is kept; nowhere if nothing is."""
    m = mlp_inputs(1, 70, 16, 40, dtype=torch.float64)

    def dense(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        act = F.gelu(F.linear(x, m.w1, m.b1), approximate="tanh")
        return act.transpose(1, 2), act @ m.w2_by_neuron

    old, new = dense(m.x.flip(1)), dense(m.x)
    for columns, expected in (
        (ColumnSet.full(1, 1, 70, 40, 64), new),
        (ColumnSet.from_lists([[[[], []]]], 64), old),
    ):
        found = mlp.sparse_mlp(m.x, m.w1, m.b1, m.w2_by_neuron, columns.indices, columns.counts, 64, *old)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    with pytest.raises(ValueError, match="activation: expected 'gelu_tanh', got 'relu'"):
        mlp.sparse_mlp(m.x, m.w1, m.b1, m.w2_by_neuron, columns.indices, columns.counts, 64, *old, "relu")


def test_references_leave_their_inputs_alone() -> None:
    m = mlp_inputs(1, 70, 16, 40)
    before = (m.activation_cache.clone(), m.output_cache.clone())
    mlp.sparse_mlp(
        m.x,
        m.w1,
        m.b1,
        m.w2_by_neuron,
        m.columns.indices,
        m.columns.counts,
        64,
        m.activation_cache,
        m.output_cache,
    )
    assert torch.equal(m.activation_cache, before[0]) and torch.equal(m.output_cache, before[1])


def test_group_mean_by_hand() -> None:
    x = torch.tensor([1.0, 3.0, 5.0, 7.0, 100.0]).view(1, 5, 1)
    assert group_mean.group_mean(x, 2)[0, :, 0].tolist() == [2.0, 6.0, 100.0]
