"""How close one picture is to another: PSNR and SSIM, of arrays with channels last."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def _pair(reference: NDArray, image: NDArray, data_range: float | None) -> tuple[NDArray, NDArray, float]:
    if reference.shape != image.shape:
        raise ValueError(f"image: expected the reference's shape {reference.shape}, got {image.shape}")
    first, second = (np.asarray(x, dtype=np.float64) for x in (reference, image))
    if not np.isfinite(first).all():
        raise ValueError("reference: expected finite values, got NaN or infinity")
    if not np.isfinite(second).all():
        raise ValueError("image: expected finite values, got NaN or infinity")
    span = float(data_range) if data_range is not None else float(first.max() - first.min())
    if span <= 0:
        raise ValueError(f"data_range: expected a positive span of values, got {span}")
    return first, second, span


def psnr(reference: NDArray, image: NDArray, data_range: float | None = 1.0) -> float:
    """Peak signal-to-noise ratio in dB; infinity for equal arrays.

    Args:
        reference: array of any shape, the dense run's.
        image: the same shape.
        data_range: span of possible values; None takes the reference's own span (for latents).

    Raises:
        ValueError: shapes differ, values are not finite, the span is not positive.
    """
    first, second, span = _pair(reference, image, data_range)
    error = float(np.mean((first - second) ** 2))
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def ssim(reference: NDArray, image: NDArray, data_range: float | None = 1.0) -> float:
    """Structural similarity of pictures `(H, W, C)`, or its mean over leading frames `(..., H, W, C)`.

    The settings of Wang et al. 2004: Gaussian window of 11 pixels with σ = 1.5, population covariance. A side
    below 11 pixels raises ValueError, as do the inputs that `psnr` refuses.
    """
    first, second, span = _pair(reference, image, data_range)
    if first.ndim < 3 or min(first.shape[-3:-1]) < 11:
        raise ValueError(f"reference: expected (..., H, W, C) of at least 11×11 pixels, got {first.shape}")
    from skimage.metrics import structural_similarity

    frames = zip(first.reshape(-1, *first.shape[-3:]), second.reshape(-1, *first.shape[-3:]), strict=True)
    scores = [
        structural_similarity(
            a,
            b,
            data_range=span,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in frames
    ]
    return float(np.mean(scores))
