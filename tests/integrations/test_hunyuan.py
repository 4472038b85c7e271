"""HunyuanVideo through its own pipeline: padded prompts, the refiner, the token order, several kinds of
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from chipmunk_kernels.delta.policy import Policy
from chipmunk_kernels.integrations import hunyuan
from chipmunk_kernels.integrations.diffusers import Handle, apply_chipmunk, remove_chipmunk
from tests.integrations.helpers import EMPTY, assert_close, assert_differs, attention_only, policy
from tests.integrations.models import hunyuan_latents, hunyuan_pipeline, hunyuan_prompt, hunyuan_transformer

VOXELS = ((2, 4, 4),)
IMAGE = 3 * 6 * 8
"""Video tokens of the default size."""

Apply = Callable[[Policy], Handle]


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    return hunyuan_pipeline(hunyuan_transformer())


@pytest.fixture(scope="module")
def dense() -> Tensor:
    return hunyuan_latents(hunyuan_pipeline(hunyuan_transformer()))


@pytest.fixture
def applied(pipe: HunyuanVideoPipeline) -> Iterator[Apply]:
    yield lambda plan: apply_chipmunk(pipe, plan, EMPTY)
    remove_chipmunk(pipe)


def plan(keep: float = 0.25, patch: Any = VOXELS, **more: Any) -> Policy:
    return attention_only(keep, patch=patch, **more)


@pytest.mark.parametrize("merge", ["delta", "lse"])
@pytest.mark.parametrize("patch", [VOXELS, ()])
def test_everything_kept_is_dense(
    pipe: HunyuanVideoPipeline, applied: Apply, dense: Tensor, merge: str, patch: Any
) -> None:
    handle = applied(plan(1.0, patch, merge=merge))
    assert_close(hunyuan_latents(pipe), dense)
    report = handle.report()
    assert report.attention_density == 1.0 and report.mlp_density is None
    assert report.steps == ["full", "full", "sparse", "sparse", "full"]
    assert (report.full_calls, report.sparse_calls, report.dense_calls) == (9, 6, {})


def test_sparse_is_near_dense(pipe: HunyuanVideoPipeline, applied: Apply, dense: Tensor) -> None:
    handle = applied(plan(0.25))
    sparse = hunyuan_latents(pipe)
    assert_differs(sparse, dense)
    assert float((sparse - dense).abs().mean()) < 0.01 * float(dense.abs().mean())
    columns = IMAGE + 9
    assert handle.report().attention_density == pytest.approx((9 + round(0.25 * columns)) / columns)


def selections(pipe: HunyuanVideoPipeline, handle: Handle, **how: Any) -> list[Tensor]:
    """Every column set in force at a step's end, as a mask over all keys."""
    masks: list[Tensor] = []

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        deltas = [delta for layer in handle.engine._layers for delta in layer._deltas.values()]
        masks.extend(delta.columns.to_mask(IMAGE + 16) for delta in deltas if delta.columns is not None)
        return kwargs

    hunyuan_latents(pipe, callback_on_step_end=look, **how)
    return masks


