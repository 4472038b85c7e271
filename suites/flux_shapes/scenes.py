"""Random scenes as tensors: drawn, captioned and sliced by the thousand without a Python loop over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from suites.flux_shapes.words import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    WORD_INDEX,
    Description,
    Thing,
)

MOST_THINGS = 3
RADII = torch.tensor(
    [
        [[0.18, 0.23], [0.32, 0.38], [0.47, 0.53]],
        [[0.14, 0.17], [0.24, 0.28], [0.36, 0.41]],
        [[0.11, 0.13], [0.18, 0.21], [0.255, 0.285]],
    ]
)
"""Least and greatest radius by number of things (1, 2, 3) and size (small, medium, large)."""
_SPREAD = torch.tensor([[0.0, 0.06, 0.06], [0.94, 0.05, 0.18], [0.64, 0.025, 0.18]])
"""By number of things: distance between neighbours, and jitter of centres along and across their line."""
_PLACE_OFFSET = 0.52
_MARGIN = 0.97
_POOL = 16384


@dataclass
class Scenes:
    """B scenes. Everything a caption says is here, and the drawn centres and radii that it leaves open.

    count `(B,)` 1 to 3; shape, colour, size `(B, 3)` indices into SHAPES, COLOURS, SIZES; relation `(B,)`
    into RELATIONS (meant when count > 1); place `(B,)` 0 for none, else 1 + index into PLACES; background
    `(B,)` 0 for unnamed, else 1 + index into BACKGROUNDS; soft, to_the `(B,)` bool; centre `(B, 3, 2)`;
    radius `(B, 3)`.
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    relation: Tensor
    place: Tensor
    background: Tensor
    soft: Tensor
    to_the: Tensor
    centre: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))

    def describe(self, row: int) -> Description:
        """Scene `row` in words."""
        count = int(self.count[row])
        shapes, colours, sizes = (t[row, :count].tolist() for t in (self.shape, self.colour, self.size))
        names = list(COLOURS)
        things = tuple(
            Thing(SIZES[s], names[c], SHAPES[k]) for s, c, k in zip(sizes, colours, shapes, strict=True)
        )
        place, background = int(self.place[row]), int(self.background[row])
        relation = RELATIONS[int(self.relation[row])] if count > 1 else None
        return Description(
            things,
            relation,
            list(PLACES)[place - 1] if place else None,
            list(BACKGROUNDS)[background - 1] if background else None,
            bool(self.soft[row]),
            bool(self.to_the[row]),
        )


