"""Stage two: teach the text encoders what captions say, before any picture depends on it.

Flow matching alone teaches them slowly: which of two things is above, say, changes few pixels of the error.
Linear heads that read every thing off its own words make it a classification that is learnt in seconds. The
heads are then thrown away; what they read stays in the encoders, a linear map away from the transformer's
inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suites.flux_shapes.clock import Clock, Log
from suites.flux_shapes.models import TEXT_LENGTH, Captioner, Denoiser
from suites.flux_shapes.scenes import (
    MOST_THINGS,
    MOST_WORDS,
    Scenes,
    caption_owners,
    meant_centres,
    scene_batches,
)
from suites.flux_shapes.words import BACKGROUNDS, COLOURS, SHAPES, SIZES

POSITIONS = (-0.64, -0.52, -0.47, 0.0, 0.47, 0.52, 0.64)
"""Where captions put the centres of things, on either axis: the classes of `column` and `row`."""
THING_CLASSES = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "column": len(POSITIONS),
    "row": len(POSITIONS),
}
SCENE_CLASSES = {"count": MOST_THINGS, "background": 1 + len(BACKGROUNDS), "soft": 2}
HELD_OUT_TEXT_SEED = 777_000
_ABSENT = -100  # cross_entropy's own mark for a target that does not count


@dataclass(frozen=True)
class TextRecipe:
    """How the text encoders are taught; batches of captions are cheap on a GPU and not on a CPU."""

    seconds: float = 20.0
    learning_rate: float = 2e-3
    batch: int = 512
    warmup_steps: int = 50
    most_steps: int = 10**9


def thing_targets(scenes: Scenes) -> dict[str, Tensor]:
    """Classes `(B, 3)` of each thing by name of THING_CLASSES; `_ABSENT` where there is no such thing."""
    centres = meant_centres(scenes)
    places = torch.tensor(POSITIONS, device=centres.device)
    column, row = (centres[..., None] - places).abs().argmin(-1).unbind(-1)
    here = torch.arange(MOST_THINGS, device=centres.device) < scenes.count[:, None]
    values = (scenes.colour, scenes.shape, scenes.size, column, row)
    return {name: torch.where(here, v, _ABSENT) for name, v in zip(THING_CLASSES, values, strict=True)}


def scene_targets(scenes: Scenes) -> dict[str, Tensor]:
    """Classes `(B,)` of each scene by name of SCENE_CLASSES."""
    return {"count": scenes.count - 1, "background": scenes.background, "soft": scenes.soft.long()}


class TextHeads(nn.Module):
    """Linear readings: of a thing from T5's states at its words, of all things from CLIP's pooled state."""

    def __init__(self, t5_width: int, clip_width: int) -> None:
        super().__init__()
        both = {**THING_CLASSES, **SCENE_CLASSES}
        self.words = nn.ModuleDict({name: nn.Linear(t5_width, n) for name, n in both.items()})
        pooled = {name: MOST_THINGS * n for name, n in THING_CLASSES.items()} | SCENE_CLASSES
        self.pooled = nn.ModuleDict({name: nn.Linear(clip_width, n) for name, n in pooled.items()})

    def forward(self, states: Tensor, pooled: Tensor, scenes: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
        """Logits `(…, classes)` and targets `(…)` by `t5 NAME` and `clip NAME`.

        `states` `(B, L, width)` are T5's, in which word i of the caption stands at position i.
        """
        owners = caption_owners(scenes)
        states, owned = states[:, : owners.shape[1]], owners.clamp(min=0)
        readings: dict[str, tuple[Tensor, Tensor]] = {}
        for name, target in thing_targets(scenes).items():
            of_words = torch.where(owners >= 0, target.gather(1, owned), _ABSENT)
            readings[f"t5 {name}"] = self.words[name](states), of_words
            readings[f"clip {name}"] = self.pooled[name](pooled).unflatten(1, (MOST_THINGS, -1)), target
        for name, target in scene_targets(scenes).items():
            of_words = torch.where(owners >= 0, target[:, None], _ABSENT)
            readings[f"t5 {name}"] = self.words[name](states), of_words
            readings[f"clip {name}"] = self.pooled[name](pooled), target
        return readings


def read(denoiser: Denoiser, heads: TextHeads, captioner: Captioner, scenes: Scenes) -> Any:
    """The heads' readings of the captions of `scenes`.

    CLIP is causal and pools at its first end token, so what follows the longest caption is left out; T5 reads
    its padding, in the pipeline too.
    """
    clip_ids, t5_ids = captioner(scenes, TEXT_LENGTH)
    pooled = denoiser.clip(clip_ids[:, : MOST_WORDS + 2]).pooler_output
    return heads(denoiser.t5(t5_ids)[0], pooled, scenes)


def text_loss(readings: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Mean cross entropy over all readings."""
    losses = [F.cross_entropy(logits.flatten(0, -2).float(), t.flatten()) for logits, t in readings.values()]
    return torch.stack(losses).mean()


@torch.no_grad()
def accuracy(denoiser: Denoiser, heads: TextHeads, captioner: Captioner, scenes: Scenes) -> dict[str, float]:
    """Share of right readings by name."""
    readings = read(denoiser, heads, captioner, scenes)
    return {
        name: (logits.argmax(-1) == target)[target != _ABSENT].float().mean().item()
        for name, (logits, target) in readings.items()
    }


def train_text(
    denoiser: Denoiser,
    captioner: Captioner,
    recipe: TextRecipe,
    seed: int,
    clock: Clock,
    log: Log,
    frozen: bool = False,
) -> dict[str, float]:
    """Train both encoders in place for `recipe.seconds`; returns the accuracies on held-out captions.

    With `frozen` only the heads learn: a probe of what given encoders hold.
    """
    device = next(denoiser.parameters()).device
    torch.manual_seed(seed)
    heads = TextHeads(denoiser.t5.config.d_model, denoiser.clip.config.hidden_size).to(device)
    encoders = [*denoiser.t5.parameters(), *denoiser.clip.parameters()]
    trained = [*heads.parameters(), *([] if frozen else encoders)]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    start, step = clock.elapsed_s(), 0
    for scenes in scene_batches(recipe.batch, seed + 3, device):
        progress = (clock.elapsed_s() - start) / recipe.seconds
        if progress >= 1 or step >= recipe.most_steps:
            break
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = (
                recipe.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
        loss = text_loss(read(denoiser, heads, captioner, scenes))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            value = loss.item()  # also keeps the host with the device, so that the clock is true
            if step % 100 == 0:
                log.add("text", step=step, loss=value)
    result = accuracy(denoiser, heads, captioner, next(scene_batches(512, HELD_OUT_TEXT_SEED, device)))
    log.add("text", steps=step, captions=step * recipe.batch, **{k: round(v, 4) for k, v in result.items()})
    return result
