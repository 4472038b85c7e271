"""FLUX with what others put on it: adapters, casts, processors and caches of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from chipmunk_kernels.integrations.diffusers import apply_chipmunk, remove_chipmunk
from tests.integrations.conftest import SMALL, Apply
from tests.integrations.helpers import (
    EMPTY,
    LoraLinear,
    assert_close,
    attention_only,
    mlp_only,
    policy,
)
from tests.integrations.models import flux_latents, flux_pipeline, flux_prompt, flux_transformer


def lora_everywhere(pipe: FluxPipeline) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[0].proj = LoraLinear.around(block.ff.net[0].proj)
    first, second = pipe.transformer.single_transformer_blocks
    first.proj_mlp = LoraLinear.around(first.proj_mlp)
    second.proj_out = LoraLinear.around(second.proj_out)


def test_unfused_lora_stays_dense(pipe: FluxPipeline) -> None:
    """The adapter may come after us, and go again."""
    handle = apply_chipmunk(pipe, replace(mlp_only(), patch=()), EMPTY)
    base = [block.ff.net[0].proj for block in pipe.transformer.transformer_blocks]
    lora_everywhere(pipe)
    adapted = flux_latents(pipe, size=SMALL)
    ((reason, calls),) = handle.report().dense_calls.items()
    assert "LoraLinear" in reason and "LoRA" in reason and calls == 3 * 6
    assert handle.report().sparse_calls == 0
    remove_chipmunk(pipe)
    assert torch.equal(flux_latents(pipe, size=SMALL), adapted)
    apply_chipmunk(pipe, mlp_only(), EMPTY)
    for block, linear in zip(pipe.transformer.transformer_blocks, base, strict=True):
        block.ff.net[0].proj = linear
    flux_latents(pipe, size=SMALL)


def test_lora_on_attention_projections_is_followed(pipe: FluxPipeline) -> None:
    """Queries, keys and values come out of the modules themselves, adapters included."""
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.attn.to_q = LoraLinear.around(block.attn.to_q)
    stock = flux_latents(pipe, size=SMALL)
    handle = apply_chipmunk(pipe, attention_only(1.0), EMPTY)
    assert_close(flux_latents(pipe, size=SMALL), stock)
    assert handle.report().dense_calls == {}


def test_weights_edited_in_place_between_generations(pipe: FluxPipeline, applied: Apply) -> None:
    """Fusing a LoRA writes into `.data`, which no version counter notices."""
    applied(mlp_only())
    flux_latents(pipe, size=SMALL)
    for block in pipe.transformer.single_transformer_blocks:
        block.proj_out.weight.data.mul_(0.5)
    edited = flux_latents(pipe, size=SMALL)
    other = flux_pipeline(flux_transformer())
    for block in other.transformer.single_transformer_blocks:
        block.proj_out.weight.data.mul_(0.5)
    apply_chipmunk(other, mlp_only(), EMPTY)
    assert torch.equal(edited, flux_latents(other, size=SMALL))


def test_layerwise_casting_stays_dense() -> None:
    """Weights stored in another dtype, cast by hooks around each module's forward."""
    stock, ours = (flux_pipeline(flux_transformer()) for _ in range(2))
    for pipe in (stock, ours):
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    handle = apply_chipmunk(ours, replace(mlp_only(), patch=()), EMPTY)
    how: dict[str, Any] = {"size": SMALL, **flux_prompt()}
    assert torch.equal(flux_latents(ours, **how), flux_latents(stock, **how))
    ((reason, _),) = handle.report().dense_calls.items()
    assert reason == "weight is float16, the input float32"


