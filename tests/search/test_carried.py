"""The carrying programme against all plans of tiny trajectories, each run through diffusers' own scheduler."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffes.errors import DiffesError
from diffes.runtime.solver import scheduler_for
from diffes.search.carried import Trajectory, front, variants
from diffes.search.plan import trailing

BASE = DDPMScheduler(prediction_type="sample", clip_sample=False)


def tiny(seed: int, n: int = 5, k: int = 2, r: int = 6, second: bool = True) -> Trajectory:
    """A dense run through random predictions that change slowly, the thinner the further off; costs from 1 to 4."""
    rng = np.random.default_rng(seed)
    signals = np.append(BASE.alphas_cumprod[trailing(n, 1000)].double().sqrt().numpy(), 1.0)
    noises = np.sqrt(1 - signals**2)
    slow = np.cumsum(rng.normal(size=(n, 1, r)), 0) / n
    data = slow + 0.1 * np.arange(k)[:, None] * rng.normal(size=(n, k, r))
    states = [rng.normal(size=r)]
    for i in range(n):
        ratio = noises[i + 1] / noises[i]
        states.append(ratio * states[i] + (signals[i + 1] - signals[i] * ratio) * data[i, 0])
    costs = rng.integers(1, 5, (n, k)).astype(float)
    return Trajectory(np.array(states), data, signals, noises, np.linspace(0, 1, n), costs, second)


def reusing(seed: int, n: int = 6) -> Trajectory:
    """The same with two levels more, which reuse: the further off, the longer ago a call computed everything."""
    run = tiny(seed, n=n, k=4)
    rng = np.random.default_rng(seed + 1000)
    drift = 0.05 * rng.normal(size=(n, 2, 1, run.states.shape[1])) * np.array([1, 3, 8])[:, None]
    data = run.data.copy()
    data[:, 2:] = np.nan
    costs = np.array(run.costs)
    costs[:, 2:] = rng.integers(1, 3, (n, 2))
    return replace(
        run, data=data, costs=costs, reusing=np.array([2, 3]), gaps=np.array([1, 2, 4]),
        reused=data[:, :1, None] + drift,
    )  # fmt: skip


def reused_by_hand(run: Trajectory, i: int, level: int, source: int, thin: int) -> np.ndarray:
    """Between the gaps that were measured on a straight line, none being the dense prediction; and what a thin call
    predicted wrong, by as much as is taken of it."""
    known = {0: run.data[i, 0], **{int(gap): run.reused[i, level - 2, g] for g, gap in enumerate(run.gaps)}}
    low = max(gap for gap in known if gap <= i - source)
    high = min((gap for gap in known if gap >= i - source), default=low)
    share = (i - source - low) / (high - low) if high > low else 0.0
    taken = max(1 - run.costs[i, level] / run.costs[i, 0], 0)
    wrong = run.data[source, thin] - run.data[source, 0]
    return np.asarray((1 - share) * known[low] + share * known[high] + taken * wrong)


def by_hand(run: Trajectory, levels: tuple[int, ...]) -> tuple[float, float]:
    """Cost and error of a plan: the scheduler runs it on what the dense run and its reaction predict."""
    n, k = run.costs.shape
    path = [(i, level) for i, level in enumerate(levels[::-1]) if level < k]
    times = trailing(n, 1000)
    scheduler = scheduler_for(BASE, "dpmsolver++" if run.second else "ddim", [times[i] for i, _ in path])
    at, computed = torch.tensor(run.states[0]), (-1, -1)
    for (i, level), timestep in zip(path, scheduler.timesteps, strict=True):
        off = at - torch.tensor(run.states[i])
        again = level in run.reusing
        predicted = reused_by_hand(run, i, level, *computed) if again else run.data[i, level]
        computed = computed if again else (i, level)
        clean = torch.tensor(predicted) + float(run.reaction[i]) * off
        at = scheduler.step(clean, timestep, at).prev_sample
    error = float(np.square(at.numpy() - run.states[-1]).sum())
    return sum(float(run.costs[i, level]) for i, level in path), error


def every_plan(run: Trajectory) -> list[tuple[int, ...]]:
    n, k = run.costs.shape
    return [plan for plan in itertools.product(range(k + 1), repeat=n) if min(plan) < k]


@pytest.mark.parametrize("second", [True, False])
def test_a_forecast_is_the_schedulers_own_run(second: bool) -> None:
    run = tiny(0, n=4, second=second)
    for plan in every_plan(run):
        found = run.predict(plan)
        assert (found.cost, found.error) == pytest.approx(by_hand(run, plan), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("second", [True, False])
def test_what_the_programme_says_of_its_plans_is_their_forecast(second: bool) -> None:
    for seed in range(5):
        run = tiny(seed, second=second)
        found = front(run, 10, resolution=10)
        assert found == front(run, 10, resolution=10)
        for each in found:
            assert each.cost <= 10
            again = run.predict(each.levels)
            assert (again.cost, again.error) == pytest.approx((each.cost, each.error), abs=1e-9)


def test_it_is_near_the_best_of_all_plans() -> None:
    """A beam: exact where the costs of partial plans hardly ever meet, else not far from it."""
    ratios = []
    for seed in range(20):
        run = tiny(seed)
        best = min(each.error for each in map(run.predict, every_plan(run)) if each.cost <= 8)
        ratios.append(front(run, 8, resolution=8)[-1].error / best)
    assert min(ratios) > 1 - 1e-9 and np.median(ratios) < 1.3


def test_it_is_exact_where_errors_are_orthogonal() -> None:
    """Of first order, each call off in a direction of its own, no reaction: then errors add up as squares."""
    for seed in range(10):
        run = tiny(seed, n=4, r=20, second=False)
        off = np.random.default_rng(seed).uniform(0.5, 1, 8)
        run.states[:, :8] = run.data[:, :, :8] = 0
        run.data[:, :, 8:] = run.data[0, 0, 8:]
        run.states[:, 8:] = run.data[0, 0, 8:] * run.signals[:, None] + 0.5 * run.noises[:, None]
        for call in range(8):
            run.data[call // 2, call % 2, call] = off[call]
        run = replace(run, reaction=np.zeros(4))
        best: dict[float, float] = {}
        lowest = math.inf
        for each in sorted(map(run.predict, every_plan(run)), key=lambda each: (each.cost, each.error)):
            if each.cost <= 8 and each.error < lowest - 1e-12:
                best[each.cost] = lowest = each.error
        found = {each.cost: each.error for each in front(run, 8, resolution=8)}
        assert found == pytest.approx(best, abs=1e-9)


def test_variants_are_distinct_within_the_budget_and_start_with_the_best() -> None:
    run = tiny(3, n=12, k=3)
    found = variants(run, 9, 6)
    assert found[0].levels == front(run, 9)[-1].levels
    assert len({each.levels for each in found}) == len(found) == 6
    assert all(each.cost <= 9 * (1 + 1e-9) for each in found)
    assert all(set(each.levels) <= {1, 3} for each in variants(run, 9, 3, allowed=(1,)))


def test_levels_that_were_not_measured_are_not_called() -> None:
    run = tiny(1, n=6)
    run.data[:, 1] = np.nan
    assert all(set(each.levels) <= {0, 2} for each in front(run, 10))
    with pytest.raises(DiffesError, match="allows no plan of cost 10"):
        front(run, 10, allowed=(1,))
    with pytest.raises(DiffesError, match=r"no plan costs 0\.5 or less"):
        front(run, 0.5)
    with pytest.raises(DiffesError, match="6 nodes and at least one call"):
        run.predict([2] * 6)


def test_it_is_quick() -> None:
    run = tiny(0, n=64, k=9, r=600)
    begun = time.process_time()
    assert len(front(replace(run, costs=np.tile(1 - 0.1 * np.arange(9), (64, 1))), 6)) > 20
    assert time.process_time() - begun < 10


def test_forecasts_of_what_reuses_know_which_call_computed_everything_and_how_thin() -> None:
    for seed in range(3):
        run = reusing(seed, n=5)
        for plan in every_plan(run)[::7]:
            first = next(level for level in plan[::-1] if level < 4)
            if first not in run.reusing:
                found = run.predict(plan)
                assert (found.cost, found.error) == pytest.approx(by_hand(run, plan), rel=1e-4, abs=1e-8)


def test_the_programme_reuses_where_that_is_best() -> None:
    """Its plans are worth what they are said to be, none begins with reuse, and the best is near the best of all."""
    ratios, reuses = [], 0
    for seed in range(8):
        run = reusing(seed, n=5)
        found = front(run, 8, resolution=8)
        for each in found:
            called = [level for level in each.levels[::-1] if level < 4]
            assert called[0] not in run.reusing and each.cost <= 8
            assert run.predict(each.levels).error == pytest.approx(each.error, abs=1e-9)
            reuses += any(level in run.reusing for level in called)
        allowed = [p for p in every_plan(run) if next(k for k in p[::-1] if k < 4) not in run.reusing]
        best = min(each.error for each in map(run.predict, allowed) if each.cost <= 8)
        ratios.append(found[-1].error / best)
        assert not any(set(each.levels) & {2, 3} for each in front(run, 8, resolution=8, allowed=(0, 1)))
    assert reuses and min(ratios) > 1 - 1e-9 and np.median(ratios) < 1.3