def test_real_text_is_always_kept_and_padding_never(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    masks = selections(pipe, applied(plan(0.1, random=0.2)))
    assert masks
    for mask in masks:
        assert bool(mask[..., IMAGE : IMAGE + 9].all())
        assert not bool(mask[..., IMAGE + 9 :].any())


def test_padding_does_not_reach_the_video(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    applied(plan())
    prompt = hunyuan_prompt()
    first = hunyuan_latents(pipe, **prompt)
    prompt["prompt_embeds"][:, 9:] += 1.0
    assert torch.equal(hunyuan_latents(pipe, **prompt), first)


def test_no_padding_at_all(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    prompt = hunyuan_prompt(lengths=(16,))
    stock = hunyuan_latents(pipe, **prompt)
    applied(plan(1.0))
    assert_close(hunyuan_latents(pipe, **prompt), stock)


def test_dense_layers_run_without_a_mask(
    pipe: HunyuanVideoPipeline, applied: Apply, dense: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock mask costs 1.5× on an H200; keys cut to the real length give the same numbers."""
    masks: list[bool] = []
    stock = F.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask is not None)
        return stock(*args, attn_mask=attn_mask, **kwargs)

    handle = applied(plan(dense_layers=9, patch=()))
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert_close(hunyuan_latents(pipe), dense)
    assert masks.count(False) == 3 * 5
    assert masks.count(True) == 5  # the refiner's
    assert handle.report().dense_calls == {"one of the first 9 layers": 15}


def test_the_length_is_read_once_per_generation(
    pipe: HunyuanVideoPipeline, applied: Apply, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = applied(plan())
    reads: list[int] = []
    stock = Tensor.tolist

    def watched(self: Tensor) -> Any:
        reads.append(1)
        return stock(self)

    enter = hunyuan.HunyuanAdapter.enter

    def watching(self: Any, inputs: Any, fresh: bool) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", watched)
            return enter(self, inputs, fresh)

    monkeypatch.setattr(hunyuan.HunyuanAdapter, "enter", watching)
    hunyuan_latents(pipe)
    assert len(reads) == 1
    hunyuan_latents(pipe, **hunyuan_prompt(lengths=(5,)))
    assert len(reads) == 2
    assert handle.report().attention_density == pytest.approx((5 + round(0.25 * 149)) / 149)


def test_a_batch_of_equal_lengths(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    prompt = hunyuan_prompt(lengths=(7, 7))
    stock = hunyuan_latents(pipe, **prompt)
    handle = applied(plan(1.0))
    assert_close(hunyuan_latents(pipe, **prompt), stock)
    assert handle.report().dense_calls == {}


def test_a_batch_of_different_lengths_stays_dense(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    prompt = hunyuan_prompt(lengths=(12, 5))
    stock = hunyuan_latents(pipe, **prompt)
    handle = applied(plan(patch=()))
    assert torch.equal(hunyuan_latents(pipe, **prompt), stock)
    assert handle.report().dense_calls == {"prompts of different lengths in one batch": 15}


def test_guidance_branches_with_prompts_of_different_lengths(
    pipe: HunyuanVideoPipeline, applied: Apply
) -> None:
    negative = hunyuan_prompt(lengths=(4,), seed=3)
    how: dict[str, Any] = {"true_cfg_scale": 2.0} | {f"negative_{k}": v for k, v in negative.items()}
    stock = hunyuan_latents(pipe, **how)
    handle = applied(plan(1.0))
    assert_close(hunyuan_latents(pipe, **how), stock)
    assert handle.report().sparse_calls == 2 * 6


def fresh(plan: Policy, **how: Any) -> Tensor:
    """What a process that did nothing else gives."""
    pipe = hunyuan_pipeline(hunyuan_transformer())
    apply_chipmunk(pipe, plan, EMPTY)
    return hunyuan_latents(pipe, **how)


def test_generations_in_a_row_and_another_size(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    applied(plan())
    first = hunyuan_latents(pipe)
    assert torch.equal(hunyuan_latents(pipe), first)
    for how in (
        {"size": (128, 96)},
        {"frames": 5},
        {"prompt_embeds": hunyuan_prompt(seed=2)["prompt_embeds"]},
    ):
        assert torch.equal(hunyuan_latents(pipe, **how), fresh(plan(), **how))


def test_the_refiner_is_untouched_and_everything_is_restored(
    pipe: HunyuanVideoPipeline, dense: Tensor
) -> None:
    transformer = pipe.transformer
    stock = dict(transformer.attn_processors)
    apply_chipmunk(pipe, plan(), EMPTY)
    changed = {name for name, was in stock.items() if transformer.attn_processors[name] is not was}
    assert len(changed) == 3 and not any("refiner" in name for name in changed)
    hunyuan_latents(pipe)
    remove_chipmunk(pipe)
    assert all(transformer.attn_processors[name] is was for name, was in stock.items())
    hooked = (transformer, transformer.x_embedder, transformer.rope, transformer.proj_out)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooked)
    assert torch.equal(hunyuan_latents(pipe), dense)


def test_the_order_alone_changes_nothing_but_rounding(
    pipe: HunyuanVideoPipeline, applied: Apply, dense: Tensor
) -> None:
    applied(Policy("order", None, None, ((2, 5, 3), (1, 2, 2))))
    assert_close(hunyuan_latents(pipe), dense)


def test_first_frame_conditioning_keeps_the_models_order() -> None:
    transformer = hunyuan_transformer(image_condition_type="token_replace")
    handle = apply_chipmunk(transformer, plan(1.0), EMPTY)
    prompt = hunyuan_prompt()
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 3, 12, 16, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": prompt["prompt_embeds"],
        "encoder_attention_mask": prompt["prompt_attention_mask"],
        "pooled_projections": prompt["pooled_prompt_embeds"],
        "guidance": torch.tensor([6000.0]),
    }
    with torch.no_grad():
        ours = transformer(**inputs).sample
        remove_chipmunk(transformer)
        assert_close(ours, transformer(**inputs).sample)
        handle = apply_chipmunk(transformer, plan(1.0), EMPTY)
        transformer(**inputs)
    assert any("first-frame tokens" in note for note in handle.report().notes)


def test_context_parallel_stays_dense(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    """A shard of the sequence is not the sequence: keys must not be cut."""
    handle = applied(plan(patch=()))
    attn = pipe.transformer.single_transformer_blocks[0].attn
    attn.processor._parallel_config = object()
    handle.engine.begin(())
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(AttributeError):  # the stock path asks our dummy for its mesh
        attn(torch.randn(1, 16, 256), encoder_hidden_states=torch.randn(1, 4, 256), attention_mask=mask)
    assert handle.report().dense_calls == {"context parallel": 1}


def test_mlps_stay_dense_and_say_so(pipe: HunyuanVideoPipeline, applied: Apply) -> None:
    handle = applied(replace(policy(1.0), patch=()))
    hunyuan_latents(pipe)
    assert any("MLPs stay dense" in note for note in handle.report().notes)
    assert {layer.kind for layer in handle.report().layers} == {"attention"}
