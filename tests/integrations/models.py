"""Tiny random models and pipelines: real architecture, two or three layers, seconds on one core."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor

from tests.factories import generator


def flux_transformer(
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> FluxTransformer2DModel:
    """One double and two single blocks, 2 heads of 128."""
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**{**config, **changes}).eval().to(dtype)


def flux_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A pipeline of the transformer and a scheduler alone."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_prompt(
    batch: int = 1, tokens: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    rng = generator(seed + 70)
    return {
        "prompt_embeds": torch.randn(batch, tokens, 32, generator=rng).to(dtype),
        "pooled_prompt_embeds": torch.randn(batch, 32, generator=rng).to(dtype),
    }


def flux_latents(
    pipe: FluxPipeline, *, steps: int = 6, size: tuple[int, int] = (192, 256), seed: int = 0, **more: Any
) -> Tensor:
    """Latents after a run: `size` pixels make (height / 16) × (width / 16) image tokens."""
    inputs = flux_prompt(dtype=pipe.transformer.dtype) | more
    output = pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=generator(seed),
        output_type="latent",
        **inputs,
    )
    return output.images


def hunyuan_transformer(
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> HunyuanVideoTransformer3DModel:
    """One double and two single blocks, 2 heads of 128, one refiner layer."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 32,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (16, 56, 56),
    }
    torch.manual_seed(seed)
    return HunyuanVideoTransformer3DModel(**{**config, **changes}).eval().to(dtype)


def hunyuan_pipeline(transformer: HunyuanVideoTransformer3DModel) -> HunyuanVideoPipeline:
    """A pipeline of the transformer and a scheduler alone."""
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hunyuan_prompt(lengths: tuple[int, ...] = (9,), tokens: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Prompts padded to `tokens`, of which `lengths` are real."""
    rng = generator(seed + 80)
    mask = torch.arange(tokens).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    return {
        "prompt_embeds": torch.randn(len(lengths), tokens, 32, generator=rng),
        "pooled_prompt_embeds": torch.randn(len(lengths), 16, generator=rng),
        "prompt_attention_mask": mask.long(),
    }


def hunyuan_latents(
    pipe: HunyuanVideoPipeline,
    *,
    steps: int = 5,
    seed: int = 0,
    size: tuple[int, int] = (96, 128),
    frames: int = 9,
    **more: Any,
) -> Tensor:
    """Latents after a run: (frames − 1) / 4 + 1 × height / 16 × width / 16 video tokens."""
    inputs = hunyuan_prompt() | more
    output = pipe(
        height=size[0],
        width=size[1],
        num_frames=frames,
        num_inference_steps=steps,
        generator=generator(seed),
        output_type="latent",
        **inputs,
    )
    return output.frames
