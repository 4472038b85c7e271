"""PSNR and SSIM against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from suites.quality.fidelity import psnr, ssim


def picture(seed: int = 0) -> np.ndarray:
    """A smooth random picture, 32×40."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((4, 5, 3))
    return np.kron(coarse, np.ones((8, 8, 1)))


def test_psnr_of_a_known_error() -> None:
    reference = picture()
    assert psnr(reference, reference + 0.1) == pytest.approx(20)
    assert psnr(255 * reference, 255 * reference + 25.5, data_range=255) == pytest.approx(20)
    assert math.isinf(psnr(reference, reference))


def test_psnr_of_latents_uses_their_own_span() -> None:
    reference = np.array([-2.0, 2.0, 0.0, 1.0])
    assert psnr(reference, reference + 0.04, data_range=None) == pytest.approx(40)


def test_ssim_is_one_for_equal_falls_with_noise_and_ignores_order() -> None:
    reference = picture()
    noise = np.random.default_rng(1).normal(size=reference.shape)
    scores = [ssim(reference, reference + s * noise) for s in (0.0, 0.02, 0.1, 0.5)]
    assert scores[0] == pytest.approx(1)
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.3
    assert ssim(reference, picture(2)) == pytest.approx(ssim(picture(2), reference))


def test_ssim_of_constant_pictures_by_hand() -> None:
    """Without variance only the luminance term is left: (2ab + c) / (a² + b² + c), c = 0.01²."""
    a, b, c = 0.4, 0.6, 1e-4
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert ssim(np.full((16, 16, 3), a), np.full((16, 16, 3), b)) == pytest.approx(expected)


def test_a_videos_ssim_is_its_frames_mean() -> None:
    first, second = np.stack([picture(0), picture(1)]), np.stack([picture(0), picture(3)])
    assert ssim(first, second) == pytest.approx((1 + ssim(first[1], second[1])) / 2)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_wrong_input_is_named(measure: object) -> None:
    assert callable(measure)
    good = picture()
    bad = good.copy()
    bad[0, 0, 0] = math.nan
    for reference, image, says in (
        (good, good[1:], "image: expected the reference's shape"),
        (good, bad, "image: expected finite"),
        (bad, good, "reference: expected finite"),
    ):
        with pytest.raises(ValueError, match=says):
            measure(reference, image)
    with pytest.raises(ValueError, match="data_range"):
        measure(good, good, data_range=0.0)


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="11×11"):
        ssim(np.zeros((10, 40, 3)), np.zeros((10, 40, 3)))
