"""One interface for schedules and plans: what is above a problem works on both, and on a problem of one's own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Counting, plan_config, small_config
from deap import algorithms, base, creator, tools

from diffes.config import DEFAULTS, RunConfig, changed
from diffes.errors import DiffesError
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.problems.base import PROBLEMS
from diffes.problems.plans import Steps
from diffes.problems.workbench import Workbench, prepare, vary
from diffes.spaces.plan import PlanSpace
from diffes.spaces.schedule import Plan
from diffes.study.grid import run_experiment

SMALL = {"probes": 2, "heldout": 2, "fit_probes": 2, "max_evals": 8}


@pytest.fixture(scope="module")
def planned(tiny_folder: Path) -> Workbench:
    return prepare(plan_config(tiny_folder, **SMALL), Counting())


def test_a_workbench_searches_plans(planned: Workbench) -> None:
    found = planned.search("evopress", progress=Counting())
    assert isinstance(planned.space, PlanSpace) and len(found.evaluations) >= 8
    assert all(planned.space.is_feasible(e.schedule.levels) for e in found.evaluations)
    final = planned.problem.finish(found)
    assert isinstance(final.routed, Plan) and final.routed.coefficients is not None and final.calls > 0
    steps = planned.search("evopress", progress=Counting(), genes="steps", calls=2.0)
    assert {level for e in steps.evaluations for level in e.schedule.levels} <= {0, planned.space.max_level}


def test_levels_and_plans_share_one_calibrated_model(planned: Workbench, bench: Workbench) -> None:
    levels = vary(planned, changed(planned.config, genes="levels", metric="latent_mse"), Counting())
    assert levels.router is planned.router and levels.config.cost == "level"
    assert levels.space == bench.space
    assert vary(levels, changed(levels.config, genes="joint", calls=3.0), Counting()).config.solver == "fitted"


def test_the_algorithms_of_deap_run_on_plans(planned: Workbench) -> None:
    """Individuals of `creator` and DEAP's own algorithm, as its documentation shows them."""
    toolbox: base.Toolbox = planned.toolbox(seed=3)
    creator.create("PlanFitness", base.Fitness, weights=(1.0,))
    creator.create("PlanIndividual", list, fitness=creator.PlanFitness)
    population = [creator.PlanIndividual(each) for each in toolbox.population(n=4)]
    state = random.getstate()
    random.seed(0)
    try:
        last, logbook = algorithms.eaMuPlusLambda(
            population, toolbox, mu=3, lambda_=4, cxpb=0.3, mutpb=0.7, ngen=2, verbose=False
        )
    finally:
        random.setstate(state)
    assert len(logbook) == 3
    best = tools.selBest(last, 1)[0]
    result = toolbox.result()
    assert best.fitness.values[0] == result.best.fitness
    assert planned.space.is_feasible(best)


@pytest.mark.slow
def test_strategies_are_compared_on_plans(tiny_folder: Path, tmp_path: Path) -> None:
    """At equal denoiser calls, with the rivals of plans, and never interpolated; finished cells are kept."""
    config = plan_config(tiny_folder, **SMALL | {"strategy": "auto"})
    found = run_experiment(config, {"strategy": ["evopress", "random"]}, 2, tmp_path, Counting())
    assert [r.settings["strategy"] for r in found.records] == ["evopress"] * 2 + ["random"] * 2
    for record in found.records:
        assert isinstance(record.found, Plan) and record.above is None
        assert list(record.rivals) == ["dense", "off-the-shelf"]
        assert (record.searched.cost or 9.0) <= 3.0 + 1e-6 and record.searched.search is not None
        assert record.denoiser_calls > sum(calls for calls, _ in record.curve[-1:]) - 1  # with the final fit
        assert record.rivals["dense"].search is not None
        assert record.rivals["dense"].search <= record.searched.search  # fitted plans begin with even spacings
    head, body = found.table()
    assert {"dense", "off-the-shelf", "cost"} <= set(head) and "MACs" not in head and len(body) == 2
    assert {"plans.png", "results.csv", "table.md", "convergence.png"} <= {path.name for path in tmp_path.iterdir()}
    again = Counting()
    assert run_experiment(config, {"strategy": ["evopress", "random"]}, 2, tmp_path, again).records == found.records
    assert not any("calibrating" in title for title in again.titles)


