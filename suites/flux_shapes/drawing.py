"""Draw scenes: anti-aliased shapes on a plain or softly graded background, batched on any device.

Coordinates run from -1 to 1, x to the right and y down; a shape of radius r fits in the circle of radius r
around its centre, so shapes never overlap when their circles do not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suites.flux_shapes.words import BACKGROUNDS, COLOURS, SHAPES, UNNAMED_BACKGROUND

if TYPE_CHECKING:
    from suites.flux_shapes.scenes import Scenes

_POINTS = {
    "square": (4, math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, 0.5, 0.0),
    "star": (5, 0.45, 0.0),
}
"""Polygons: number of points, inner over outer radius, rotation."""
SOFT_TOP, SOFT_BOTTOM = 0.2, 0.88
"""A soft background mixes this much white at the top and keeps this much of its colour at the bottom."""


def distance(x: Tensor, y: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to a shape's outline, negative inside; exact at the outline, approximate far from it.

    `x`, `y` are offsets from the centre; `shape` holds indices into `SHAPES`; all broadcast together.
    """
    points = torch.tensor([_POINTS.get(s, (3, 0.5, 0.0)) for s in SHAPES], device=x.device, dtype=x.dtype)[
        shape
    ]
    count, inner, rotation = points.unbind(-1)
    length = torch.sqrt(x * x + y * y + 1e-12)
    sector = math.pi / count
    angle = torch.atan2(x, -y) + rotation
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    edge_x, edge_y = inner * torch.cos(sector) - 1, inner * torch.sin(sector)
    edge = torch.sqrt(edge_x * edge_x + edge_y * edge_y)
    polygon = ((length * torch.cos(folded) - radius) * edge_y - length * torch.sin(folded) * edge_x) / edge

    ring = shape == SHAPES.index("ring")
    middle, half = torch.where(ring, 0.775, 0.0), torch.where(ring, 0.225, 1.0)
    round_ = (length - middle * radius).abs() - half * radius

    along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    cross = torch.maximum(along - 0.94 * radius, across - 0.33 * radius)

    is_round = ring | (shape == SHAPES.index("circle"))
    return torch.where(is_round, round_, torch.where(shape == SHAPES.index("cross"), cross, polygon))


def pixel_grid(size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Pixel centres `(1, size)` in x and `(size, 1)` in y."""
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2 / size) - 1
    return centres[None, :], centres[:, None]


def cover(x: Tensor, y: Tensor, shape: Tensor, radius: Tensor, size: int) -> Tensor:
    """How much of each pixel of a `size`-pixel picture a shape covers, in [0, 1]."""
    return (0.5 - distance(x, y, shape, radius) * (size / 2)).clamp(0, 1)


def draw(scenes: Scenes, size: int) -> Tensor:
    """Pictures `(B, 3, size, size)` of scenes, float32 sRGB in [-1, 1]."""
    device = scenes.shape.device
    x, y = pixel_grid(size, device)
    palette = torch.tensor([UNNAMED_BACKGROUND, *BACKGROUNDS.values()], device=device)
    ground = palette[scenes.background][:, :, None, None]
    down = (y + 1) / 2
    soft = (ground + (1 - ground) * SOFT_TOP) * (1 - down) + ground * SOFT_BOTTOM * down
    picture = torch.where(scenes.soft[:, None, None, None], soft, ground).expand(-1, 3, size, size)
    paint = torch.tensor(list(COLOURS.values()), device=device)[scenes.colour]
    for thing in range(scenes.shape.shape[1]):
        centre = scenes.centre[:, thing, :, None, None]
        shape, radius = scenes.shape[:, thing, None, None], scenes.radius[:, thing, None, None]
        alpha = cover(x - centre[:, 0], y - centre[:, 1], shape, radius, size)
        alpha = (alpha * (thing < scenes.count)[:, None, None])[:, None]
        picture = picture + alpha * (paint[:, thing, :, None, None] - picture)
    return picture * 2 - 1
