"""Training and FluxPipeline must mean the same thing by time, noise, packing, positions and latents."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from suites.flux_shapes import flow
from suites.flux_shapes.autoencoder import encode, standardise
from suites.flux_shapes.clock import Clock, Log
from suites.flux_shapes.denoiser import DenoiserTrainer, Recipe, Task
from suites.flux_shapes.drawing import draw
from suites.flux_shapes.models import MINIATURE, Parts, build
from suites.flux_shapes.scenes import random_scenes


@pytest.fixture(scope="module")
def parts() -> Parts:
    built = build(MINIATURE, "cpu", seed=1)
    standardise(built.vae, size=32, batch=4, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the identity that the blocks start as
        for parameter in built.denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return built


def test_velocity_is_the_transformer_s_forward(parts: Parts) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens, text = torch.randn(2, 16, 16, generator=generator), torch.randn(2, 8, 16, generator=generator)
    pooled, t = torch.randn(2, 16, generator=generator), torch.tensor([0.25, 0.9])
    transformer = parts.denoiser.transformer
    image_ids = torch.tensor([[0, y, x] for y in range(4) for x in range(4)]).float()
    expected = transformer(
        hidden_states=tokens,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        img_ids=image_ids,
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]
    rope = flow.rotary(transformer, side=4, text_length=8, stride=1, device="cpu")
    got = flow.velocity(transformer, tokens, t, text, pooled, rope)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    strided = flow.rotary(transformer, side=4, text_length=8, stride=2, device="cpu")
    assert not torch.allclose(
        flow.velocity(transformer, tokens, t, text, pooled, strided), expected, atol=1e-3
    )


def test_the_pipeline_with_a_perfect_velocity_restores_the_picture(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the velocity that training aims at, FluxPipeline must end at the encoded picture itself."""
    pictures = draw(random_scenes(2, torch.Generator().manual_seed(5)), 64)
    with torch.no_grad():
        clean = flow.pack(encode(parts.vae, pictures))
        expected = parts.vae.decode(parts.vae.encode(pictures).latent_dist.mode()).sample

    def perfect(
        self: Any, hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        return ((hidden_states - clean) / timestep[:, None, None],)

    pipe = parts.pipeline()
    monkeypatch.setattr(pipe.transformer, "forward", types.MethodType(perfect, pipe.transformer))
    result = pipe(
        ["a red circle"] * 2,
        height=64,
        width=64,
        num_inference_steps=4,
        output_type="pt",
        max_sequence_length=16,
    )
    torch.testing.assert_close(result.images, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_standardise_keeps_what_is_restored() -> None:
    vae = build(MINIATURE, "cpu", seed=6).vae
    pictures = draw(random_scenes(3, torch.Generator().manual_seed(7)), 32)
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        restored = vae.decode(before.mode()).sample
        standardise(vae, size=32, batch=8, seed=8)
        after = vae.encode(pictures).latent_dist
        torch.testing.assert_close(vae.decode(after.mode()).sample, restored, rtol=1e-3, atol=1e-4)
        ratio = after.std / before.std
        torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
        assert encode(vae, pictures).std().item() == pytest.approx(1, abs=0.4)


def test_times_follow_the_sampler_s_shift() -> None:
    generator = torch.Generator().manual_seed(9)
    few, many = flow.random_times(20_000, 256, generator), flow.random_times(20_000, 4096, generator)
    assert few.min() > 0 and many.max() < 1
    # Shift s maps the median 1/2 to s / (1 + s).
    assert few.median().item() == pytest.approx(flow.shift_for(256) / (1 + flow.shift_for(256)), abs=0.02)
    assert many.median().item() == pytest.approx(flow.shift_for(4096) / (1 + flow.shift_for(4096)), abs=0.02)


def test_the_preview_sampler_is_the_pipeline_s(parts: Parts) -> None:
    """At stride 1 the sampler that judges half-trained models draws what FluxPipeline draws."""
    scenes = random_scenes(2, torch.Generator().manual_seed(10))
    noise = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(11))
    pipe = parts.pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = [scenes.describe(row).caption() for row in range(2)]
    expected = pipe(
        captions,
        height=64,
        width=64,
        num_inference_steps=3,
        latents=noise,
        output_type="pt",
        max_sequence_length=64,
    ).images
    log = Log(Clock(60.0), Path("unused"))
    trainer = DenoiserTrainer(parts, Recipe(), 0, contextlib.nullcontext, log)
    task = Task(size=64, batch=2, stride=1)
    got = trainer.draw_from(noise, scenes, task, steps=3)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(trainer.sample(scenes, task, 3, seed=1), got, atol=1e-2)


def test_packing_comes_undone() -> None:
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(flow.unpack(flow.pack(latents), side=4), latents)


def test_text_encoders_learn_slower_than_the_transformer() -> None:
    built = build(MINIATURE, "cpu", seed=12)
    before = {name: p.clone() for name, p in built.denoiser.named_parameters()}
    recipe = Recipe(text_rate=0.25, weight_decay=0.0)
    trainer = DenoiserTrainer(built, recipe, 0, contextlib.nullcontext, Log(Clock(60.0), Path("unused")))
    for _ in range(3):  # the output starts at zero: what lies before it learns from the second step on
        trainer.train_step(Task(size=32, batch=2, stride=2), rate=1e-3)
    moved: dict[str, float] = {}
    for name, p in built.denoiser.named_parameters():
        part = name.split(".")[0]
        moved[part] = max(moved.get(part, 0.0), (p - before[name]).abs().max().item())
    # Adam moves a weight by about its rate in a step, three times here.
    assert 1e-3 < moved["transformer"] < 4e-3
    assert 0 < moved["t5"] < 1e-3
    assert 0 < moved["clip"] < 1e-3
