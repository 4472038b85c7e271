"""HunyuanVideo subjects through diffusers' HunyuanVideoPipeline, and a dense baseline fair to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from suites.end_to_end.errors import UsageError, unknown
from suites.end_to_end.subject import Subject, build_random, load_pipeline, parse_size, prompt_seed

# What HunyuanVideoTransformer3DModel takes. The class's defaults are the real model (12.8 B parameters).
RANDOM: dict[str, dict[str, Any]] = {
    "hunyuan-video": {},
    "tiny": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (16, 24, 24),
    },
}
SIZES = {"hunyuan-video": ("1280x720", 129), "tiny": ("128", 9)}
TEXT_TOKENS = 256
# Prompts are padded to 256 tokens and most are a few dozen long: the padding is why diffusers masks.
VALID_TEXT_TOKENS = 64
WARM_FRAMES = 5


def hunyuan_subject(
    *,
    model: str | None,
    random_weights: str | None,
    size: str | None,
    frames: int | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Subject, dict[str, Any]]:
    """The subject and the settings that name it in the record."""
    if random_weights is not None:
        pipe = _random_pipeline(random_weights, device, dtype, seed)
        name = f"random {random_weights}"
        default_size, default_frames = SIZES[random_weights]
    elif model is not None:
        pipe = load_pipeline(model, "HunyuanVideoPipeline", device, dtype)
        pipe.vae.enable_tiling()  # 129 frames of 720p do not decode in one piece
        name = Path(model).name
        default_size, default_frames = SIZES["hunyuan-video"]
    else:
        raise UsageError(
            "no HunyuanVideo model is shipped: give --model or --random-weights (hunyuan-video, tiny)"
        )
    config = pipe.transformer.config
    spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    width, height = parse_size(size or default_size, spatial * config.patch_size, "HunyuanVideo")
    frames = frames or default_frames
    if frames < 1 or (frames - 1) % temporal:
        raise UsageError(f"--frames {frames}: expected 1 more than a multiple of {temporal} (129, 61, 9, …)")
    dimensions = {"width": width, "height": height}

    def inputs(prompt: str, seed: int, count: int = frames) -> dict[str, Any]:
        if random_weights is None:
            return {"prompt": prompt, "output_type": "np", "num_frames": count, **dimensions}
        embeddings = _random_embeddings(config, device, dtype, prompt_seed(prompt, seed))
        return {**embeddings, "output_type": "latent", "num_frames": count, **dimensions}

    def warm_inputs(prompt: str, seed: int) -> dict[str, Any]:
        return inputs(prompt, seed, min(frames, WARM_FRAMES))

    def array(output: Any) -> NDArray:
        if random_weights is None:
            return np.asarray(output[0], dtype=np.float32)
        return output[0].permute(1, 2, 3, 0).float().cpu().numpy()

    small = random_weights == "tiny"
    subject = Subject(
        pipe=pipe,
        name=name,
        trained=random_weights is None,
        inputs=inputs,
        warm_inputs=inputs if small else warm_inputs,
        array=array,
        value_range=1.0 if random_weights is None else None,
        dense=lambda: mask_free(pipe.transformer),
        dense_note="diffusers' own HunyuanVideoPipeline, padded text cut off instead of masked: the "
        "same result without the mask that slows attention",
        parts_in_run=not small,
    )
    return subject, {"width": width, "height": height, "frames": frames}


@contextmanager
def mask_free(transformer: Any) -> Iterator[None]:
    """Run the unchanged transformer without attention masks, by cutting the padded text tokens off.

    diffusers always passes a boolean mask that hides padded text, even when nothing is padded, and that alone
    makes attention about 1.5 times slower. No valid token ever sees a padded one, so cutting them off changes
    nothing; a speedup against the masked run would be a claim about diffusers, not about sparsity. Rows of
    different length raise ValueError.
    """

    def cut(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs["encoder_attention_mask"].bool()
        valid = int(mask[0].sum())
        if not bool((mask == mask[0]).all()) or not bool(mask[0, :valid].all()):
            raise ValueError("encoder_attention_mask: expected every row to hide the same trailing tokens")
        kwargs = dict(kwargs)
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :valid]
        kwargs["encoder_attention_mask"] = kwargs["encoder_attention_mask"][:, :valid]
        return args, kwargs

    def unmask(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": None}
        hidden, text, temb, _mask, *rest = args
        return (hidden, text, temb, None, *rest), kwargs

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [transformer.register_forward_pre_hook(cut, with_kwargs=True)]
    hooks += [block.register_forward_pre_hook(unmask, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _random_pipeline(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    if name not in RANDOM:
        raise unknown("random weights", name, RANDOM)
    transformer = build_random(lambda: HunyuanVideoTransformer3DModel(**RANDOM[name]), device, dtype, seed)
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _random_embeddings(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator("cpu").manual_seed(seed)
    mask = torch.zeros(1, TEXT_TOKENS)
    mask[:, :VALID_TEXT_TOKENS] = 1
    tensors = {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, config.text_embed_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "prompt_attention_mask": mask,
    }
    return {key: value.to(device, dtype) for key, value in tensors.items()}
