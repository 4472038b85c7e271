"""Policies, a LoRA-like linear and comparisons that the integration tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule
from chipmunk_kernels.profiles import Profile

EMPTY = Profile.empty()
"""No tuned entries: a profile lying about on the machine must not decide what these tests run."""


def policy(keep: float = 0.25, patch: Any = ((8, 8), (4, 4)), **attention: Any) -> Policy:
    """Small groups, no dense layers, full steps 0, 1 and 4 for attention, 0 and 4 for the MLP."""
    return Policy(
        "test",
        AttentionPolicy(
            **{
                "keep": keep,
                "random": 0.0,
                "group_size": 32,
                "dense_layers": 0,
                "schedule": Schedule(2, 4),
                **attention,
            }
        ),
        MlpPolicy(keep=keep, random=0.0, group_size=32, schedule=Schedule(1, 4)),
        patch=patch,
    )


def attention_only(keep: float = 0.25, **more: Any) -> Policy:
    return replace(policy(keep, **more), mlp=None)


def mlp_only(keep: float = 0.25, **more: Any) -> Policy:
    return replace(policy(keep), attention=None, mlp=replace(_mlp(keep), **more))


def _mlp(keep: float) -> MlpPolicy:
    mlp = policy(keep).mlp
    assert mlp is not None
    return mlp


class LoraLinear(nn.Linear):
    """What an un-fused adapter looks like: `.weight` is the base weight, forward adds the rest."""

    @classmethod
    def around(cls, base: nn.Linear) -> LoraLinear:
        wrapped = cls(base.in_features, base.out_features)
        wrapped.weight, wrapped.bias = base.weight, base.bias
        return wrapped

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.mean(-1, keepdim=True)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest value: what a few rounded float32 steps differ by."""
    error = float((actual - expected).abs().max()) / float(expected.abs().max())
    assert error <= tolerance, f"differs by {error:.2e} of the largest value, allowed {tolerance:.0e}"


def assert_differs(actual: Tensor, expected: Tensor) -> None:
    """The sparse run is a true approximation here, not dense by another name."""
    assert float((actual - expected).abs().max()) > 1e-4
    assert bool(torch.isfinite(actual).all())
