"""The text stage: targets say what the caption says, and encoders learn to hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from suites.flux_shapes.clock import Clock, Log
from suites.flux_shapes.models import Sizes, build
from suites.flux_shapes.scenes import Scenes, meant_centres, random_scenes
from suites.flux_shapes.text import (
    POSITIONS,
    TextHeads,
    TextRecipe,
    read,
    scene_targets,
    text_loss,
    thing_targets,
    train_text,
)
from suites.flux_shapes.words import BACKGROUNDS, COLOURS, SHAPES, SIZES

SMALL = Sizes((8, 8, 8), 4, 4, 1, 1, 1, t5_width=32, t5_layers=1, clip_width=32, clip_layers=1)


def some_scenes(number: int, seed: int = 21) -> Scenes:
    return random_scenes(number, torch.Generator().manual_seed(seed))


def test_targets_are_what_the_caption_says() -> None:
    scenes = some_scenes(300)
    things, whole = thing_targets(scenes), scene_targets(scenes)
    for row in range(len(scenes)):
        said = scenes.describe(row)
        for index, thing in enumerate(said.things):
            named = [int(things[name][row, index]) for name in ("size", "colour", "shape")]
            assert (SIZES[named[0]], list(COLOURS)[named[1]], SHAPES[named[2]]) == (
                thing.size,
                thing.colour,
                thing.shape,
            )
        assert all((targets[row, len(said.things) :] == -100).all() for targets in things.values())
        column, line = (things[name][row, : len(said.things)].tolist() for name in ("column", "row"))
        if said.relation in ("left of", "right of"):
            assert column == sorted(set(column), reverse=said.relation == "right of")
        if said.relation in ("above", "below"):
            assert line == sorted(set(line), reverse=said.relation == "below")
        if said.place in ("left", "right"):
            assert (POSITIONS[column[0]] < 0) == (said.place == "left")
        assert int(whole["count"][row]) + 1 == len(said.things)
        background = int(whole["background"][row])
        assert (list(BACKGROUNDS)[background - 1] if background else None) == said.background


def test_positions_are_exactly_where_captions_put_things() -> None:
    scenes = some_scenes(500)
    centres = meant_centres(scenes)[torch.arange(3) < scenes.count[:, None]]
    gaps = (centres[..., None] - torch.tensor(POSITIONS)).abs()
    assert gaps.min(-1).values.max() < 1e-6
    assert set(gaps.argmin(-1).flatten().tolist()) == set(range(len(POSITIONS)))


def test_leaving_out_clip_s_padding_changes_nothing() -> None:
    parts = build(SMALL, "cpu", seed=1)
    scenes, captioner = some_scenes(16), parts.captioner("cpu")
    heads = TextHeads(32, 32)
    clip_ids, _ = captioner(scenes, 64)
    whole = heads.pooled["count"](parts.denoiser.clip(clip_ids).pooler_output)
    torch.testing.assert_close(read(parts.denoiser, heads, captioner, scenes)["clip count"][0], whole)


def test_a_few_steps_teach_the_encoders_not_only_the_heads(tmp_path: Path) -> None:
    parts = build(SMALL, "cpu", seed=2)
    captioner, scenes = parts.captioner("cpu"), some_scenes(64)
    before = {name: p.clone() for name, p in parts.denoiser.named_parameters()}
    torch.manual_seed(3)
    start = text_loss(read(parts.denoiser, TextHeads(32, 32), captioner, scenes)).item()
    log = Log(Clock(60.0), tmp_path / "log.json")
    recipe = TextRecipe(seconds=60.0, learning_rate=1e-2, batch=32, warmup_steps=5, most_steps=60)
    accuracies = train_text(parts.denoiser, captioner, recipe, 4, log.clock, log)
    assert start > 1
    assert accuracies["clip row"] > 0.8  # 0.6 by always saying the middle
    assert accuracies["t5 shape"] > 0.4  # 1/6 by chance
    moved = {name.split(".")[0] for name, p in parts.denoiser.named_parameters() if not p.equal(before[name])}
    assert moved == {"t5", "clip"}
    assert log.rows[-1]["event"] == "text"


def test_a_probe_leaves_the_encoders_alone(tmp_path: Path) -> None:
    parts = build(SMALL, "cpu", seed=2)
    before = {name: p.clone() for name, p in parts.denoiser.named_parameters()}
    log = Log(Clock(60.0), tmp_path / "log.json")
    recipe = TextRecipe(seconds=60.0, batch=8, most_steps=3)
    accuracies = train_text(parts.denoiser, parts.captioner("cpu"), recipe, 4, log.clock, log, frozen=True)
    assert all(p.equal(before[name]) for name, p in parts.denoiser.named_parameters())
    assert accuracies["t5 row"] == pytest.approx(0.5, abs=0.5)
