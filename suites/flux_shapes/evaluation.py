"""Sample captions through `FluxPipeline` itself, check the pictures, and report as grid and table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suites.flux_shapes.checker import check, follows
from suites.flux_shapes.scenes import Scenes, random_scenes
from suites.flux_shapes.words import Description

HELD_OUT_SEED = 90210
"""Seed of the captions that the evaluation asks for."""


@dataclass
class Score:
    """How many pictures followed their captions, in all and by aspect: `(right, asked)`."""

    pictures: tuple[int, int] = (0, 0)
    aspects: dict[str, tuple[int, int]] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A short text table."""
        rows = [("whole caption", self.pictures), *sorted(self.aspects.items())]
        lines = [
            f"{name:16s} {right:4d} of {asked:4d}  {right / max(asked, 1):6.1%}"
            for name, (right, asked) in rows
        ]
        return "\n".join(lines)


def held_out_scenes(number: int, seed: int = HELD_OUT_SEED) -> Scenes:
    """Scenes whose captions the evaluation asks for, on the CPU."""
    return random_scenes(number, torch.Generator().manual_seed(seed))


def held_out(number: int, seed: int = HELD_OUT_SEED) -> list[Description]:
    """Captions to ask for, as descriptions."""
    scenes = held_out_scenes(number, seed)
    return [scenes.describe(row) for row in range(number)]


def sample(
    pipe: Any, captions: list[str], size: int, steps: int, seed: int, batch: int, text_length: int = 64
) -> Tensor:
    """Pictures `(B, 3, size, size)` in [0, 1] from the pipeline, picture i from the CPU seed `seed` + i."""
    pictures: list[Tensor] = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        result = pipe(
            part,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=generators,
            max_sequence_length=text_length,
            output_type="pt",
        )
        pictures.append(result.images.float().cpu())
    return torch.cat(pictures)


def score(pictures: Tensor, descriptions: list[Description]) -> Score:
    """Check each picture against its description."""
    aspects: dict[str, list[bool]] = defaultdict(list)
    right, misses = 0, []
    for picture, description in zip(pictures, descriptions, strict=True):
        findings = check(picture, description)
        right += follows(findings)
        for finding in findings:
            aspects[finding.aspect].append(finding.ok)
        wrong = "; ".join(f"{f.aspect}: {f.detail}" for f in findings if not f.ok)
        if wrong:
            misses.append(f"{description.caption()} -> {wrong}")
    counted = {aspect: (sum(oks), len(oks)) for aspect, oks in aspects.items()}
    return Score((right, len(descriptions)), counted, misses)


def save_grid(pictures: Tensor, path: Path, columns: int = 4) -> None:
    """Pictures `(B, 3, S, S)` in [0, 1] side by side as one PNG."""
    from PIL import Image

    rows = -(-len(pictures) // columns)
    size = pictures.shape[-1]
    sheet = torch.ones(rows * columns, 3, size, size)
    sheet[: len(pictures)] = pictures
    sheet = (
        sheet.view(rows, columns, 3, size, size)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * size, columns * size, 3)
    )
    Image.fromarray((sheet.clamp(0, 1) * 255).round().to(torch.uint8).numpy().astype(np.uint8)).save(
        path, optimize=True
    )
