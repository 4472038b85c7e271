"""The attention references, against sums written out and against PyTorch's own attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from chipmunk_kernels.columns import ColumnSet
from reference import attention
from tests.factories import attention_inputs, scattered_columns


def test_one_query_by_hand() -> None:
    """Logits ln 1, ln 2, ln 5: weights 1/8, 2/8, 5/8 and normaliser ln 8."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().view(1, 1, 3, 1)
    v = torch.tensor([8.0, 80.0, 800.0], dtype=torch.float64).view(1, 1, 3, 1)
    out, lse = attention.dense_attention(q, k, v, scale=1.0)
    assert math.isclose(out.item(), 1 + 20 + 500) and math.isclose(lse.item(), math.log(8))
    chosen = ColumnSet.from_lists([[[[0, 1]]]], group_size=1)
    out, lse = attention.sparse_attention(q, k, v, chosen.indices, chosen.counts, 1, scale=1.0)
    assert math.isclose(out.item(), 8 / 3 + 160 / 3) and math.isclose(lse.item(), math.log(3))
    base = torch.full_like(q, 100.0)
    out, _ = attention.sparse_attention(q, k, v, chosen.indices, chosen.counts, 1, base, -1, 1.0)
    assert math.isclose(out.item(), 100 - 56)
    mass = attention.colsum_attention(q, k, v, lse, 1, scale=1.0)[2]
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor([1, 2, 5], dtype=torch.float64) / 3)


def test_dense_is_pytorch_s_attention() -> None:
    q, k, v = attention_inputs(2, 3, 50, 70, dtype=torch.float64)
    torch.testing.assert_close(attention.dense_attention(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))
    cut = F.scaled_dot_product_attention(q, k[:, :, :30], v[:, :, :30])
    torch.testing.assert_close(attention.dense_attention(q, k, v, key_length=30)[0], cut)
    lengths = torch.tensor([30, 70])
    mixed = attention.dense_attention(q, k, v, key_length=lengths)[0]
    torch.testing.assert_close(mixed[:1], cut[:1])
    torch.testing.assert_close(mixed[1:], attention.dense_attention(q, k, v)[0][1:])


def test_sparse_is_attention_with_a_mask() -> None:
    q, k, v = attention_inputs(2, 2, 130, 90, dtype=torch.float64)
    columns = scattered_columns(2, 2, 130, 90)
    out, lse = attention.sparse_attention(q, k, v, columns.indices, columns.counts, 64)
    mask = columns.to_mask(90)[:, :, torch.arange(130) // 64]
    some = mask.any(-1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out[some], expected[some])
    assert not out[~some].any() and bool((lse[~some] == float("-inf")).all()) and bool((~some).any())


def test_the_mass_against_its_own_normaliser_sums_to_the_queries() -> None:
    q, k, v = attention_inputs(1, 2, 130, 90, dtype=torch.float64)
    _, lse = attention.dense_attention(q, k, v, key_length=80)
    out, again, mass = attention.colsum_attention(q, k, v, lse, 64, key_length=80)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([64.0, 64.0, 2.0]).double().expand(1, 2, 3))
    assert not mass[..., 80:].any() and torch.equal(again, lse)
    torch.testing.assert_close(out, attention.dense_attention(q, k, v, key_length=80)[0])


def test_no_key_gives_zeros() -> None:
    q, k, v = attention_inputs(1, 1, 5, 5, dtype=torch.float64)
    out, lse = attention.dense_attention(q, k, v, key_length=0)
    assert not out.any() and bool((lse == float("-inf")).all())