def _choose(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def random_scenes(number: int, generator: torch.Generator) -> Scenes:
    """`number` scenes on the CPU. The same generator state gives the same scenes on every machine."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = 1 + _choose(torch.tensor([0.42, 0.53, 0.05]), number, generator)
    shape = torch.randint(len(SHAPES), (number, MOST_THINGS), generator=generator)
    # One permutation gives the things and the background different colours.
    colours = uniform(number, len(COLOURS)).argsort(1)
    size = _choose(torch.tensor([0.22, 0.56, 0.22]), number * MOST_THINGS, generator).view(number, -1)
    relation = torch.randint(len(RELATIONS), (number,), generator=generator)
    place = torch.randint(-2, 1 + len(PLACES), (number,), generator=generator).clamp(min=0)
    place = torch.where(count == 1, place, 0)
    coloured, pick = 1 + colours[:, MOST_THINGS], uniform(number)
    neutral = (
        1 + len(COLOURS) + torch.randint(len(BACKGROUNDS) - len(COLOURS), (number,), generator=generator)
    )
    background = torch.where(pick < 0.45, 0, torch.where(pick < 0.8, coloured, neutral))
    soft = (background > 0) & (uniform(number) < 0.35)
    sideways = (relation >= 2) & (count > 1)
    to_the = sideways & (uniform(number) < 0.5)

    least, greatest = RADII[count - 1].gather(1, size[..., None].expand(-1, -1, 2)).unbind(-1)
    radius = least + (greatest - least) * uniform(number, MOST_THINGS)
    centre = _centres(count, relation, place, uniform(number, MOST_THINGS, 2) * 2 - 1)
    centre = torch.maximum(torch.minimum(centre, _MARGIN - radius[..., None]), radius[..., None] - _MARGIN)
    return Scenes(
        count,
        shape,
        colours[:, :MOST_THINGS],
        size,
        relation,
        place,
        background,
        soft,
        to_the,
        centre,
        radius,
    )


def _centres(count: Tensor, relation: Tensor, place: Tensor, jitter: Tensor) -> Tensor:
    """Centres `(B, 3, 2)` before they are kept inside the picture."""
    spacing, jitter_along, jitter_across = _SPREAD.to(count.device)[count - 1, :, None].unbind(1)
    rank = torch.arange(MOST_THINGS, device=count.device) - (count[:, None] - 1) / 2
    sign = torch.where(relation % 2 == 0, 1.0, -1.0)[:, None]
    along = rank * sign * spacing + jitter[..., 0] * jitter_along
    across = jitter[..., 1] * jitter_across
    sideways = (relation >= 2)[:, None]
    centre = torch.stack([torch.where(sideways, along, across), torch.where(sideways, across, along)], -1)
    offsets = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], device=count.device) * _PLACE_OFFSET
    return centre + offsets[place][:, None]


def meant_centres(scenes: Scenes) -> Tensor:
    """The centres `(B, 3, 2)` that the captions mean, before chance moves them; on the scenes' device."""
    return _centres(scenes.count, scenes.relation, scenes.place, torch.zeros_like(scenes.centre))


def caption_words(scenes: Scenes) -> Tensor:
    """Captions as word indices `(B, L)` into WORDS, left-aligned, then 0; on the scenes' device."""
    words = _caption_slots(scenes)
    return words.gather(1, _left_aligned(words))


def caption_owners(scenes: Scenes) -> Tensor:
    """For each word of `caption_words`, which thing it is part of: 0 to 2, or -1 for none."""
    words = _caption_slots(scenes)
    owner = torch.tensor(_SLOT_OWNERS, device=words.device)
    return torch.where(words > 0, owner, -1).gather(1, _left_aligned(words))


_SLOT_OWNERS = (*[0] * 4, *[-1] * 4, *[1] * 4, *[-1] * 4, *[2] * 4, *[-1] * 8)
"""Thing of each slot: article, size, colour, shape of each; -1 for relations, place and background."""
MOST_WORDS = len(_SLOT_OWNERS)


def _left_aligned(words: Tensor) -> Tensor:
    return (words == 0).to(torch.int8).argsort(dim=1, stable=True)


def _caption_slots(scenes: Scenes) -> Tensor:
    """Every word in its own slot `(B, 28)`, 0 where it goes unsaid."""
    device = scenes.count.device

    def table(*words: str) -> Tensor:
        return torch.tensor([WORD_INDEX[word] for word in words], device=device)

    def constant(word: str) -> Tensor:
        return torch.full_like(scenes.count, WORD_INDEX[word])

    colour_words, none = table("", *BACKGROUNDS), torch.zeros_like(scenes.count)
    an, orange = constant("an"), WORD_INDEX["orange"]
    sideways = scenes.relation >= 2
    slots: list[Tensor] = []
    for thing in range(MOST_THINGS):
        here = thing < scenes.count
        size = table("small", "", "large")[scenes.size[:, thing]]
        colour = colour_words[1 + scenes.colour[:, thing]]
        first = torch.where((size == 0) & (colour == orange), an, constant("a"))
        part = [first, size, colour, table(*SHAPES)[scenes.shape[:, thing]]]
        if thing:
            lead = [torch.where(scenes.to_the, constant(word), none) for word in ("to", "the")]
            name = table("above", "below", "left", "right")[scenes.relation]
            part = [*lead, name, torch.where(sideways, constant("of"), none), *part]
        slots += [torch.where(here, word, none) for word in part]
    placed, named = scenes.place > 0, scenes.background > 0
    slots += [
        table("", "on", "on", "at", "at")[scenes.place],
        torch.where(placed, constant("the"), none),
        table("", "left", "right", "top", "bottom")[scenes.place],
    ]
    ground = colour_words[scenes.background]
    ground_article = torch.where(~scenes.soft & (ground == orange), an, constant("a"))
    soft = torch.where(scenes.soft, constant("soft"), none)
    slots += [
        torch.where(named, w, none)
        for w in (constant("on"), ground_article, soft, ground, constant("background"))
    ]
    return torch.stack(slots, 1)


def scene_batches(batch: int, seed: int, device: torch.device | str) -> Iterator[Scenes]:
    """Endless batches of new scenes, drawn on the CPU in large pools so that a step costs no Python."""
    generator = torch.Generator().manual_seed(seed)
    pool_size = max(1, _POOL // batch) * batch
    while True:
        pool = random_scenes(pool_size, generator).to(device)
        for start in range(0, pool_size, batch):
            yield pool[start : start + batch]
