from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import open_adapter, small_bank
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

import diffes
from diffes.adapters import ModelAdapter, SamplingState
from diffes.measure.evaluator import ScheduleEvaluator, _copied, size_of
from diffes.measure.metrics import METRICS, make_metric
from diffes.pruning import GroupWeights
from diffes.pruning.bank import WeightBank
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.strategy import Evaluation


def make(
    adapter: ModelAdapter, stages: Stages, metric: str = "latent_mse", method: str = "magnitude", **options: int
) -> ScheduleEvaluator:
    router = Router(adapter, small_bank(adapter, method, stages))
    return ScheduleEvaluator(
        router, stages, adapter.make_probes(5, 3), n_steps=8, guidance=2.0, metric=make_metric(metric, adapter.device),
        batch=3, **options,
    )  # fmt: skip


def only(evaluator: ScheduleEvaluator, schedule: Schedule) -> Evaluation:
    (evaluation,) = evaluator([schedule])
    return evaluation


SCHEDULES = [(0, 1, 2, 3), (3, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 0), (0, 0, 3, 3), (3, 3, 0, 0), (0, 0, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_prefix_reuse_gives_the_same_bits_for_fewer_calls_with_all_samplers(
    untrained: ModelAdapter, stages: Stages, scheduler: Any
) -> None:
    untrained.pipe.scheduler = scheduler.from_config(untrained.pipe.scheduler.config)
    check_prefix_reuse(untrained, stages)


@pytest.mark.slow
def test_prefix_reuse_gives_the_same_bits_for_fewer_calls(stages: Stages) -> None:
    check_prefix_reuse(open_adapter("fashion-dit"), stages)


def check_prefix_reuse(adapter: ModelAdapter, stages: Stages) -> None:
    schedules = [Schedule(stages, levels, adapter.max_level("width")) for levels in SCHEDULES]
    shared, alone = make(adapter, stages), make(adapter, stages, cache_bytes=0)
    together = {e.schedule: e for e in shared(schedules)}
    separately = [only(alone, schedule) for schedule in schedules]
    assert [together[schedule].fitness for schedule in schedules] == [e.fitness for e in separately]
    assert separately[0].denoiser_calls == 8 * 5 * 2  # steps x probes x branches
    assert sum(e.denoiser_calls for e in together.values()) < sum(e.denoiser_calls for e in separately)
    assert sum(e.denoiser_calls for e in together.values()) == shared.denoiser_calls
    assert only(shared, schedules[0]).denoiser_calls == 0


def test_dense_schedule_scores_perfectly(adapter: ModelAdapter, stages: Stages) -> None:
    dense = Schedule(stages, (0, 0, 0, 0), adapter.max_level("width"))
    assert only(make(adapter, stages), dense).fitness == 0
    assert only(make(adapter, stages, "psnr"), dense).fitness > 60
    evaluator = make(adapter, stages)
    assert evaluator.dense_scores(8).tolist() == [0] * 5
    assert evaluator.dense_scores(4).max() < 0


def test_an_image_metric_of_one_s_own_ranks_by_images_and_conditions(untrained: ModelAdapter, stages: Stages) -> None:
    """One that counts a single class or prompt only, in images, where lower is better."""
    probes = untrained.make_probes(5, 3)
    chosen = probes.conditions[4]  # of the second part of a batch
    seen: list[tuple[Any, ...]] = []

    @diffes.metric("error_of_one", space="image", higher_is_better=False)
    def error_of_one(outputs: torch.Tensor, references: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        seen.append((tuple(outputs.shape[1:]), conditions))
        return (outputs - references).square().flatten(1).mean(1) * torch.tensor([c == chosen for c in conditions])

    try:
        evaluator = make(untrained, stages, "error_of_one")
        schedules = [Schedule(stages, levels, untrained.max_level("width")) for levels in SCHEDULES]
        found = {e.schedule: e.fitness for e in evaluator(schedules)}
        (half,) = evaluator(schedules[:1], 0.5)
    finally:
        METRICS.unregister("error_of_one")
    assert seen == [((3, 16, 16), probes.conditions)] * len(schedules) + [((3, 16, 16), probes.conditions[:3])]
    assert (half.fitness == 0) == (chosen not in probes.conditions[:3])
    of_chosen = torch.tensor([c == chosen for c in probes.conditions])
    references = untrained.decode(evaluator.final_reference)
    for schedule in schedules:
        images = untrained.decode(evaluator.latents(schedule))
        errors = (images - references).square().flatten(1).mean(1) * of_chosen
        assert found[schedule] == pytest.approx(-float(errors.mean()), rel=1e-4) and found[schedule] < 0


@pytest.mark.slow
def test_more_sparsity_is_worse_on_the_trained_model(stages: Stages) -> None:
    from diffes.adapters import adapter_for, load_pipeline

    adapter = adapter_for(load_pipeline("fashion-dit"))
    evaluator = make(adapter, stages, "ssim", "obs")
    fitness = [only(evaluator, Schedule(stages, (k,) * 4, 8)).fitness for k in (1, 4, 7)]
    assert 1 > fitness[0] > fitness[1] > fitness[2]


def test_global_random_state_is_left_alone(adapter: ModelAdapter, stages: Stages) -> None:
    def states() -> tuple[Any, ...]:
        legacy: Any = np.random.get_state()
        return random.getstate(), legacy[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    only(make(adapter, stages), Schedule(stages, SCHEDULES[0], adapter.max_level("width")))
    assert before == states()


def test_failed_images_are_minus_infinity(tiny: ModelAdapter, stages: Stages) -> None:
    evaluator = make(tiny, stages, method="obs")
    broken = {}
    for name, weights in evaluator.router.bank[0, 1].items():
        (consumer,) = weights.consumers
        broken[name] = GroupWeights(weights.kept, (torch.full_like(consumer, float("nan")),))
    evaluator.router.bank = WeightBank({(0, 1): broken}, "width")
    assert only(evaluator, Schedule(stages, (1, 0, 0, 0), 4)).fitness == -float("inf")


def test_a_fraction_of_the_probes_costs_that_fraction(untrained: ModelAdapter, stages: Stages) -> None:
    """Scores are those of the first probes; a denoiser call on 3 of 5 rows is another batch, so within rounding."""
    evaluator = make(untrained, stages)
    schedule = Schedule(stages, SCHEDULES[0], untrained.max_level("width"))
    (part,) = evaluator([schedule], 0.5)
    assert (part.fidelity, part.denoiser_calls) == (0.5, 8 * 3 * 2)
    assert part.fitness == pytest.approx(float(evaluator.scores(schedule)[:3].mean()), rel=1e-3)
    assert only(evaluator, schedule).fidelity == 1


def some_schedules(stages: Stages, n: int) -> list[Schedule]:
    """Distinct ones."""
    rng = np.random.default_rng(0)
    levels = [tuple(int(k) for k in rng.integers(0, 3, 4)) for _ in range(n)]
    return [Schedule(stages, each, 4) for each in dict.fromkeys(levels)]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("states", [1, 5, 1000])
def test_what_an_earlier_process_measured_is_counted_as_if_it_had_gone_on(
    tiny: ModelAdapter, stages: Stages, scheduler: Any, states: int
) -> None:
    """After any number of evaluations, a fresh evaluator that is told of them counts the rest as the old one does, and
    it counts what it pays; in which order those of a batch are measured changes nothing."""
    tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config)
    cache_bytes = states * make(tiny, stages)._state_bytes(5)
    schedules = some_schedules(stages, 14)
    whole = make(tiny, stages, cache_bytes=cache_bytes)
    before = [only(whole, schedule) for schedule in schedules]
    assert whole.paid_calls == whole.denoiser_calls == sum(evaluation.denoiser_calls for evaluation in before)
    for done in (0, 7, len(schedules) - 1):
        resumed = make(tiny, stages, cache_bytes=cache_bytes)
        for evaluation in before[:done]:
            resumed.expect([evaluation.schedule])
        after = [only(resumed, schedule) for schedule in schedules[done:]]
        assert [(e.fitness, e.denoiser_calls) for e in after] == [(e.fitness, e.denoiser_calls) for e in before[done:]]
    batch, backwards = (make(tiny, stages, cache_bytes=cache_bytes) for _ in range(2))
    backwards.expect(schedules)
    counted = {each.schedule: each.denoiser_calls for each in batch(schedules)}
    assert {each: only(backwards, each).denoiser_calls for each in schedules[::-1]} == counted


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("states", [0, 3, 8])
def test_the_states_kept_take_no_more_memory_than_they_may(
    tiny: ModelAdapter, stages: Stages, scheduler: Any, states: int
) -> None:
    """Counted over everything that a state holds, the sampler's tables and memory included."""
    tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config)
    one = size_of(_copied(after_a_run(tiny)))
    evaluator = make(tiny, stages, cache_bytes=states * one)
    for schedule in some_schedules(stages, 24):
        only(evaluator, schedule)
        held = [each for _, each in evaluator._cache._states.values() if each is not None]
        assert held and sum(map(size_of, held)) <= (states + 1) * one
    assert len(held) >= max(states - 1, 1)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_state_is_taken_for_as_large_as_it_is(tiny: ModelAdapter, stages: Stages, scheduler: Any) -> None:
    tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config)
    real, taken = size_of(after_a_run(tiny)), make(tiny, stages)._state_bytes(5)
    assert real <= taken < 1.1 * real


def after_a_run(adapter: ModelAdapter) -> tuple[SamplingState, ...]:
    """The last states of five probes, three a batch, when samplers with a memory have filled it."""
    probes, ended = adapter.make_probes(5, 3), []
    for part in (probes[:3], probes[3:]):
        state = adapter.start(part, 8, 2.0)
        with torch.no_grad():
            for _ in range(8):
                state = adapter.step(state, part, 2.0)
        ended.append(state)
    return tuple(ended)


def test_sizes_count_everything_once() -> None:
    tensor = torch.zeros(1000)
    assert 4000 <= size_of(tensor) < 4200
    assert size_of([tensor, tensor, tensor[10:]]) < 4800
    assert size_of({"a": torch.zeros(1000), "b": (torch.zeros(1000),)}) > 8000
    assert size_of(np.zeros(1000)) >= 8000

    class Holder:
        def __init__(self) -> None:
            self.held, self.itself = [torch.zeros(1000)], self

    assert 4000 < size_of(Holder()) < 5500


def test_cached_states_share_the_tables_of_the_noise_process_and_nothing_that_steps_write_to(
    untrained: ModelAdapter,
) -> None:
    """Of 5,000 evaluations those tables were most of what a worker held."""
    probes = untrained.make_probes(2, 0)
    state = untrained.step(untrained.start(probes, 6, 1.0), probes, 1.0)
    copied = _copied((state,))
    assert copied is not None
    (kept,) = copied
    assert kept.scheduler is not state.scheduler
    assert kept.scheduler.alphas_cumprod is state.scheduler.alphas_cumprod
    assert kept.scheduler.alphas_cumprod.nbytes > 1000
    ended = [state, kept]
    for i in range(2):
        while ended[i].index < 6:
            ended[i] = untrained.step(ended[i], probes, 1.0)
    assert torch.equal(untrained.finish(ended[0]), untrained.finish(ended[1]))
