"""The captioned picture: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from suites.end_to_end.picture import GAP, Panel, amplification, drawable, render, to_picture, triptych


def test_the_middle_frame_of_a_video_is_shown() -> None:
    video = np.zeros((5, 4, 6, 3))
    video[2] = 1.0
    assert (to_picture(video) == 255).all()


def test_latents_show_three_channels_and_single_ones_are_grey() -> None:
    latents = np.random.default_rng(0).random((4, 6, 16))
    assert (to_picture(latents) == (latents[..., :3] * 255).round()).all()
    grey = to_picture(latents[..., :1])
    assert grey.shape == (4, 6, 3)
    assert (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize(
    ("level", "factor"), [(0.9, 1), (0.3, 1), (0.2, 2), (0.1, 4), (0.001, 64), (0.0, 64)]
)
def test_amplification_never_saturates_the_bulk(level: float, factor: int) -> None:
    assert amplification(np.full((8, 8, 3), level)) == factor


def test_a_triptych_shows_both_runs_and_their_scaled_difference() -> None:
    dense = np.full((8, 8, 3), 0.5)
    sparse = dense + 0.1
    first, second, third = triptych(dense, sparse, ["a", "b", "c"], 1.0)
    assert (first.picture == 128).all()
    assert (second.picture == 153).all()
    assert third.title == "difference ×4"
    assert (third.picture == round(0.4 * 255)).all()


def test_latents_are_shown_over_their_own_range() -> None:
    dense = np.linspace(-40.0, 40.0, 8 * 8 * 4).reshape(8, 8, 4)
    first, second, third = triptych(dense, dense.copy(), ["", "", ""], None)
    assert first.picture.min() == 0
    assert first.picture.max() == 255
    assert (first.picture == second.picture).all()
    assert (third.picture == 0).all()


def test_a_sheet_holds_every_panel_and_draws_its_captions() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(3)]
    panels = [Panel(picture, f"title {n}", "1.00 s") for n, picture in enumerate(pictures)]
    sheet = np.asarray(render([("a heading", panels), ("another", panels)], "a footer", least=96))
    assert sheet.shape[1] == 3 * 96 + 4 * GAP
    doubled = np.repeat(np.repeat(pictures[0], 2, axis=0), 2, axis=1)
    rows = [y for y in range(sheet.shape[0] - 64) if (sheet[y : y + 64, GAP : GAP + 96] == doubled).all()]
    assert len(rows) == 2, "each row shows its first panel, enlarged by whole pixels"
    heading, caption = sheet[: rows[0]], sheet[rows[0] + 64 : rows[1]]
    for text in (heading, caption, sheet[-20:]):
        assert (text < 128).any(), "text is drawn dark on white"


def test_captions_hold_only_letters_that_the_face_has() -> None:
    from PIL import ImageFont

    text = drawable("difference ×64, café, 漢字 – 512×512…")
    assert text == "difference x64, cafe, ?? - 512x512..."
    font = ImageFont.load_default(24)
    missing = bytes(font.getmask("\ufffe"))
    assert not [c for c in {*text} - {" "} if bytes(font.getmask(c)) == missing]
    assert bytes(font.getmask("×")) == missing, "the reason for the replacement"


def test_wide_panels_are_reduced() -> None:
    panel = Panel(np.zeros((64, 128, 3), dtype=np.uint8), "", "")
    assert render([("", [panel])], "", most=32).width == 32 + 2 * GAP


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        render([], "")
