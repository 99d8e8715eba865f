"""Quality of a plan on held-out probes, as a report states it: in latents and in images, with uncertainties."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.errors import DiffesError
from diffes.measure.metrics import Metric, make_metric

RESAMPLES = 2000
CONFIDENCE = 0.95
WINDOW = 11  # side of SSIM's window, in pixels


class Quality:
    """Comparison of final latents with those of the reference, from the same noise and conditions.

    Args:
        adapter: adapter that decodes latents.
        reference: (n, C, h, w) final latents of the reference.

    Example:
        >>> import torch
        >>> low, high = interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> 1 <= low < 2.5 < high <= 4
        True
    """

    def __init__(self, adapter: ModelAdapter, reference: Tensor) -> None:
        self._adapter = adapter
        self._reference = reference.float()

    @cached_property
    def _images(self) -> Tensor:
        return self._decoded(self._reference)

    @cached_property
    def _ssim(self) -> Metric | None:
        """SSIM as pyiqa defines it (Y channel, 11 x 11 Gaussian window); None where pyiqa cannot be had."""
        try:
            return make_metric("ssim", self._adapter.device)
        except DiffesError:
            return None

    def of(self, latents: Tensor) -> dict[str, float | list[float] | None]:
        """Return the quality of final latents (n, C, h, w), by name.

        - `latent_mse`, `latent_median` and `latent_interval`: mean, median and 95 % interval of the mean (bootstrapped
          over probes) of the mean squared difference of latents.
        - `image_mse` and `ssim`: of images in [0, 1], with their standard errors `image_mse_error` and `ssim_error`.
        - `variance`: that of the latents over that of the reference's, which a least-squares fit lowers where it cannot
          predict.

        None stands for a number that is not finite, for SSIM without pyiqa or of smaller images, and for images of a
        pipeline that makes something else.
        """
        found = latents.float()
        return {
            **latent_quality(found, self._reference),
            **self._of_images(found),
            "variance": finite(_variance(found) / _variance(self._reference)),
        }

    def _of_images(self, latents: Tensor) -> dict[str, float | None]:
        if not self._adapter.makes_images:
            return dict.fromkeys(("image_mse", "image_mse_error", "ssim", "ssim_error"))
        images = self._decoded(latents)
        differences = squared_errors(images, self._images)
        small = min(images.shape[-2:]) < WINDOW
        ssim = None if self._ssim is None or small else self._ssim(images, self._images)
        return {
            "image_mse": finite(differences.mean()),
            "image_mse_error": finite(standard_error(differences)),
            "ssim": None if ssim is None else finite(ssim.mean()),
            "ssim_error": None if ssim is None else finite(standard_error(ssim)),
        }

    def _decoded(self, latents: Tensor) -> Tensor:
        parts = latents.to(self._adapter.device).split(32)
        return torch.cat([self._adapter.decode(part).float() for part in parts])


def squared_errors(found: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared difference (n,) of each of n latents or images, in fp64 on the CPU."""
    return (found.float() - reference.float()).square().flatten(1).mean(1).double().cpu()


def latent_quality(latents: Tensor, reference: Tensor) -> dict[str, float | list[float] | None]:
    """Return the entries of `Quality.of` that are about latents (n, C, h, w)."""
    squares = squared_errors(latents, reference)
    return {
        "latent_mse": finite(squares.mean()),
        "latent_median": finite(squares.median()),
        "latent_interval": list(interval(squares)) if bool(squares.isfinite().all()) else None,
    }


def interval(values: Tensor) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values (n,), resampled with a fixed seed.

    Source: Efron's percentile interval, by `scipy.stats.bootstrap`.
    """
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    found = bootstrap(
        (values.numpy(),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean of values (n,)."""
    return values.std(correction=min(1, len(values) - 1)) / len(values) ** 0.5


def _variance(latents: Tensor) -> Tensor:
    """Return the mean over channels of the variance of all entries of a channel."""
    return latents.transpose(0, 1).flatten(1).var(1).mean()


def finite(value: Tensor | float) -> float | None:
    """Return a number for JSON; None where it is not finite."""
    return float(value) if math.isfinite(value) else None