@pytest.mark.slow
def test_cells_of_a_seed_share_their_references(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of five seeds needs two references, for its search and for its final fit; all share the held-out one."""
    made: list[int] = []
    build = PlanEvaluator.__init__

    def counted(self: PlanEvaluator, *args: Any, **options: Any) -> None:
        made.append(1)
        build(self, *args, **options)

    monkeypatch.setattr(PlanEvaluator, "__init__", counted)
    config = plan_config(tiny_folder, nodes=6, probes=2, heldout=2, max_evals=2, calls=2.0)
    found = run_experiment(config, {"strategy": ["random", "evopress"]}, 5, tmp_path, Counting())
    assert len(made) == 5 * 2 + 1
    assert [record.settings["seed"] for record in found.records] == [*range(5)] * 2


@pytest.mark.slow
def test_what_is_only_for_plans_can_be_ablated(tiny_folder: Path, tmp_path: Path) -> None:
    config = plan_config(tiny_folder, **SMALL)
    varied: dict[str, Sequence[Any]] = {"calls": [2.0, 3.0], "solver": ["fitted", "dpmsolver++"]}
    found = run_experiment(config, varied, 1, tmp_path, Counting())
    lines = {(line["calls"], line["solver"]): line for line in found.summary()}
    assert len(lines) == 4
    assert lines[3.0, "fitted"]["heldout_mean"] > lines[3.0, "dpmsolver++"]["heldout_mean"]
    assert lines[3.0, "dpmsolver++"]["difference"] is not None and lines[2.0, "fitted"]["difference"] is None


@pytest.fixture
def noisy_half() -> Iterator[str]:
    """A problem of one's own: dense calls in the noisier half of the trajectory only."""

    @PROBLEMS.register("noisy_half")
    class NoisyHalf(Steps):
        @cached_property
        def space(self) -> PlanSpace:
            whole, half = super().space, self.plans.nodes // 2
            costs = [(10**9,) * whole.skip + (0,)] * half + list(whole.level_costs[half:])
            return replace(whole, level_costs=tuple(costs), starts=())

    yield "noisy_half"
    PROBLEMS.unregister("noisy_half")


def test_a_problem_of_ones_own_works_in_every_command(noisy_half: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = plan_config(tiny_folder, **SMALL | {"genes": noisy_half, "calls": 2.0, "strategy": "random"})
    found = run_experiment(config, {"strategy": ["random", "evopress"]}, 1, tmp_path, Counting())
    for record in found.records:
        assert isinstance(record.found, Plan) and min(record.found.timesteps) >= 500
    with pytest.raises(DiffesError, match=r"unknown genes 'noisy_hal'\. Did you mean .*'noisy_half'"):
        prepare(replace(config, genes="noisy_hal"), Counting())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"genes": "levels", "calls": 3.0}, r"--calls 3 sets the budget of plans. With --genes levels, use --budget"),
        ({"budget": 0.4}, r"--budget 0\.4 sets the budget of schedules. With --genes joint, use --calls instead"),
        ({"genes": "steps", "budget": 0.4}, "With --genes steps, use --calls"),
        ({"genes": "levels", "solver": "ddim"}, "--solver ddim is for plans. With --genes levels, leave it out"),
        ({"genes": "levels", "nodes": 8}, "--nodes 8 is for plans"),
        ({"genes": "levels", "fit_probes": 8}, "--fit-probes 8 is for plans"),
        ({"cost": "level"}, "--cost level is for --genes levels"),
        ({"calls": True}, "calls must be a number, got True"),
        ({"nodes": 1}, "nodes must be at least 2, got 1"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        RunConfig(**settings)  # type: ignore[arg-type]


def test_what_is_left_out_depends_on_what_is_searched(tiny_folder: Path) -> None:
    levels, plans = RunConfig(genes="levels").resolved(), RunConfig().resolved()
    assert (levels.metric, levels.strategy, levels.cost, levels.budget) == ("ssim", "evolution", "level", 0.5)
    assert (plans.metric, plans.strategy, plans.cost, plans.budget) == ("latent_mse", "evopress", "macs", None)
    assert (plans.calls, plans.nodes, plans.solver, plans.fit_probes) == (6.0, 64, "fitted", DEFAULTS["fit_probes"])
    assert [levels.calls, levels.nodes, levels.solver, levels.fit_probes] == [None] * 4
    assert np.isclose(small_config(tiny_folder).budget or 0.0, 0.5)
