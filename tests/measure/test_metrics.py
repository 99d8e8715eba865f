from __future__ import annotations

import pytest
import torch

from diffes.errors import DiffesError
from diffes.measure.metrics import METRICS, make_metric

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(4, 1, 32, 32, generator=GENERATOR)
NOISE = torch.randn(4, 1, 32, 32, generator=GENERATOR)


@pytest.mark.parametrize("name", ["ssim", "psnr", "gmsd", *METRICS.names()])
def test_higher_is_better_and_scores_are_per_probe(name: str) -> None:
    metric = make_metric(name, CPU)
    near, far = ((IMAGES + strength * NOISE).clamp(0, 1) for strength in (0.02, 0.2))
    same, near, far = (metric(images, IMAGES) for images in (IMAGES, near, far))
    assert same.shape == (4,)
    assert (same > near).all() and (near > far).all()
    mixed = metric(torch.cat([IMAGES[:2], (IMAGES + 0.2 * NOISE).clamp(0, 1)[2:]]), IMAGES)
    torch.testing.assert_close(mixed, torch.cat([same[:2], far[2:]]), rtol=1e-4, atol=1e-5)


def test_no_reference_metrics_run() -> None:
    metric = make_metric("piqe", CPU)
    assert not metric.needs_reference
    assert torch.isfinite(metric(IMAGES, IMAGES)).all()


def test_latent_mse_is_what_it_says() -> None:
    assert make_metric("latent_mse", CPU)(IMAGES + 0.5, IMAGES).tolist() == pytest.approx([-0.25] * 4)


def test_nan_becomes_a_failure() -> None:
    broken = IMAGES.clone()
    broken[1] = float("nan")
    assert make_metric("latent_mse", CPU)(broken, IMAGES).tolist() == [0, -float("inf"), 0, 0]


def test_a_broken_image_fails_alone_in_pyiqa_metrics() -> None:
    broken = IMAGES.clone()
    broken[2, 0, 3, 3] = float("nan")
    scores = make_metric("ssim", CPU)(broken, IMAGES)
    assert scores[2] == -float("inf") and scores[[0, 1, 3]].tolist() == pytest.approx([1] * 3)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(DiffesError, match="'ssim'"):
        make_metric("ssmi", CPU)


def test_a_metric_of_one_s_own_is_found_by_name() -> None:
    METRICS.register("worst_pixel")(lambda outputs, references: -(outputs - references).abs().flatten(1).amax(1))
    try:
        assert make_metric("worst_pixel", CPU)(IMAGES, IMAGES).tolist() == [0] * 4
    finally:
        METRICS.unregister("worst_pixel")
