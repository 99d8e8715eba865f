from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import build_bank
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from diffes.adapters import ModelAdapter
from diffes.bank import WeightBank
from diffes.evaluation import ScheduleEvaluator
from diffes.metrics import make_metric
from diffes.pruning import GroupWeights
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan
from diffes.strategy import Evaluation


def make(
    adapter: ModelAdapter, plan: StagePlan, metric: str = "latent_mse", method: str = "magnitude", **options: int
) -> ScheduleEvaluator:
    router = Router(adapter, build_bank(adapter, method, plan))
    return ScheduleEvaluator(
        router, plan, adapter.make_probes(5, 3), n_steps=8, guidance=2.0, metric=make_metric(metric, adapter.device),
        batch=3, **options,
    )  # fmt: skip


def only(evaluator: ScheduleEvaluator, schedule: Schedule) -> Evaluation:
    (evaluation,) = evaluator([schedule])
    return evaluation


SCHEDULES = [(0, 1, 2, 3), (3, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 0), (0, 0, 3, 3), (3, 3, 0, 0), (0, 0, 2, 3)]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_prefix_reuse_gives_the_same_bits_for_fewer_calls_with_all_samplers(
    untrained: ModelAdapter, plan: StagePlan, scheduler: type
) -> None:
    untrained.pipe.scheduler = scheduler.from_config(untrained.pipe.scheduler.config)
    check_prefix_reuse(untrained, plan)


def test_prefix_reuse_gives_the_same_bits_for_fewer_calls(adapter: ModelAdapter, plan: StagePlan) -> None:
    check_prefix_reuse(adapter, plan)


def check_prefix_reuse(adapter: ModelAdapter, plan: StagePlan) -> None:
    schedules = [Schedule(plan, levels, adapter.max_level("width")) for levels in SCHEDULES]
    shared, alone = make(adapter, plan), make(adapter, plan, cache_bytes=0)
    together = {e.schedule: e for e in shared(schedules)}
    separately = [only(alone, schedule) for schedule in schedules]
    assert [together[schedule].fitness for schedule in schedules] == [e.fitness for e in separately]
    assert separately[0].denoiser_calls == 8 * 5 * 2  # steps x probes x branches
    assert sum(e.denoiser_calls for e in together.values()) < sum(e.denoiser_calls for e in separately)
    assert sum(e.denoiser_calls for e in together.values()) == shared.denoiser_calls
    assert only(shared, schedules[0]).denoiser_calls == 0


def test_dense_schedule_scores_perfectly(adapter: ModelAdapter, plan: StagePlan) -> None:
    dense = Schedule(plan, (0, 0, 0, 0), adapter.max_level("width"))
    assert only(make(adapter, plan), dense).fitness == 0
    assert only(make(adapter, plan, "psnr"), dense).fitness > 60
    evaluator = make(adapter, plan)
    assert evaluator.dense_scores(8).tolist() == [0] * 5
    assert evaluator.dense_scores(4).max() < 0


def test_more_sparsity_is_worse_on_the_trained_model(plan: StagePlan) -> None:
    from diffes.adapters import adapter_for, load_pipeline

    adapter = adapter_for(load_pipeline("fashion-dit"))
    fitness = [only(make(adapter, plan, "ssim", "obs"), Schedule(plan, (k,) * 4, 8)).fitness for k in (1, 4, 7)]
    assert 1 > fitness[0] > fitness[1] > fitness[2]


def test_global_random_state_is_left_alone(adapter: ModelAdapter, plan: StagePlan) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    only(make(adapter, plan), Schedule(plan, SCHEDULES[0], adapter.max_level("width")))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_failed_images_are_minus_infinity(tiny: ModelAdapter, plan: StagePlan) -> None:
    evaluator = make(tiny, plan, method="obs")
    broken = {
        name: GroupWeights(weights.kept, torch.full_like(weights.consumer, float("nan")))
        for name, weights in evaluator.router.bank[0, 1].items()
    }
    evaluator.router.bank = WeightBank({(0, 1): broken}, "width")
    assert only(evaluator, Schedule(plan, (1, 0, 0, 0), 4)).fitness == -float("inf")


def test_a_fraction_of_the_probes_costs_that_fraction(untrained: ModelAdapter, plan: StagePlan) -> None:
    """Scores are those of the first probes; a denoiser call on 3 of 5 rows is another batch, so within rounding."""
    evaluator = make(untrained, plan)
    schedule = Schedule(plan, SCHEDULES[0], untrained.max_level("width"))
    (part,) = evaluator([schedule], 0.5)
    assert (part.fidelity, part.denoiser_calls) == (0.5, 8 * 3 * 2)
    assert part.fitness == pytest.approx(float(evaluator.scores(schedule)[:3].mean()), rel=1e-3)
    assert only(evaluator, schedule).fidelity == 1


@pytest.mark.parametrize("cache_bytes", [1 << 28, 6000])
def test_what_an_earlier_process_measured_is_counted_as_if_it_had_gone_on(
    tiny: ModelAdapter, plan: StagePlan, cache_bytes: int
) -> None:
    """After any number of evaluations, a fresh evaluator that is told of them counts the rest as the old one does."""
    rng = np.random.default_rng(0)
    levels = [tuple(int(k) for k in rng.integers(0, 3, 4)) for _ in range(24)]
    schedules = [Schedule(plan, each, 4) for each in dict.fromkeys(levels)]
    whole = make(tiny, plan, cache_bytes=cache_bytes)
    before = [only(whole, schedule) for schedule in schedules]
    for done in (0, 1, 7, len(schedules) - 1):
        resumed = make(tiny, plan, cache_bytes=cache_bytes)
        for evaluation in before[:done]:
            resumed.remember(evaluation)
        after = [only(resumed, schedule) for schedule in schedules[done:]]
        assert [(e.fitness, e.denoiser_calls) for e in after] == [(e.fitness, e.denoiser_calls) for e in before[done:]]
