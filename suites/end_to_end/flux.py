"""FLUX subjects through diffusers' FluxPipeline: the shipped model, a checkpoint, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suites.end_to_end.errors import UsageError, unknown
from suites.end_to_end.subject import Subject, build_random, load_pipeline, parse_size, prompt_seed

SHIPPED = Path(__file__).parent.parent / "models" / "flux-shapes"

# What FluxTransformer2DModel takes. FLUX.1-dev is the class's defaults with guidance (11.9 B parameters).
RANDOM: dict[str, dict[str, Any]] = {
    "flux-dev": {"guidance_embeds": True},
    "tiny": {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 24, 24),
    },
}
TEXT_TOKENS = {"flux-dev": 512, "tiny": 32}
SIZES = {"flux-dev": "1280x768", "tiny": "256"}


def flux_subject(
    *,
    model: str | None,
    random_weights: str | None,
    size: str | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Subject, dict[str, Any]]:
    """The subject and the settings that name it in the record."""
    if random_weights is not None:
        pipe = _random_pipeline(random_weights, device, dtype, seed)
        name = f"random {random_weights}"
        size = size or SIZES[random_weights]
    else:
        if model is None and not (SHIPPED / "model_index.json").is_file():
            raise UsageError(
                f"the shipped model is not at {SHIPPED}; give --model FOLDER or --random-weights tiny"
            )
        pipe = load_pipeline(model or str(SHIPPED), "FluxPipeline", device, dtype)
        name = Path(model).name if model else SHIPPED.name
        size = size or "512"
    width, height = parse_size(size, pipe.vae_scale_factor * 2, "this FLUX model")
    dimensions = {"width": width, "height": height}

    if random_weights is None:
        text_tokens = min(512, pipe.tokenizer_2.model_max_length)

        def inputs(prompt: str, seed: int) -> dict[str, Any]:
            return {"prompt": prompt, "max_sequence_length": text_tokens, "output_type": "np", **dimensions}

        def array(output: Any) -> NDArray:
            return np.asarray(output[0], dtype=np.float32)
    else:

        def inputs(prompt: str, seed: int) -> dict[str, Any]:
            embeddings = _random_embeddings(
                pipe.transformer.config, TEXT_TOKENS[random_weights], prompt_seed(prompt, seed)
            )
            return {
                **{key: value.to(device, dtype) for key, value in embeddings.items()},
                "output_type": "latent",
                **dimensions,
            }

        def array(output: Any) -> NDArray:
            latents = pipe._unpack_latents(output, height, width, pipe.vae_scale_factor)
            return latents[0].permute(1, 2, 0).float().cpu().numpy()

    subject = Subject(
        pipe=pipe,
        name=name,
        trained=random_weights is None,
        inputs=inputs,
        warm_inputs=inputs,
        array=array,
        value_range=1.0 if random_weights is None else None,
        dense_note="diffusers' own FluxPipeline, unchanged (scaled_dot_product_attention)",
    )
    return subject, {"width": width, "height": height}


def _random_pipeline(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    if name not in RANDOM:
        raise unknown("random weights", name, RANDOM)
    transformer = build_random(lambda: FluxTransformer2DModel(**RANDOM[name]), device, dtype, seed)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def _random_embeddings(config: Any, tokens: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, tokens, config.joint_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=generator),
    }
