"""Bias and GELU in one kernel, against the reference."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels.backends.triton.bias_gelu import BiasGeluSettings, bias_gelu
from reference.mlp import bias_gelu as true_bias_gelu
from tests.factories import assert_within_budget, poisoned, randn
from tests.triton_mlp.cases import DEVICE, DTYPES

SMALL = BiasGeluSettings(block=64, num_warps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 193])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_of_any_length(tokens: int, biased: bool, dtype: torch.dtype) -> None:
    """A slice of a wider tensor, whose rest is neither read nor written; every other value of a bias."""
    wide = poisoned(2, 10, tokens + 7, dtype=dtype, device=DEVICE)
    mid = wide[:, 3:, :tokens]
    mid.copy_(randn(2, 7, tokens, dtype=dtype, device=DEVICE, scale=4))
    bias = randn(14, dtype=dtype, device=DEVICE, seed=1)[::2] if biased else None
    truth = true_bias_gelu(mid.double(), None if bias is None else bias.double())
    peer = true_bias_gelu(mid, bias)
    bias_gelu(mid, bias, SMALL)
    assert_within_budget(mid, truth, peer)
    assert wide[:, :3].isnan().all() and wide[..., tokens:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_far_from_zero(dtype: torch.dtype) -> None:
    """The exponential overflows below, where the result is 0, not NaN."""
    mid = torch.tensor([-6e4, -100.0, -8.0, 0.0, 8.0, 100.0, 6e4], dtype=dtype, device=DEVICE).view(1, 1, 7)
    bias_gelu(mid, None, SMALL)
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 8.0, 100.0, 6e4], dtype=dtype, device=DEVICE)
    torch.testing.assert_close(mid.flatten(), wanted, rtol=1e-6, atol=1e-6)
