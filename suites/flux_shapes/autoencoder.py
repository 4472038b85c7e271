"""Stage one: train the autoencoder on drawn scenes, then set its latent shift and scale from data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from suites.flux_shapes.clock import Clock, Log
from suites.flux_shapes.drawing import draw
from suites.flux_shapes.scenes import scene_batches

KL_WEIGHT = 1e-4
"""On the mean KL per latent entry, beside a mean error per pixel: keeps latents smooth at no visible cost."""
LEARNING_RATE = 2e-3


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Latents `(B, C, H/4, W/4)` of pictures, shifted and scaled as the pipeline expects them."""
    latents = vae.encode(pictures).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures `(B, 3, H, W)` in [0, 1] from latents as `encode` gives them."""
    restored = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (restored.float() / 2 + 0.5).clamp(0, 1)


def train_autoencoder(
    vae: Any,
    seconds: float,
    size: int,
    batch: int,
    seed: int,
    autocast: Any,
    clock: Clock,
    log: Log,
    most_steps: int,
) -> None:
    """Train in place for `seconds`; the rate falls with the share of the time used."""
    device = next(vae.parameters()).device
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    torch.manual_seed(seed)
    start, step = clock.elapsed_s(), 0
    for scenes in scene_batches(batch, seed, device):
        progress = (clock.elapsed_s() - start) / seconds
        if progress >= 1 or step >= most_steps:
            break
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = LEARNING_RATE * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        pictures = draw(scenes, size)
        with autocast():
            posterior = vae.encode(pictures).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        error = restored - pictures
        kl = (
            0.5
            * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        )
        loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0 or step == 1:
            psnr = psnr_db(error.square().mean().item())
            log.add("autoencoder", step=step, loss=loss.item(), kl=kl.item(), psnr_db=psnr)
    standardise(vae, size, batch, seed + 1)
    log.add("latents", steps=step, **{k: vae.config[k] for k in ("shift_factor", "scaling_factor")})


def psnr_db(squared_error: float) -> float:
    """Peak signal to noise of pictures in [-1, 1] from their mean squared error."""
    return 10 * math.log10(4 / max(squared_error, 1e-12))


@torch.no_grad()
def standardise(vae: Any, size: int, batch: int, seed: int) -> None:
    """Give latent channels zero mean and unit deviation over drawn scenes; what is restored stays the same.

    The change of scale is folded into the two 1×1 convolutions around the latents; what little is left of a
    global mean and deviation becomes the pipeline's `shift_factor` and `scaling_factor`. A nearly unused
    channel is not blown up beyond four times its size.
    """
    device = next(vae.parameters()).device
    pictures = draw(next(scene_batches(batch, seed, device)), size)
    latents = vae.encode(pictures).latent_dist.mode().float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    std = std.clamp(min=0.25 * std.mean().item())
    inner, outer, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    inner.weight[:channels] /= std[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - mean) / std
    inner.bias[channels:] -= 2 * std.log()  # the second half is the log variance
    outer.bias += outer.weight[:, :, 0, 0] @ mean
    outer.weight *= std[None, :, None, None]
    latents = vae.encode(pictures).latent_dist.mode().float()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def restored_psnr_db(vae: Any, size: int, batch: int, seed: int) -> float:
    """How well pictures of `size` survive encoding and decoding."""
    device, dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
    pictures = draw(next(scene_batches(batch, seed, device)), size).to(dtype)
    restored = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    return psnr_db((restored.float().clamp(-1, 1) - pictures.float()).square().mean().item())
