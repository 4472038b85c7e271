"""Captions, pictures and the checker speak of the same scenes; wrong pictures are found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from suites.flux_shapes.checker import check, follows
from suites.flux_shapes.drawing import draw
from suites.flux_shapes.evaluation import held_out_scenes
from suites.flux_shapes.scenes import MOST_WORDS, Scenes, caption_owners, caption_words, random_scenes
from suites.flux_shapes.tokenizers import (
    CLIP_LENGTH,
    clip_ids,
    clip_tokenizer,
    t5_ids,
    t5_tokenizer,
    token_table,
)
from suites.flux_shapes.words import SHAPES, WORDS, Description, Thing, parse


def some_scenes(number: int, seed: int = 11) -> Scenes:
    return random_scenes(number, torch.Generator().manual_seed(seed))


def test_captions_parse_back() -> None:
    scenes = some_scenes(400)
    for row in range(len(scenes)):
        description = scenes.describe(row)
        # "to the" is only said sideways, and "left of" alone says the same.
        assert parse(description.caption()).caption() == description.caption()
    with pytest.raises(ValueError, match="caption: expected the flux-shapes language"):
        parse("a photo of a cat")


def test_caption_words_spell_the_caption_and_owners_its_things() -> None:
    scenes = some_scenes(300)
    words, owners = caption_words(scenes), caption_owners(scenes)
    assert words.shape[1] == MOST_WORDS
    for row in range(len(scenes)):
        description = scenes.describe(row)
        spelled = [WORDS[i] for i in words[row].tolist() if i]
        assert " ".join(spelled) == description.caption()
        for index, thing in enumerate(description.things):
            mine = [WORDS[i] for i in words[row][owners[row] == index].tolist()]
            assert " ".join(mine) == thing.caption()
        assert owners[row].max() == len(description.things) - 1


@pytest.mark.parametrize("size", [128, 512])
def test_drawn_scenes_follow_their_captions(size: int) -> None:
    scenes = held_out_scenes(24 if size == 512 else 48)
    pictures = draw(scenes, size) / 2 + 0.5
    for row in range(len(scenes)):
        findings = check(pictures[row], scenes.describe(row))
        assert follows(findings), (scenes.describe(row).caption(), [f for f in findings if not f.ok])


def picture_of(caption_row: int, scenes: Scenes) -> torch.Tensor:
    return draw(scenes[caption_row : caption_row + 1], 256)[0] / 2 + 0.5


def missed(scenes: Scenes, row: int, asked: Description) -> set[str]:
    return {finding.aspect for finding in check(picture_of(row, scenes), asked) if not finding.ok}


def test_the_checker_names_what_is_wrong() -> None:
    scenes = some_scenes(200)
    pairs = [row for row in range(200) if len(scenes.describe(row).things) == 2][:8]
    lone = [row for row in range(200) if scenes.describe(row).place == "left"][:3]
    for row in pairs:
        said = scenes.describe(row)
        first, second = said.things
        opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
        assert missed(scenes, row, said) == set()
        assert missed(scenes, row, replace(said, relation=opposite[said.relation or ""])) == {"relation"}
        other = SHAPES[(SHAPES.index(first.shape) + 1) % len(SHAPES)]
        wrong = replace(said, things=(replace(first, shape=other), second))
        assert "shape" in missed(scenes, row, wrong)
        absent = next(
            colour
            for colour in ("red", "green", "blue", "cyan", "pink")
            if colour not in (first.colour, second.colour, said.background)
        )
        wrong = replace(said, things=(replace(first, colour=absent), second))
        assert {"colour", "nothing else"} <= missed(scenes, row, wrong)
        size = "large" if first.size == "small" else "small"
        assert "size" in missed(scenes, row, replace(said, things=(replace(first, size=size), second)))
        ground = "black" if said.background != "black" else "white"
        assert "background" in missed(scenes, row, replace(said, background=ground))
    for row in lone:
        assert missed(scenes, row, replace(scenes.describe(row), place="right")) == {"place"}


def test_an_empty_picture_follows_nothing() -> None:
    asked = Description((Thing("medium", "red", "circle"),))
    findings = check(torch.full((3, 64, 64), 0.85), asked)
    assert [f.aspect for f in findings if not f.ok] == ["colour"]
    with pytest.raises(ValueError, match=r"picture: expected \(3, S, S\)"):
        check(torch.zeros(3, 64, 32), asked)


def test_tensor_token_ids_are_the_tokenizers() -> None:
    scenes = some_scenes(64, seed=12)
    words, captions = caption_words(scenes), [scenes.describe(row).caption() for row in range(64)]
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    got = clip_ids(words, token_table(clip), clip.bos_token_id, clip.eos_token_id)
    wanted = clip(captions, padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt").input_ids
    assert torch.equal(got, wanted)
    got = t5_ids(words, token_table(t5), t5.eos_token_id, t5.pad_token_id, 64)
    wanted = t5(captions, padding="max_length", max_length=64, return_tensors="pt").input_ids
    assert torch.equal(got, wanted)
    for tokenizer in (clip, t5):
        ids = tokenizer(captions).input_ids
        assert [tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids] == captions


def test_a_word_that_falls_apart_is_refused() -> None:
    class Letters:
        """Splits every word."""

        def __call__(self, word: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"input_ids": list(range(len(word) + 1))})

    with pytest.raises(ValueError, match="to be one token"):
        token_table(Letters())
