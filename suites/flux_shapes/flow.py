"""Flow matching as `FluxPipeline` samples it: x_t = (1 − t)·x_0 + t·noise, the model predicts noise − x_0."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Latents `(B, C, H, W)` to tokens `(B, H/2·W/2, 4C)`, one per 2×2 patch, as the pipeline packs them."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def rotary(
    transformer: Any, side: int, text_length: int, stride: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines for text and a square of `side`² image tokens, `stride` positions apart.

    The pipeline uses stride 1. A larger stride lets a small picture span the positions of a large one.
    """
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] += torch.arange(side, device=device)[:, None] * stride
    ids[..., 2] += torch.arange(side, device=device)[None, :] * stride
    return transformer.pos_embed(torch.cat([torch.zeros(text_length, 3, device=device), ids.view(-1, 3)]))


def velocity(
    transformer: Any, tokens: Tensor, t: Tensor, text: Tensor, pooled: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    """What `FluxTransformer2DModel.forward` computes, for tokens `(B, N, 4C)` at times `(B,)` in [0, 1].

    Written out so that rotary tables are made once, and time stays float32 under autocast (bfloat16 would
    round 1000·t by up to 2).
    """
    hidden, context = transformer.x_embedder(tokens), transformer.context_embedder(text)
    temb = transformer.time_text_embed(t * 1000, pooled)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        context, hidden = block(
            hidden_states=hidden, encoder_hidden_states=context, temb=temb, image_rotary_emb=rope
        )
    return transformer.proj_out(transformer.norm_out(hidden, temb))


def shift_for(tokens: int) -> float:
    """The time shift exp(mu) that the pipeline's scheduler applies for this many image tokens."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu)


def random_times(number: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Times `(number,)` to train at, on the generator's device.

    Half logit-normal, where most is learnt, half uniform, which is where the sampler's steps lie; both
    shifted as the sampler shifts. The slightly wide logit-normal (1.2) keeps the noisy end, where the layout
    is decided.
    """
    device = generator.device
    normal = torch.randn(number, generator=generator, device=device)
    even = torch.rand(number, generator=generator, device=device)
    coin = torch.rand(number, generator=generator, device=device)
    u = torch.where(coin < 0.5, torch.sigmoid(1.2 * normal), even)
    shift = shift_for(tokens)
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def sample(
    transformer: Any,
    tokens: Tensor,
    steps: int,
    text: Tensor,
    pooled: Tensor,
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    """Euler steps from noise to a picture's tokens, at the times that the pipeline's scheduler takes.

    Unlike the pipeline it takes any rotary tables, so that a model half way through training can be judged at
    the picture size and position stride that it has been trained at.
    """
    shift = shift_for(tokens.shape[1])
    times = torch.linspace(1, 1 / steps, steps)
    times = torch.cat([shift * times / (1 + (shift - 1) * times), torch.zeros(1)]).to(tokens.device)
    for now, then in itertools.pairwise(times):
        guess = velocity(transformer, tokens, now.expand(len(tokens)), text, pooled, rope)
        tokens = tokens + (then - now) * guess
    return tokens


def unpack(tokens: Tensor, side: int) -> Tensor:
    """The inverse of `pack` for square latents of `side`² tokens."""
    b, _, c = tokens.shape
    return (
        tokens.view(b, side, side, c // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(b, c // 4, 2 * side, 2 * side)
    )
