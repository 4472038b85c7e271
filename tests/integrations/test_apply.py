"""apply_chipmunk and remove_chipmunk: what they refuse, what an explicit profile does, weights that cannot
be read.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import chipmunk_kernels
from chipmunk_kernels import registry
from chipmunk_kernels.delta.policies import load_policy
from chipmunk_kernels.integrations import diffusers as integration
from chipmunk_kernels.integrations.diffusers import apply_chipmunk, remove_chipmunk
from chipmunk_kernels.integrations.patches import why_not_plain
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile
from tests.integrations.helpers import EMPTY, LoraLinear, assert_close, attention_only, mlp_only, policy
from tests.integrations.models import (
    flux_latents,
    flux_pipeline,
    flux_prompt,
    flux_transformer,
    hunyuan_transformer,
)


def test_the_package_offers_both() -> None:
    assert chipmunk_kernels.apply_chipmunk is apply_chipmunk
    assert chipmunk_kernels.remove_chipmunk is remove_chipmunk


def test_twice_is_refused() -> None:
    transformer = flux_transformer()
    apply_chipmunk(transformer, policy(), EMPTY)
    with pytest.raises(RuntimeError, match="already applied to this transformer; call remove_chipmunk first"):
        apply_chipmunk(transformer, policy(), EMPTY)
    remove_chipmunk(transformer)
    apply_chipmunk(transformer, policy(), EMPTY)


@pytest.mark.parametrize("what", [nn.Linear(2, 2), "flux", object()])
def test_not_a_model(what: Any) -> None:
    found = type(what).__name__
    with pytest.raises(ValueError, match=f"expected one of FluxTransformer2DModel, .* got {found}"):
        apply_chipmunk(what, policy())


def test_not_a_policy() -> None:
    with pytest.raises(ValueError, match=r"policy: expected a Policy .* got str"):
        apply_chipmunk(flux_transformer(), "flux-dev")  # type: ignore[arg-type]


def test_a_patch_that_does_not_fit() -> None:
    message = re.escape(
        "policy.patch: expected 2 positive block sides for FluxTransformer2DModel, got (4, 6, 8)"
    )
    with pytest.raises(ValueError, match=message):
        apply_chipmunk(flux_transformer(), load_policy("hunyuan-video"))
    with pytest.raises(ValueError, match="expected 3 positive"):
        apply_chipmunk(hunyuan_transformer(), load_policy("flux-dev"))


@pytest.mark.parametrize("name", ["flux-dev", "flux-shapes"])
def test_built_in_policies_fit_flux(name: str) -> None:
    pipe = flux_pipeline(flux_transformer())
    stock = flux_latents(pipe, size=(192, 256), **flux_prompt(tokens=64))
    handle = apply_chipmunk(pipe, load_policy(name), EMPTY)
    sparse = flux_latents(pipe, size=(192, 256), **flux_prompt(tokens=64))
    assert handle.report().sparse_calls > 0
    assert float((sparse - stock).abs().mean()) < 0.02 * float(stock.abs().mean())


def test_a_failed_apply_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = flux_transformer()
    stock = dict(transformer.attn_processors)

    def refuse(*args: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(integration.Handle, "_attach_child", refuse)
    with pytest.raises(OSError, match="no room"):
        apply_chipmunk(transformer, policy(), EMPTY)
    assert all(transformer.attn_processors[name] is was for name, was in stock.items())
    assert not any("forward" in module.__dict__ for module in transformer.modules())


def tuned(crossover: float) -> Profile:
    common: dict[str, Any] = {"dtype": "float32", "group_size": 32, "density": 0.3}
    problems = (
        Problem("sparse_attention", rows=120, columns=120, width=128, heads=2, **common),
        Problem("sparse_mlp", rows=120, columns=1024, width=256, **common),
    )
    return Profile(
        entries=tuple(
            Entry(p, "torch", registry.kernel(p.operation, "torch").settings().as_dict(), {}, crossover)
            for p in problems
        )
    )


def test_dense_above_the_profiles_crossover() -> None:
    pipe = flux_pipeline(flux_transformer())
    stock = flux_latents(pipe, size=(128, 192))
    handle = apply_chipmunk(pipe, policy(0.25, patch=()), tuned(crossover=0.1))
    assert torch.equal(flux_latents(pipe, size=(128, 192)), stock)
    assert handle.report().dense_calls == {"density above the crossover": 36}


def test_an_explicit_profile_gives_the_same_pictures() -> None:
    pipe = flux_pipeline(flux_transformer())
    apply_chipmunk(pipe, policy(0.25), EMPTY)
    plain = flux_latents(pipe, size=(128, 192))
    remove_chipmunk(pipe)
    handle = apply_chipmunk(pipe, policy(0.25), tuned(crossover=0.9))
    assert_close(flux_latents(pipe, size=(128, 192)), plain)
    assert handle.report().dense_calls == {}


@pytest.mark.parametrize("width", [40, 64])
def test_head_widths(width: int) -> None:
    """64 is supported everywhere; another width runs, or stays dense and says why."""
    axes = {40: (8, 16, 16), 64: (16, 24, 24)}[width]
    pipe = flux_pipeline(flux_transformer(attention_head_dim=width, axes_dims_rope=axes))
    stock = flux_latents(pipe, size=(128, 192))
    handle = apply_chipmunk(pipe, attention_only(1.0), EMPTY)
    assert_close(flux_latents(pipe, size=(128, 192)), stock)
    report = handle.report()
    assert report.sparse_calls + sum(report.dense_calls.values()) > 0
    if width == 64:
        assert report.dense_calls == {}


class Quantised(torch.Tensor):
    pass


def test_why_not_plain() -> None:
    x = torch.zeros(1, 4)
    assert why_not_plain(nn.Linear(4, 4), x) is None
    assert "LoraLinear" in str(why_not_plain(LoraLinear(4, 4), x))
    assert why_not_plain(nn.Linear(4, 4, device="meta"), x) == "weight is on meta, not cpu (offloaded)"
    assert why_not_plain(nn.Linear(4, 4).half(), x) == "weight is float16, the input float32"
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Quantised), requires_grad=False)
    assert why_not_plain(quantised, x) == "weight is a Quantised (quantised or distributed)"
    hooked = nn.Linear(4, 4)
    hooked.register_forward_pre_hook(lambda module, args: None)
    assert "hooks" in str(why_not_plain(hooked, x))
    wrapped = nn.Linear(4, 4)
    wrapped.forward = wrapped.forward  # type: ignore[method-assign]
    assert "hooks" in str(why_not_plain(wrapped, x))


def test_report_during_a_generation_and_after_reset() -> None:
    pipe = flux_pipeline(flux_transformer())
    handle = apply_chipmunk(pipe, mlp_only(), EMPTY)
    assert handle.report().steps == [] and handle.report().cache_bytes == 0
    steps = []

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(len(handle.report().steps))
        return kwargs

    flux_latents(pipe, size=(128, 192), callback_on_step_end=look)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert handle.report().mlp_density == pytest.approx(0.25)
    handle.reset()
    assert handle.report().steps == [] and handle.report().sparse_calls == 0
