"""FLUX through its own pipeline: dense where it must be, sparse where it may, clean between generations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from diffusers import FluxPipeline
from torch import Tensor

from chipmunk_kernels.delta.policy import AttentionPolicy, Policy
from chipmunk_kernels.integrations.diffusers import apply_chipmunk, remove_chipmunk
from tests.integrations.conftest import SMALL, Apply
from tests.integrations.helpers import (
    EMPTY,
    assert_close,
    assert_differs,
    attention_only,
    mlp_only,
    policy,
)
from tests.integrations.models import flux_latents, flux_pipeline, flux_prompt, flux_transformer


@pytest.mark.parametrize("merge", ["delta", "lse"])
@pytest.mark.parametrize("patch", [((8, 8), (4, 4)), ((5, 5),), ()])
def test_everything_kept_is_dense(
    pipe: FluxPipeline, applied: Apply, dense: Tensor, merge: str, patch: Any
) -> None:
    handle = applied(policy(1.0, patch=patch, merge=merge))
    assert_close(flux_latents(pipe, size=SMALL), dense)
    report = handle.report()
    assert report.attention_density == report.mlp_density == 1.0
    assert report.dense_calls == {}
    assert report.sparse_calls == 3 * 3 + 3 * 4  # steps 2, 3, 5 of three attentions; 1, 2, 3, 5 of three MLPs
    assert report.full_calls == 3 * 3 + 3 * 2


@pytest.mark.parametrize("merge", ["delta", "lse"])
def test_sparse_is_near_dense_and_says_what_it_did(
    pipe: FluxPipeline, applied: Apply, dense: Tensor, merge: str
) -> None:
    handle = applied(policy(0.25, merge=merge))
    sparse = flux_latents(pipe, size=SMALL)
    assert_differs(sparse, dense)
    assert float((sparse - dense).abs().mean()) < 0.01 * float(dense.abs().mean())
    report = handle.report()
    assert report.steps == ["full", "sparse", "sparse", "sparse", "full", "sparse"]
    columns = 24 + 96
    assert report.attention_density == pytest.approx((24 + round(0.25 * columns)) / columns)
    assert report.mlp_density == pytest.approx(0.25)
    assert [layer.name for layer in report.layers] == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
        "transformer_blocks.0.ff",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.1.proj_mlp",
    ]
    assert any("6 steps" in note for note in report.notes)


def test_cache_bytes(pipe: FluxPipeline, applied: Apply) -> None:
    """Every tensor that lives between two steps, counted by hand."""
    handle = applied(policy(0.25))
    flux_latents(pipe, size=SMALL)
    rows, text, width, heads, neurons = 120, 24, 256, 2, 1024
    groups, kept = -(-rows // 32), text + round(0.25 * rows)
    attention = 4 * (rows * width + heads * rows + heads * groups * (kept + 1))
    picked = round(0.25 * neurons)
    mlp = [
        4 * (m * neurons + m * width + g * neurons + g * (picked + 1)) for m, g in ((96, 3), (rows, groups))
    ]
    weights = 4 * neurons * width
    assert handle.report().cache_bytes == 3 * attention + mlp[0] + 2 * mlp[1] + 3 * weights


def test_caches_are_dropped_at_the_end_of_a_generation(pipe: FluxPipeline, applied: Apply) -> None:
    handle = applied(policy())
    seen = []

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(sum(layer.cache_bytes for layer in handle.engine._layers))
        return kwargs

    flux_latents(pipe, size=SMALL, callback_on_step_end=look)
    assert max(seen) == handle.report().cache_bytes > 0
    assert sum(layer.cache_bytes for layer in handle.engine._layers) == 0


def fresh(plan: Policy, **how: Any) -> Tensor:
    """What a process that did nothing else gives."""
    pipe = flux_pipeline(flux_transformer())
    apply_chipmunk(pipe, plan, EMPTY)
    return flux_latents(pipe, **how)


def test_two_generations_in_a_row(pipe: FluxPipeline, applied: Apply) -> None:
    applied(policy(random=0.05))
    first = flux_latents(pipe, size=SMALL)
    assert torch.equal(flux_latents(pipe, size=SMALL), first)
    assert torch.equal(flux_latents(pipe, size=SMALL, seed=5), fresh(policy(random=0.05), size=SMALL, seed=5))


@pytest.mark.parametrize("size", [(192, 128), (256, 96), (128, 128)])
def test_changed_resolution(pipe: FluxPipeline, applied: Apply, size: tuple[int, int]) -> None:
    """The first two have as many tokens as before in another grid: positions and token order must follow."""
    applied(policy())
    flux_latents(pipe, size=SMALL)
    assert torch.equal(flux_latents(pipe, size=size), fresh(policy(), size=size))


def test_two_models_in_one_process(pipe: FluxPipeline, applied: Apply) -> None:
    """One generates whole pictures in the midst of the other's generation."""
    applied(policy())
    other = flux_pipeline(flux_transformer(seed=9))
    apply_chipmunk(other, policy(0.5), EMPTY)
    alone = flux_latents(other, size=(128, 128))

    def between(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 2):
            assert torch.equal(flux_latents(other, size=(128, 128)), alone)
        return kwargs

    together = flux_latents(pipe, size=SMALL, callback_on_step_end=between)
    assert torch.equal(together, fresh(policy(), size=SMALL))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("whole_pipe", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_interrupted_generation(pipe: FluxPipeline, whole_pipe: bool, inside: bool) -> None:
    """Stopped between steps or in the middle of a forward: the next generation starts clean."""
    apply_chipmunk(pipe if whole_pipe else pipe.transformer, policy(), EMPTY)
    block = pipe.transformer.single_transformer_blocks[0].norm
    count = []

    def stop(*args: Any) -> Any:
        count.append(1)
        if len(count) == 4:
            raise Stopped
        return args[-1] if not inside else None

    how: dict[str, Any] = {}
    if inside:
        hook = block.register_forward_pre_hook(stop)
    else:
        how["callback_on_step_end"] = stop
    with pytest.raises(Stopped):
        flux_latents(pipe, size=SMALL, **how)
    if inside:
        hook.remove()
    assert torch.equal(flux_latents(pipe, size=SMALL), fresh(policy(), size=SMALL))


def test_remove_restores_everything(pipe: FluxPipeline, dense: Tensor) -> None:
    transformer = pipe.transformer
    processors = dict(transformer.attn_processors)
    keys, modules = list(transformer.state_dict()), [name for name, _ in transformer.named_modules()]
    apply_chipmunk(pipe, policy(), EMPTY)
    assert list(transformer.state_dict()) == keys
    flux_latents(pipe, size=SMALL)
    remove_chipmunk(pipe)
    assert all(transformer.attn_processors[name] is stock for name, stock in processors.items())
    assert [name for name, _ in transformer.named_modules()] == modules
    assert not any("forward" in module.__dict__ for module in transformer.modules())
    assert not transformer._forward_hooks and not transformer._forward_pre_hooks
    assert torch.equal(flux_latents(pipe, size=SMALL), dense)
    remove_chipmunk(pipe)  # nothing left to remove: no error


def test_attention_backend_survives(pipe: FluxPipeline) -> None:
    attn = pipe.transformer.transformer_blocks[0].attn  # the model's own method would change a global default
    attn.set_attention_backend("native")
    apply_chipmunk(pipe, policy(), EMPTY)
    assert attn.processor._attention_backend == "native"
    attn.set_attention_backend("_native_math")
    remove_chipmunk(pipe)
    assert attn.processor._attention_backend == "_native_math"


def denoise(transformer: Any, branches: list[str | None], steps: int = 6) -> dict[int, list[Tensor]]:
    """A loop as a user writes it: every branch predicts at every step; the first one moves the latents."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline as Stock

    ids = Stock._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32)
    x = torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(3))
    outputs: dict[int, list[Tensor]] = {number: [] for number in range(len(branches))}
    for step in range(steps):
        for number, name in enumerate(branches):
            prompt = flux_prompt(seed=number)
            inputs = {
                "hidden_states": x,
                "encoder_hidden_states": prompt["prompt_embeds"],
                "pooled_projections": prompt["pooled_prompt_embeds"],
                "timestep": torch.tensor([1 - step / steps]),
                "guidance": torch.ones(1),
                "img_ids": ids,
                "txt_ids": torch.zeros(24, 3),
                "return_dict": False,
            }
            with torch.no_grad():
                if name is None:
                    outputs[number].append(transformer(**inputs)[0])
                else:
                    with transformer.cache_context(name):
                        outputs[number].append(transformer(**inputs)[0])
        x = x - outputs[0][-1] / steps
    return outputs


@pytest.mark.parametrize("names", [["cond", "uncond"], [None, None]])
def test_guidance_branches_are_kept_apart(names: list[str | None]) -> None:
    """A branch predicts to the bit what it predicts without the other beside it."""
    transformer = flux_transformer()
    handle = apply_chipmunk(transformer, policy(), EMPTY)
    alone = denoise(transformer, names[:1])[0]
    handle.reset()
    both = denoise(transformer, names)
    assert all(torch.equal(one, other) for one, other in zip(both[0], alone, strict=True))
    assert handle.report().steps == ["full", "sparse", "sparse", "sparse", "full", "sparse"]
    assert handle.report().sparse_calls == 2 * (3 * 3 + 3 * 4)
    remove_chipmunk(transformer)
    stock = denoise(transformer, names)
    assert_differs(both[1][-1], stock[1][-1])
    assert float((both[1][-1] - stock[1][-1]).abs().mean()) < 0.05


def test_true_guidance_through_the_pipeline(pipe: FluxPipeline) -> None:
    negative = flux_prompt(seed=4)
    how: dict[str, Any] = {
        "size": SMALL,
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": negative["prompt_embeds"],
        "negative_pooled_prompt_embeds": negative["pooled_prompt_embeds"],
    }
    stock = flux_latents(pipe, **how)
    handle = apply_chipmunk(pipe, policy(1.0), EMPTY)
    assert_close(flux_latents(pipe, **how), stock)
    assert len(handle.report().steps) == 6
    assert handle.report().sparse_calls == 2 * (3 * 3 + 3 * 4)


def test_a_batch(pipe: FluxPipeline, applied: Apply) -> None:
    how: dict[str, Any] = {"size": SMALL, **flux_prompt(batch=2)}
    stock = flux_latents(pipe, **how)
    applied(policy(1.0))
    assert_close(flux_latents(pipe, **how), stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Everything kept differs from dense by no more than dense differs from float32."""
    exact = flux_latents(flux_pipeline(flux_transformer()), size=SMALL)
    pipe = flux_pipeline(flux_transformer(dtype=dtype))
    stock = flux_latents(pipe, size=SMALL).float()
    apply_chipmunk(pipe, policy(1.0), EMPTY)
    sparse = flux_latents(pipe, size=SMALL).float()
    assert float((sparse - exact).abs().max()) <= 2 * float((stock - exact).abs().max())
    remove_chipmunk(pipe)
    handle = apply_chipmunk(pipe, policy(0.25), EMPTY)
    assert bool(torch.isfinite(flux_latents(pipe, size=SMALL)).all())
    assert handle.report().dense_calls == {}


def test_fused_projections(pipe: FluxPipeline, applied: Apply, dense: Tensor) -> None:
    pipe.transformer.fuse_qkv_projections()
    handle = applied(policy(1.0))
    assert_close(flux_latents(pipe, size=SMALL), dense)
    assert handle.report().dense_calls == {}


def test_dense_layers_are_the_first_of_both_kinds(pipe: FluxPipeline, applied: Apply) -> None:
    handle = applied(attention_only(dense_layers=2))
    flux_latents(pipe, size=SMALL)
    report = handle.report()
    assert report.dense_calls == {"one of the first 2 layers": 2 * 6}
    assert [layer.sparse_calls for layer in report.layers] == [0, 0, 3]


def test_all_dense_layers_is_the_stock_model(pipe: FluxPipeline, applied: Apply, dense: Tensor) -> None:
    plan = mlp_only(dense_layers=9, text_stream=True)
    applied(replace(plan, attention=AttentionPolicy(dense_layers=9), patch=()))
    assert torch.equal(flux_latents(pipe, size=SMALL), dense)


def test_the_text_streams_mlp_is_left_alone_unless_asked_for(pipe: FluxPipeline, applied: Apply) -> None:
    handle = applied(mlp_only(text_stream=True))
    flux_latents(pipe, size=SMALL)
    assert handle.report().dense_calls == {"fewer than 2 row groups": 6}  # 24 text tokens are one group of 32
    remove_chipmunk(pipe)
    handle = apply_chipmunk(pipe, mlp_only(text_stream=True), EMPTY)
    flux_latents(pipe, size=SMALL, **flux_prompt(tokens=40))
    layers = {layer.name: layer.sparse_calls for layer in handle.report().layers}
    assert layers["transformer_blocks.0.ff_context"] == 4
    remove_chipmunk(pipe)
    handle = apply_chipmunk(pipe, mlp_only(), EMPTY)
    assert "transformer_blocks.0.ff_context" not in {layer.name for layer in handle.report().layers}


def test_the_order_alone_changes_nothing_but_rounding(
    pipe: FluxPipeline, applied: Apply, dense: Tensor
) -> None:
    applied(Policy("order", None, None, ((5, 3), (2, 2))))
    assert_close(flux_latents(pipe, size=SMALL), dense)


def test_controlnet_residuals_follow_the_order() -> None:
    transformer = flux_transformer()
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": flux_prompt()["prompt_embeds"],
        "pooled_projections": flux_prompt()["pooled_prompt_embeds"],
        "timestep": torch.tensor([0.5]),
        "guidance": torch.ones(1),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32),
        "txt_ids": torch.zeros(24, 3),
        "controlnet_block_samples": [torch.randn(1, 96, 256)],
        "controlnet_single_block_samples": [torch.randn(1, 96, 256)],
    }
    with torch.no_grad():
        stock = transformer(**inputs).sample
        before = dict(inputs)
        apply_chipmunk(transformer, Policy("order", None, None, ((4, 4),)), EMPTY)
        output = transformer(**inputs)
    assert_close(output.sample, stock)
    assert all(inputs[name] is value for name, value in before.items())


