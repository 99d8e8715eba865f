from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffes
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


def test_a_decorated_metric_has_its_space_its_direction_and_conditions() -> None:
    @diffes.metric("of_class", space="image", higher_is_better=False)
    def of_class(outputs: Tensor, references: Tensor, conditions: tuple[int, ...]) -> Tensor:
        return (outputs - references).abs().flatten(1).amax(1) * torch.tensor(conditions)

    try:
        made = make_metric("of_class", CPU)
        assert (made.name, made.space, made.higher_is_better) == ("of_class", "image", False)
        assert made(IMAGES + 0.5, IMAGES, (0, 1, 2, 3)).tolist() == pytest.approx([0, -0.5, -1, -1.5])
        assert made is not of_class and made == of_class and not METRICS.is_known_elsewhere("of_class")
        again = diffes.metric("of_latents")(of_class.function)
        assert (again.space, again.higher_is_better) == ("latent", True) and make_metric("of_class", CPU) == made
    finally:
        METRICS.unregister("of_class")
        METRICS.unregister("of_latents")


def test_a_failure_is_one_in_both_directions() -> None:
    for higher_is_better in (True, False):
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
        made = diffes.metric("odd", higher_is_better=higher_is_better)(lambda *_, values=values: values)
        METRICS.unregister("odd")
        assert made(IMAGES, IMAGES).tolist() == [-float("inf")] * 3 + [1 if higher_is_better else -1]
