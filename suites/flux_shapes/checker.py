"""Does a picture show what its caption says? Read from the pixels, without a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from suites.flux_shapes.drawing import SOFT_BOTTOM, SOFT_TOP, cover, pixel_grid
from suites.flux_shapes.scenes import RADII
from suites.flux_shapes.words import BACKGROUNDS, COLOURS, SHAPES, SIZES, UNNAMED_BACKGROUND, Description

COLOUR_TOLERANCE = 0.17
"""Largest sRGB distance at which a pixel still counts as a named colour; the closest two are 0.33 apart."""
LEAST_IOU = 0.75
LEAST_OFFSET = 0.12
"""A relation or place needs centres at least this far apart along its axis, in half pictures."""


@dataclass(frozen=True)
class Finding:
    """One aspect of a caption, such as `colour`, `shape` or `relation`, and what was seen of it."""

    aspect: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class _Seen:
    x: float
    y: float
    area: float
    mask: Tensor


def check(picture: Tensor, description: Description) -> list[Finding]:
    """Findings for one picture `(3, S, S)`, sRGB in [0, 1]. The picture follows its caption if all are ok."""
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.shape[1] != picture.shape[2]:
        raise ValueError(f"picture: expected (3, S, S), got {tuple(picture.shape)}")
    picture = picture.float().cpu()
    names = _nearest_colour(picture)
    findings: list[Finding] = []
    seen: list[_Seen | None] = []
    for thing in description.things:
        mask = names == list(COLOURS).index(thing.colour)
        area = mask.float().mean().item() * 4
        present = area > 0.3 * _area(thing.shape, RADII[len(description.things) - 1, 0, 0].item())
        findings.append(Finding("colour", present, f"{thing.colour} covers {area / 4:.1%}"))
        seen.append(_look(mask) if present else None)
    for thing, found in zip(description.things, seen, strict=True):
        if found is not None:
            shape, iou = _best_shape(found)
            right = shape == thing.shape and iou >= LEAST_IOU
            findings.append(Finding("shape", right, f"{thing.colour} is a {shape} (IoU {iou:.2f})"))
            findings.append(_size_finding(found, thing.shape, thing.size, len(description.things)))
    findings += _layout_findings(seen, description)
    findings.append(_strangers_finding(names, description))
    findings.append(_background_finding(picture, names, description))
    return findings


def follows(findings: list[Finding]) -> bool:
    """Whether every finding is ok."""
    return all(finding.ok for finding in findings)


def _nearest_colour(picture: Tensor) -> Tensor:
    palette = torch.tensor(list(COLOURS.values()))
    gaps = (picture[None] - palette[:, :, None, None]).square().sum(1).sqrt()
    best, index = gaps.min(0)
    return torch.where(best <= COLOUR_TOLERANCE, index, -1)


def _look(mask: Tensor) -> _Seen:
    x, y = pixel_grid(mask.shape[0], "cpu")
    weight = mask.float()
    total = weight.sum()
    return _Seen(
        (weight * x).sum().item() / total.item(),
        (weight * y).sum().item() / total.item(),
        weight.mean().item() * 4,
        mask,
    )


def _ideal(shape: str, radius: float, x: float, y: float, size: int) -> Tensor:
    grid_x, grid_y = pixel_grid(size, "cpu")
    return cover(grid_x - x, grid_y - y, torch.tensor(SHAPES.index(shape)), torch.tensor(radius), size)


def _unit(shape: str) -> _Seen:
    if shape not in _UNITS:
        _UNITS[shape] = _look(_ideal(shape, 0.5, 0.0, 0.0, 256) >= 0.5)
    return _UNITS[shape]


_UNITS: dict[str, _Seen] = {}


def _area(shape: str, radius: float) -> float:
    return _unit(shape).area * (radius / 0.5) ** 2


def _radius(shape: str, area: float) -> float:
    return 0.5 * (area / _unit(shape).area) ** 0.5


def _best_shape(found: _Seen) -> tuple[str, float]:
    """The shape that, at the area and centroid seen, overlaps best, and its intersection over union."""
    scores: dict[str, float] = {}
    for shape in SHAPES:
        radius, unit = _radius(shape, found.area), _unit(shape)
        centre = found.x - unit.x * radius / 0.5, found.y - unit.y * radius / 0.5
        ideal = _ideal(shape, radius, *centre, found.mask.shape[0]) >= 0.5
        scores[shape] = ((ideal & found.mask).sum() / (ideal | found.mask).sum()).item()
    best = max(scores, key=lambda s: scores[s])
    return best, scores[best]


def _size_finding(found: _Seen, shape: str, size: str, count: int) -> Finding:
    radius = _radius(shape, found.area)
    ranges = RADII[count - 1].tolist()
    misfit = [max(low / radius, radius / high) for low, high in ranges]
    nearest = SIZES[misfit.index(min(misfit))]
    return Finding("size", nearest == size and min(misfit) < 1.25, f"radius {radius:.2f} is {nearest}")


def _layout_findings(seen: list[_Seen | None], description: Description) -> list[Finding]:
    axes = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
    findings: list[Finding] = []
    if description.relation is not None:
        dx, dy = axes[description.relation]
        for first, second in itertools.pairwise(seen):
            if first is not None and second is not None:
                gap = dx * (second.x - first.x) + dy * (second.y - first.y)
                findings.append(
                    Finding("relation", gap > LEAST_OFFSET, f"{description.relation} by {gap:.2f}")
                )
    elif len(seen) == 1 and seen[0] is not None:
        x, y = seen[0].x, seen[0].y
        wanted = {"left": -x, "right": x, "top": -y, "bottom": y}
        if description.place is None:
            far = max(abs(x), abs(y))
            findings.append(Finding("place", far < 0.25, f"off centre by {far:.2f}"))
        else:
            offset = wanted[description.place]
            findings.append(Finding("place", offset > 0.25, f"{description.place} by {offset:.2f}"))
    return findings


def _strangers_finding(names: Tensor, description: Description) -> Finding:
    """No sizeable patch in a colour that the caption does not name."""
    named = {thing.colour for thing in description.things} | {description.background}
    counts = {name: (names == index).float().mean().item() for index, name in enumerate(COLOURS)}
    extra = {name: share for name, share in counts.items() if name not in named and share > 0.01}
    return Finding(
        "nothing else", not extra, ", ".join(f"{n} {s:.1%}" for n, s in extra.items()) or "nothing"
    )


def _background_finding(picture: Tensor, names: Tensor, description: Description) -> Finding:
    """The border rows' typical colours against the named background, graded if it is soft."""
    rows = max(1, picture.shape[1] // 32)
    palette = {"": UNNAMED_BACKGROUND, **BACKGROUNDS}
    wanted = description.background or ""
    top = picture[:, :rows].flatten(1).median(1).values
    bottom = picture[:, -rows:].flatten(1).median(1).values

    def ends(colour: tuple[float, float, float], soft: bool) -> tuple[Tensor, Tensor]:
        flat = torch.tensor(colour)
        return (flat + (1 - flat) * SOFT_TOP, flat * SOFT_BOTTOM) if soft else (flat, flat)

    def gap(name: str, soft: bool) -> float:
        high, low = ends(palette[name], soft)
        return (top - high).norm().item() + (bottom - low).norm().item()

    choices = {
        (name, soft): gap(name, soft) for name in palette for soft in ((False, True) if name else (False,))
    }
    name, soft = min(choices, key=lambda c: choices[c])
    ok = (name, soft) == (wanted, description.soft) and choices[name, soft] < 2 * COLOUR_TOLERANCE
    return Finding(
        "background", ok, f"{'soft ' if soft else ''}{name or 'unnamed'} (off by {choices[name, soft]:.2f})"
    )