def test_ids_without_a_raster_keep_the_models_order() -> None:
    transformer = flux_transformer()
    handle = apply_chipmunk(transformer, policy(1.0), EMPTY)
    ids = torch.zeros(96, 3)
    ids[48:, 0] = 1  # a reference image beside the picture
    prompt = flux_prompt()
    arguments = (torch.randn(1, 96, 16), prompt["prompt_embeds"], prompt["pooled_prompt_embeds"])
    with torch.no_grad():  # positional arguments, as well
        transformer(*arguments, torch.tensor([0.5]), ids, torch.zeros(24, 3), torch.ones(1))
    assert any("no single raster" in note for note in handle.report().notes)


def test_compiled_blocks(pipe: FluxPipeline, applied: Apply, dense: Tensor) -> None:
    """The graph breaks around each delta, and no step number is compiled in."""
    handle = applied(policy(1.0))
    counters = torch._dynamo.utils.counters
    pipe.transformer.compile_repeated_blocks(backend="eager")
    try:
        assert_close(flux_latents(pipe, size=SMALL), dense)
        frames = counters["stats"]["unique_graphs"]
        assert_close(
            flux_latents(pipe, size=SMALL, steps=8),
            flux_latents(flux_pipeline(flux_transformer()), size=SMALL, steps=8),
        )
        assert counters["stats"]["unique_graphs"] == frames
        assert handle.report().sparse_calls == 3 * 5 + 3 * 6
    finally:
        torch._dynamo.reset()
