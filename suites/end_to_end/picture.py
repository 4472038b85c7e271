"""The picture of a run: dense | column-sparse | their difference, captioned."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 8
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (90, 90, 90)


@dataclass(frozen=True)
class Panel:
    """One captioned picture: uint8 `(H, W, 3)`, a title and a line of figures under it."""

    picture: NDArray
    title: str
    figures: str


def load(path: Path) -> NDArray:
    """A picture file as uint8 `(H, W, 3)`."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def to_picture(array: NDArray) -> NDArray:
    """Float `(H, W, C)` or `(F, H, W, C)` in [0, 1] → uint8 `(H, W, 3)`: of a video the middle frame.

    Of more than three channels (latents) the first three are shown; fewer than three show the first, grey.
    """
    frame = array[array.shape[0] // 2] if array.ndim == 4 else array
    frame = frame[..., :3] if frame.shape[-1] >= 3 else np.repeat(frame[..., :1], 3, axis=-1)
    return (np.clip(frame, 0, 1) * 255).round().astype(np.uint8)


def amplification(difference: NDArray) -> int:
    """The greatest power of two, up to 64, that leaves a difference's 99.9th percentile at half or less.

    A fixed factor would saturate bad runs and hide good ones.
    """
    high = float(np.quantile(difference, 0.999))
    factor = 1
    while factor < 64 and high * factor * 2 <= 0.5:
        factor *= 2
    return factor


def triptych(
    dense: NDArray, sparse: NDArray, figures: Sequence[str], value_range: float | None
) -> list[Panel]:
    """The three panels of one prompt. `value_range` None: latents, shown over the bulk of dense values."""
    low, high = 0.0, value_range or 1.0
    if value_range is None:
        low, high = (float(np.quantile(dense, q)) for q in (0.01, 0.99))
    span = high - low if high > low else 1.0
    first, second = (dense - low) / span, (sparse - low) / span
    difference = np.abs(first - second)
    factor = amplification(difference)
    label = f"difference ×{factor}" if factor > 1 else "difference"
    return [
        Panel(to_picture(first), "dense", figures[0]),
        Panel(to_picture(second), "column-sparse", figures[1]),
        Panel(to_picture(difference * factor), label, figures[2]),
    ]


def drawable(text: str) -> str:
    """`text` in the letters that Pillow's built-in face has (ASCII): × becomes x, é becomes e, others ?."""
    plain = unicodedata.normalize("NFKD", text.replace("×", "x").replace("–", "-").replace("…", "..."))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _scaled(picture: NDArray, least: int, most: int | None) -> Image.Image:
    """Small pictures grow by whole pixels, so that nothing is invented; wider than `most` are reduced."""
    image = Image.fromarray(picture)
    if most is not None and image.width > most:
        return image.resize((most, round(image.height * most / image.width)), Image.Resampling.LANCZOS)
    factor = -(-min(least, most or least) // image.width)
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def render(
    rows: Sequence[tuple[str, Sequence[Panel]]], footer: str, *, least: int = 384, most: int | None = None
) -> Image.Image:
    """One sheet: a heading per row, its panels side by side with their captions, a footer under all.

    Args:
        rows: (heading, panels); every row has as many panels, all of one size.
        footer: what the figures belong to.
        least, most: bounds of a panel's width in pixels.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    images = [[_scaled(panel.picture, least, most) for panel in panels] for _, panels in rows]
    width, height = images[0][0].size
    size = max(14, width // 28)
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(12, size - 3))
    line = round(size * 1.35)
    across = len(images[0])
    sheet_width = across * width + (across + 1) * GAP
    # Letters of Pillow's built-in face are about half as wide as high.
    letters = max(20, int((sheet_width - 2 * GAP) / (size * 0.5)))
    wrapped = textwrap.wrap(drawable(footer), letters)
    headings = [textwrap.wrap(drawable(heading), letters) or [""] for heading, _ in rows]
    row_heights = [len(heading) * line + height + 2 * line + 2 * GAP for heading in headings]
    sheet = Image.new("RGB", (sheet_width, sum(row_heights) + len(wrapped) * line + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for heading, (_, panels), pictures, row_height in zip(headings, rows, images, row_heights, strict=True):
        for number, text in enumerate(heading):
            draw.text((GAP, top + number * line), text, fill=INK, font=font)
        y = top + len(heading) * line
        for column, (panel, image) in enumerate(zip(panels, pictures, strict=True)):
            x = GAP + column * (width + GAP)
            sheet.paste(image, (x, y))
            draw.text((x, y + height + 2), drawable(panel.title), fill=INK, font=font)
            draw.text((x, y + height + 2 + line), drawable(panel.figures), fill=FAINT, font=small)
        top += row_height
    for text in wrapped:
        draw.text((GAP, top), text, fill=FAINT, font=small)
        top += line
    return sheet
