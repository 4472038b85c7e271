"""What a training run depends on apart from device and speed, made from its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from suites.flux_shapes.denoiser import STAGES, Recipe, Stage, Task
from suites.flux_shapes.models import FULL, MINIATURE, Sizes
from suites.flux_shapes.text import TextRecipe

VAE_SECONDS, TEXT_SECONDS = 70.0, 20.0


@dataclass(frozen=True)
class Plan:
    """One run. `resume` continues that model, except what `fresh` names ("text" or "all-but-vae").

    Encoders that learnt from pictures alone learn captions slower than new ones do: after 300 steps of 64
    captions their loss was 0.29, that of new ones 0.09. The transformer soon reads new ones: after 75 steps
    at 64 pixels its loss was 0.23, that of a new transformer 0.53.
    """

    sizes: Sizes
    stages: tuple[Stage, ...]
    recipe: Recipe
    text: TextRecipe
    seed: int
    vae_seconds: float = VAE_SECONDS
    vae_size: int = 256
    vae_batch: int = 32
    vae_most_steps: int = 10**9
    closing_seconds: float = 30.0
    save_every_s: float = 90.0
    grid_prompts: int = 8
    scored_prompts: int = 48
    sample_steps: int = 28
    preview_prompts: int = 32
    preview_steps: int = 12
    evaluate_size: int = 512
    resume: Path | None = None
    fresh: str | None = None


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that train's command line asks for; raises ValueError for options that make no plan."""
    if options.fresh and options.resume is None:
        raise ValueError("--fresh: expected --resume with the model whose other parts are kept, got none")
    if options.miniature:
        return Plan(
            MINIATURE,
            (Stage("32", 0.5, Task(32, 4, 2)), Stage("64", 0.5, Task(64, 2, 1))),
            Recipe(warmup_steps=2, most_steps_per_stage=3),
            TextRecipe(batch=4, warmup_steps=2, most_steps=3),
            options.seed,
            vae_size=32,
            vae_batch=4,
            vae_most_steps=3,
            closing_seconds=0.0,
            grid_prompts=2,
            scored_prompts=4,
            sample_steps=2,
            preview_prompts=2,
            preview_steps=2,
            evaluate_size=64,
            resume=options.resume,
            fresh=options.fresh,
        )
    names = options.stages.split(",")
    kept = [stage for stage in STAGES if stage.name in names]
    if len(kept) != len(names):
        raise ValueError(
            f"--stages: expected some of {','.join(s.name for s in STAGES)}, got {options.stages}"
        )
    total = sum(stage.share for stage in kept)
    vae_seconds = options.vae_seconds
    if vae_seconds is None:
        vae_seconds = 0.0 if options.resume else VAE_SECONDS
    return Plan(
        FULL,
        tuple(Stage(stage.name, stage.share / total, stage.task) for stage in kept),
        Recipe(learning_rate=options.learning_rate),
        TextRecipe(seconds=options.text_seconds),
        options.seed,
        vae_seconds=vae_seconds,
        resume=options.resume,
        fresh=options.fresh,
    )
