from __future__ import annotations

import pytest
import torch

from diffes.adapters import ModelAdapter
from diffes.measure.metrics import latent_mse, make_metric
from diffes.measure.quality import Quality, interval, standard_error


def test_the_reference_itself_has_no_error(tiny: ModelAdapter) -> None:
    latents = tiny.noise(tiny.make_probes(4, 0))
    found = Quality(tiny, latents).of(latents.clone())
    assert found["latent_mse"] == found["latent_median"] == found["image_mse"] == found["image_mse_error"] == 0
    assert found["latent_interval"] == [0, 0] and found["ssim"] == pytest.approx(1) and found["variance"] == 1


def test_errors_are_those_of_the_metrics_and_their_spread(tiny: ModelAdapter) -> None:
    one, other = (tiny.noise(tiny.make_probes(6, seed)) for seed in (0, 1))
    found = Quality(tiny, one).of(other)
    errors = -latent_mse(other, one)
    assert found["latent_mse"] == pytest.approx(float(errors.mean()))
    assert found["latent_median"] == pytest.approx(float(errors.double().median()))
    low, high = found["latent_interval"]  # type: ignore[misc]
    assert isinstance(low, float) and errors.min() < low < errors.mean() < high < errors.max()
    images, reference = tiny.decode(other), tiny.decode(one)
    squares = (images - reference).square().flatten(1).mean(1)
    assert found["image_mse"] == pytest.approx(float(squares.mean()))
    assert found["image_mse_error"] == pytest.approx(float(squares.double().std() / 6**0.5))
    ssim = make_metric("ssim", tiny.device)(images, reference)
    assert found["ssim"] == pytest.approx(float(ssim.mean()))
    half = Quality(tiny, one).of(one / 2)
    assert half["variance"] == pytest.approx(0.25)


def test_what_is_no_number_is_none(tiny: ModelAdapter) -> None:
    latents = tiny.noise(tiny.make_probes(3, 0))
    broken = latents.clone()
    broken[1] = float("nan")
    found = Quality(tiny, latents).of(broken)
    assert found["latent_mse"] is None and found["latent_interval"] is None and found["ssim"] is None


def test_intervals_shrink_with_more_probes_and_are_the_same_each_time() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double().square()
    few, many = interval(values[:25]), interval(values)
    assert many == interval(values) and many[1] - many[0] < 0.5 * (few[1] - few[0])
    assert many[0] < float(values.mean()) < many[1]
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * float(standard_error(values)), rel=0.15)
    assert interval(values[:1]) == (float(values[0]), float(values[0]))