def test_autocast_and_autograd_stay_dense() -> None:
    transformer = flux_transformer()
    handle = apply_chipmunk(transformer, policy(), EMPTY)
    ids = FluxPipeline._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32)
    prompt = flux_prompt()
    arguments = (torch.randn(1, 96, 16), prompt["prompt_embeds"], prompt["pooled_prompt_embeds"])
    rest = (torch.tensor([0.5]), ids, torch.zeros(24, 3), torch.ones(1))
    transformer(*arguments, *rest).sample.mean().backward()
    assert handle.report().dense_calls == {"autograd is on: call under torch.no_grad()": 6}
    assert transformer.transformer_blocks[0].ff.net[2].weight.grad is not None
    handle.reset()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        transformer(*arguments, *rest)
    assert handle.report().dense_calls == {"autocast is on": 6}


def test_mask_context_parallel_and_calls_outside_stay_dense() -> None:
    transformer = flux_transformer()
    handle = apply_chipmunk(transformer, attention_only(), EMPTY)
    attn = transformer.single_transformer_blocks[0].attn
    x = torch.randn(1, 120, 256)
    with torch.no_grad():
        attn(x)
    assert list(handle.report().dense_calls) == ["called outside the transformer's forward: no step is known"]
    handle.reset()
    handle.engine.begin(())
    with torch.no_grad():
        attn(x, attention_mask=torch.ones(1, 1, 1, 120, dtype=torch.bool))
    assert handle.report().dense_calls == {"attention mask": 1}
    with torch.no_grad():
        assert attn.processor._why_dense(attn, x, None, None) is None
        attn.processor._parallel_config = object()
        assert attn.processor._why_dense(attn, x, None, None) == "context parallel"


def test_a_processor_of_ones_own_is_left_alone(pipe: FluxPipeline) -> None:
    class Mine(FluxAttnProcessor):
        pass

    mine = Mine()
    pipe.transformer.single_transformer_blocks[0].attn.set_processor(mine)
    handle = apply_chipmunk(pipe, attention_only(), EMPTY)
    assert pipe.transformer.single_transformer_blocks[0].attn.processor is mine
    later = Mine()
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(later)
    flux_latents(pipe, size=SMALL)
    notes = " | ".join(handle.report().notes)
    assert "single_transformer_blocks.0.attn: attention processor Mine: left as it is" in notes
    assert "1 attention processors were replaced after apply_chipmunk" in notes
    remove_chipmunk(pipe)
    assert pipe.transformer.single_transformer_blocks[1].attn.processor is later
    assert type(pipe.transformer.transformer_blocks[0].attn.processor) is FluxAttnProcessor


def test_another_cache_that_skips_blocks(pipe: FluxPipeline, dense: Tensor) -> None:
    """The step count must not drift where FirstBlockCache skips every block but the first."""
    from diffusers import FirstBlockCacheConfig

    handle = apply_chipmunk(pipe, policy(), EMPTY)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    skipped = flux_latents(pipe, size=SMALL)
    assert bool(torch.isfinite(skipped).all())
    report = handle.report()
    assert len(report.steps) == 6
    calls = {layer.name: layer.full_calls + layer.sparse_calls for layer in report.layers}
    assert calls["transformer_blocks.0.attn"] == 6
    assert calls["single_transformer_blocks.1.attn"] == 1
    assert torch.equal(flux_latents(pipe, size=SMALL), skipped)
    pipe.transformer.disable_cache()
    remove_chipmunk(pipe)
    assert torch.equal(flux_latents(pipe, size=SMALL), dense)


def test_a_cache_enabled_before_stays_outermost(pipe: FluxPipeline) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    handle = apply_chipmunk(pipe, policy(), EMPTY)
    flux_latents(pipe, size=SMALL)
    report = handle.report()
    assert sum("forward already wrapped" in note for note in report.notes) == 2
    calls = {layer.name: layer.full_calls + layer.sparse_calls for layer in report.layers}
    assert calls["single_transformer_blocks.1.attn"] == 1


def test_removing_beneath_another_cache_leaves_a_dense_model(pipe: FluxPipeline, dense: Tensor) -> None:
    from diffusers import FirstBlockCacheConfig

    apply_chipmunk(pipe, policy(), EMPTY)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))  # computes every block
    remove_chipmunk(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(flux_latents(pipe, size=SMALL), dense)
