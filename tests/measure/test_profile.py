"""Facts about the trajectory, against the same numbers by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_bank

from diffes.adapters import ModelAdapter
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.measure.metrics import make_metric
from diffes.measure.profile import sensitivity_table, stage_profile
from diffes.pruning.calibration import load_calibration
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("images", [24, 1])
def test_the_profile_is_the_loss_on_noised_images(untrained: ModelAdapter, kind: str, images: int) -> None:
    """One stage, one image at a time, from the noise schedule's own numbers."""
    scheduler: Any = type(untrained.pipe.scheduler)
    untrained.pipe.scheduler = scheduler.from_config(untrained.pipe.scheduler.config, prediction_type=kind)
    data = load_calibration(untrained, Path(untrained.pipe.config._name_or_path) / "calibration.npz", images)
    stages = Stages(((0, 100), (100, 140), (140, 1000)))
    profile = stage_profile(untrained, data, stages, seed=3)
    assert len(profile.loss) == len(profile.log_snr) == 3

    alphas = untrained.pipe.scheduler.alphas_cumprod.double()
    noise = torch.randn(data.latents.shape, generator=torch.Generator().manual_seed(3 * 100_003 + 1))
    losses = []
    for i in range(images):
        t = round(100 + 39 * i / max(images - 1, 1))
        signal, rest = float(alphas[t].sqrt()), float((1 - alphas[t]).sqrt())
        clean, drawn = data.latents[i : i + 1], noise[i : i + 1]
        with torch.no_grad():
            predicted = untrained.denoise_once(
                signal * clean + rest * drawn, torch.tensor([t]), data.conditions[i : i + 1]
            )[:, :4]
        wanted = drawn if kind == "epsilon" else signal * drawn - rest * clean
        losses.append(float((predicted - wanted).square().mean()))
    assert profile.loss[1] == pytest.approx(sum(losses) / images, rel=1e-3)
    middle = float(alphas[120])
    assert profile.log_snr[1] == pytest.approx(math.log(middle / (1 - middle)), rel=1e-4)


def test_a_stage_of_the_profile_does_not_depend_on_the_others(tiny: ModelAdapter) -> None:
    data = load_calibration(tiny, Path(tiny.pipe.config._name_or_path) / "calibration.npz", 8)
    whole = stage_profile(tiny, data, Stages(((0, 100), (100, 500), (500, 1000))), seed=0)
    other = stage_profile(tiny, data, Stages(((0, 50), (50, 100), (100, 500), (500, 1000))), seed=0)
    assert whole.loss[0] != other.loss[0]
    assert stage_profile(tiny, data, Stages(((0, 100), (100, 1000))), seed=0).loss[0] == whole.loss[0]
    assert stage_profile(tiny, data, Stages(((0, 100), (100, 1000))), seed=1).loss[0] != whole.loss[0]


class Counted(ScheduleEvaluator):
    """Notes how often each schedule is measured."""

    seen: Counter[Schedule]

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        self.seen = Counter(schedules)
        return super().__call__(schedules, fidelity)


def test_damage_is_what_each_level_of_each_stage_costs_alone(tiny: ModelAdapter, stages: Stages) -> None:
    """Two steps visit two of the four stages; of the others nothing is known."""
    router = Router(tiny, small_bank(tiny, "magnitude", stages))
    options: dict[str, Any] = {"n_steps": 2, "guidance": 2.0, "metric": make_metric("latent_cosine", tiny.device)}
    evaluator = Counted(router, stages, tiny.make_probes(3, 0), **options)
    space = SearchSpace.mean_sparsity(stages, 4, 0.5, evaluator.steps)
    table = sensitivity_table(evaluator, space)
    assert space.visited == [0, 2]
    assert evaluator.seen.total() == len(evaluator.seen) == 1 + 2 * 4
    alone = ScheduleEvaluator(router, stages, tiny.make_probes(3, 0), cache_bytes=0, **options)
    assert np.isnan(table).all(1).tolist() == [False, True, False, True]
    for stage in space.visited:
        for level in range(5):
            levels = tuple(level if s == stage else 0 for s in range(4))
            expected = 1 - float(alone.scores(Schedule(stages, levels, 4)).mean())
            assert table[stage][level] == pytest.approx(expected, abs=1e-6)
    assert table[0][4] > 0 and table[2][4] > 0
