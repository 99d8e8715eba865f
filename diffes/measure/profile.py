"""Facts about a model along the trajectory, measured before or beside a search."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.pruning.calibration import CalibrationSet
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import StageProfile

BATCH = 32


@torch.no_grad()
def stage_profile(adapter: ModelAdapter, data: CalibrationSet, stages: Stages, seed: int) -> StageProfile:
    """Measure the dense model's loss in each stage, at timesteps spread over it, and its signal-to-noise ratio.

    Args:
        adapter: the dense model.
        data: clean latents, all of which are noised to each stage.
        stages: their ranges of timesteps.
        seed: seed of the noise; stage s draws the same noise whatever the other stages do.
    """
    losses, ratios = [], []
    for stage, (lo, hi) in enumerate(stages.ranges):
        generator = torch.Generator().manual_seed(seed * 100_003 + stage)
        timesteps = torch.linspace(lo, hi - 1, len(data)).round().long()
        noise = torch.randn(data.latents.shape, generator=generator)

        def errors(n: int, timesteps: Tensor = timesteps, noise: Tensor = noise) -> Tensor:
            found = []
            for rows in torch.arange(len(data)).split(n):
                clean, drawn, t = data.latents[rows], noise[rows], timesteps[rows]
                noisy = adapter.add_noise(clean.to(adapter.device, adapter.dtype), drawn, t)
                predicted = adapter.denoise_once(noisy, t, [data.conditions[i] for i in rows.tolist()]).float().cpu()
                wanted = adapter.target(clean.float().cpu(), drawn, t)
                predicted = predicted[:, : wanted.shape[1]]  # models that also learn the variance have it there
                found.append((predicted - wanted).square().flatten(1).mean(1))
            return torch.cat(found)

        losses.append(float(adapter.within_room(errors, BATCH).mean()))
        ratios.append(adapter.log_snr((lo + hi) // 2))
    return StageProfile(tuple(losses), tuple(ratios), len(data) * len(stages))


def sensitivity_table(evaluator: ScheduleEvaluator, space: SearchSpace) -> list[list[float]]:
    """Measure the sensitivity (S, H + 1) to each level of each stage: how much fitness it costs on its own.

    It is measured on the evaluator's probes, and NaN in stages that no step falls into. Stages that agree with the
    dense model share its trajectory, so the whole table costs about half as many evaluations as it has cells.
    """
    single = {
        (s, k): space.any_schedule([k if i == s else 0 for i in range(space.n_stages)])
        for s in space.visited
        for k in range(space.max_level + 1)
    }
    fitness = {e.schedule: e.fitness for e in evaluator(list(dict.fromkeys(single.values())))}
    dense = fitness[space.any_schedule([0] * space.n_stages)]
    return [
        [dense - fitness[single[s, k]] if (s, k) in single else math.nan for k in range(space.max_level + 1)]
        for s in range(space.n_stages)
    ]
