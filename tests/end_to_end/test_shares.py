"""Where a dense step's time goes, and the ceiling that follows from it."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule
from suites.end_to_end.shares import StepParts, ceiling, measured_parts


class Slow(nn.Linear):
    """A linear layer that takes a known time."""

    def __init__(self, width: int, out: int, seconds: float) -> None:
        super().__init__(width, out)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


class Block(nn.Module):
    """A single-stream block: three quarters of `proj_out` are the MLP's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_mlp = Slow(8, 24, 0.02)
        self.proj_out = Slow(32, 8, 0.04)
        self.other = Slow(8, 8, 0.03)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.other(x)
        attention = F.scaled_dot_product_attention(x, x, x)
        return self.proj_out(torch.cat([attention, self.proj_mlp(x)], dim=-1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.single_transformer_blocks:
            x = block(x)
        return x


def test_parts_are_those_of_one_forward() -> None:
    model, x = Model(), torch.randn(1, 1, 4, 8)
    with measured_parts(model, (1,), torch.device("cpu")) as parts:
        model(x)
        assert parts.step_ms == 0, "only the second forward counts"
        model(x)
        counted = (parts.step_ms, parts.attention_ms, parts.mlp_ms)
        model(x)
    assert (parts.step_ms, parts.attention_ms, parts.mlp_ms) == counted
    # Sleeps never end early; two blocks each.
    assert parts.mlp_ms >= 2 * (20 + 0.75 * 40) * 0.999
    assert parts.step_ms >= 2 * (20 + 40 + 30) * 0.999
    assert 0 < parts.attention_ms < parts.step_ms - parts.mlp_ms
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


def test_the_fastest_of_several_forwards_counts() -> None:
    model, x = Model(), torch.randn(1, 1, 4, 8)
    slow = model.single_transformer_blocks[0].other
    with measured_parts(model, (0, 1), torch.device("cpu")) as parts:
        slow.seconds = 0.3
        model(x)
        disturbed = parts.step_ms
        slow.seconds = 0.03
        model(x)
    assert disturbed >= 300
    assert parts.step_ms < disturbed - 200
    assert parts.mlp_ms < parts.step_ms


def test_a_failing_forward_leaves_no_hooks() -> None:
    model = Model()
    with pytest.raises(RuntimeError), measured_parts(model, (0,), torch.device("cpu")):
        model(torch.randn(1, 1, 4, 9))
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 4)] * 3).shape == (1, 1, 2, 4)


def policy(attention: AttentionPolicy | None, mlp: MlpPolicy | None) -> Policy:
    return Policy(name="test", attention=attention, mlp=mlp)


def test_ceiling_by_hand() -> None:
    """Half the time attention, a quarter MLP; 2 of 10 steps full; 1 of 4 layers has dense attention."""
    parts = StepParts(step_ms=100, attention_ms=50, mlp_ms=25)
    schedule = Schedule(first=2, every=0)
    plan = policy(AttentionPolicy(schedule=schedule, dense_layers=1), MlpPolicy(schedule=schedule))
    found = ceiling(parts, plan, steps=10, layers=4, attention_density=0.2, mlp_density=0.4)
    relative = 0.25 + 0.5 * (1 - 0.8 * 0.75 * 0.8) + 0.25 * (1 - 0.8 * 0.6)
    assert found["policy"] == pytest.approx(1 / relative)
    assert found["limit"] == pytest.approx(4)


def test_ceiling_of_what_stays_dense_is_one() -> None:
    parts = StepParts(step_ms=100, attention_ms=50, mlp_ms=25)
    nothing = policy(None, None)
    assert (
        ceiling(parts, nothing, steps=10, layers=4, attention_density=None, mlp_density=None)["policy"] == 1
    )
    always_full = policy(AttentionPolicy(schedule=Schedule(first=10)), None)
    assert (
        ceiling(parts, always_full, steps=10, layers=4, attention_density=0.1, mlp_density=None)["policy"]
        == 1
    )


def test_ceiling_without_anything_else_is_unbounded() -> None:
    parts = StepParts(step_ms=100, attention_ms=60, mlp_ms=40)
    assert math.isinf(
        ceiling(parts, policy(None, None), steps=1, layers=1, attention_density=None, mlp_density=None)[
            "limit"
        ]
    )
