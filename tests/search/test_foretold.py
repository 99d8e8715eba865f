"""Evolutions on forecasts, on tiny trajectories of which all plans are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_carried import every_plan, reusing, tiny

from diffes.search import foretold
from diffes.search.carried import Trajectory, front
from diffes.search.frontier import called
from diffes.search.plan import PlanSpace


def space_of(run: Trajectory, calls: float, starts: tuple[tuple[int, ...], ...] = ()) -> PlanSpace:
    again = tuple(int(level) for level in run.reusing)
    return PlanSpace.dense_calls(run.costs[::-1].tolist(), calls, starts=starts, reusing=again)


def alone_by_hand(run: Trajectory, plan: tuple[int, ...]) -> float:
    """Sum of squares of what each jump does to the dense run's own latents, as it reacts to it until the end."""
    path = called(plan, *run.costs.shape)
    ends = [*(node for node, _ in path[1:]), len(plan)]
    total = np.square(run.states[path[0][0]] - run.states[0]).sum()
    before, computed, dense = -1, -1, run.states[0]
    for (i, k), j in zip(path, ends, strict=True):
        (x,) = run.data_at(np.array([i]), np.array([k]), np.array([computed]))
        reach = float(run.reach(i, j, before))
        off = run.step(i, j, run.states[i], x, run.reach(i, j, before), dense) - run.states[j]
        pushed = run.step(i, j, run.states[i] + 1e-3, x + 1e-3 * run.reaction[i], run.reach(i, j, before), dense)
        grows = float((pushed - run.states[j] - off)[0]) / 1e-3
        assert grows == pytest.approx(
            run.noises[j] / run.noises[i]
            + (run.signals[j] - run.signals[i] * run.noises[j] / run.noises[i]) * (1 + reach) * run.reaction[i]
        )
        total = grows**2 * total + np.square(off).sum()
        before, dense = i, run.data[i, 0]
        computed = computed if k in run.reusing else i * run.costs.shape[1] + k
    return float(total)


@pytest.mark.parametrize("run", [tiny(0), tiny(1, second=False), reusing(2, n=4)], ids=["2M", "first", "reuse"])
def test_forecasts_of_many_plans_are_those_of_each(run: Trajectory) -> None:
    plans = [plan for plan in every_plan(run) if called(plan, *run.costs.shape)[0][1] not in run.reusing]
    found = run.errors(plans, 0.0)
    assert found == pytest.approx([run.predict(plan).error for plan in plans], rel=1e-9, abs=1e-12)
    cautious = run.errors(plans, 0.3)
    assert cautious - found == pytest.approx([0.3 * alone_by_hand(run, plan) for plan in plans], rel=1e-6, abs=1e-9)


def test_caution_prefers_small_errors_to_large_ones_that_cancel() -> None:
    """Level 1 is off at both nodes, so that the end is not; level 2 by a little, at the last node."""
    run = tiny(0, n=2, k=3, second=False)
    gain = run.signals[1] - run.signals[0] * run.noises[1] / run.noises[0]
    data = np.repeat(run.data[:, :1], 3, axis=1)
    data[0, 1] += 1.0
    data[1, 1] -= run.reaction[1] * gain
    data[1, 2] += 0.01
    run = replace(run, data=data, reaction=np.array([0.0, 1.0]))
    cancels, small = (1, 1), (2, 0)
    bold, careful = (run.errors([cancels, small], caution) for caution in (0.0, 0.5))
    assert bold[0] < bold[1] and careful[0] > careful[1]


def test_they_find_the_best_forecast_of_all_plans_or_nearly() -> None:
    ratios = []
    for seed in range(2):
        run = tiny(seed)
        space = space_of(run, 2.5)
        feasible = [plan for plan in every_plan(run) if space.is_feasible(plan)]
        best = {c: run.errors(feasible, c).min() for c in foretold.CAUTION}
        found = foretold.evolved(run, space)
        assert all(map(space.is_feasible, found))
        ratios += [run.errors(found, c).min() / best[c] for c in foretold.CAUTION]
    assert min(ratios) > 1 - 1e-9 and max(ratios) < 1.5 and np.median(ratios) == pytest.approx(1)


def test_they_are_no_worse_than_the_plans_they_begin_with() -> None:
    run = reusing(1, n=5)
    space = space_of(run, 2.5)
    solved = [each.levels for each in front(run, 2.5 * run.costs[:, 0].mean()) if space.is_feasible(each.levels)]
    found = foretold.evolved(run, space_of(run, 2.5, tuple(solved)))
    assert found == foretold.evolved(run, space_of(run, 2.5, tuple(solved)))
    for caution in foretold.CAUTION:
        assert run.errors(found, caution).min() <= run.errors(solved, caution).min()
