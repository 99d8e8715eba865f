"""What holds for every registered strategy, mutation and crossover, and what is particular to one of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.schedule import StagePlan
from diffes.search import run_search
from diffes.space import SearchSpace
from diffes.strategy import CROSSOVERS, MUTATIONS, STRATEGIES, Evaluation, StageProfile, mutation
from diffes.testing import (
    SPACES,
    CrossoverConformance,
    MutationConformance,
    StrategyConformance,
    evaluate,
    separable,
    trace,
)
from search_strategies.evolution import Evolution
from search_strategies.exhaustive import feasible
from search_strategies.operators import Genome
from search_strategies.optuna_search import Tpe


def make_mosaic(self: StrategyConformance, space: SearchSpace | None = None, seed: int = 0) -> Any:
    space = space or SPACES["small"]
    n = space.n_stages
    profile = StageProfile(tuple(1 / (i + 1) for i in range(n)), tuple(float(n - 2 * i) for i in range(n)))
    return STRATEGIES.get("mosaic")(space, seed=seed, profile=profile)


PARTICULAR: dict[str, dict[str, Any]] = {
    "exhaustive": {"random": False},
    "mosaic": {
        "searches": False,
        "random": False,
        "make": make_mosaic,
        "test_the_sequence_is_the_same_in_another_process": None,  # it needs a profile, which is no option
    },
    "optuna": {"evaluations": 40},
    "tpe": {"evaluations": 40},
    "uniform": {"searches": False, "random": False},
}

for name in STRATEGIES.names():
    globals()[f"Test_strategy_{name}"] = type(
        f"Test_strategy_{name}", (StrategyConformance,), {"name": name, **PARTICULAR.get(name, {})}
    )
for name in MUTATIONS.names():
    globals()[f"Test_mutation_{name}"] = type(f"Test_mutation_{name}", (MutationConformance,), {"name": name})
for name in CROSSOVERS.names():
    globals()[f"Test_crossover_{name}"] = type(f"Test_crossover_{name}", (CrossoverConformance,), {"name": name})


def make(name: str, space: SearchSpace = SPACES["paper"], seed: int = 0, **params: Any) -> Any:
    return STRATEGIES.get(name)(space, seed=seed, **params)


@pytest.mark.parametrize(
    ("name", "param", "value", "message"),
    [
        ("evolution", "mu", 0, "mu must be at least 1, got 0"),
        ("evolution", "lam", -1, "lam must be at least 1, got -1"),
        ("evolution", "initial", 0, "initial must be at least 1, got 0"),
        ("evolution", "mu", 1.5, "mu must be a whole number, got 1.5"),
        ("evolution", "mutation", "nothing", "unknown mutation 'nothing'"),
        ("evolution", "mutation", "level_switch:moves=1", "moves"),
        ("evolution", "crossover", "nothing", "unknown crossover 'nothing'"),
        ("evolution", "crossover_rate", 2, r"crossover_rate must be in \[0, 1\], got 2"),
        ("evopress", "lam", 0, "lam must be at least 1, got 0"),
        ("evopress", "fidelities", (0.5, 0.25, 1), "fidelities must rise"),
        ("evopress", "survivors", (4, 2), "fidelities must rise"),
        ("nsga2", "mu", 3, "mu must be at least 4, got 3"),
        ("exhaustive", "limit", 1000, "more than 1,000 feasible schedules"),
        ("optuna", "sampler", "TpeSampler", "Did you mean 'TPESampler'"),
        ("optuna", "n_startup", 3, "refuses {'n_startup': 3}"),
        ("optuna", "sampler", "GridSampler", "refuses"),
        ("random", "batch", 0, "batch must be at least 1, got 0"),
        ("tpe", "startup", 0, "startup must be at least 1, got 0"),
    ],
)
def test_wrong_parameters_are_refused(name: str, param: str, value: Any, message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        make(name, **{param: value})


def test_a_search_beats_random_and_random_beats_uniform() -> None:
    best = {
        name: np.mean([run_search(make(name, seed=s), evaluate, max_evals=64).best.fitness for s in range(2)])
        for name in ("evolution", "evopress", "tpe", "random", "uniform")
    }
    assert min(best["evolution"], best["evopress"], best["tpe"]) > best["random"] > best["uniform"]


def test_evolution_keeps_the_best_mu_of_parents_and_offspring() -> None:
    strategy = Evolution(SPACES["paper"], seed=0, mu=3, lam=5, initial=6)
    scores: dict[tuple[int, ...], float] = {}
    for size in (6, 5, 5, 5):
        batch = strategy.ask()
        assert len(batch) == size
        evaluations = evaluate(batch)
        scores |= {e.schedule.levels: e.fitness for e in evaluations}
        strategy.tell(evaluations)
        best = sorted(scores, key=lambda levels: scores[levels], reverse=True)[:3]
        assert [tuple(genome) for genome in strategy._survivors] == best


def test_evolution_breaks_ties_by_age() -> None:
    strategy = Evolution(SPACES["paper"], seed=0)
    first = strategy.ask()
    strategy.tell([Evaluation(schedule, 1.0) for schedule in first])
    strategy.tell([Evaluation(schedule, 1.0) for schedule in strategy.ask()])
    assert [tuple(genome) for genome in strategy._survivors] == [schedule.levels for schedule in first[:2]]


def test_evolution_with_a_mutation_that_does_nothing_falls_back_to_random_samples() -> None:
    @mutation("nothing")
    def nothing(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
        return (genome,)

    try:
        asked = trace(Evolution(SPACES["paper"], seed=0, mutation="nothing"))
    finally:
        MUTATIONS.unregister("nothing")
    assert len(set(asked)) == len(asked) == 48


def test_evolution_and_random_visit_all_of_a_small_space() -> None:
    space = SearchSpace.mean_sparsity(StagePlan.equal(3), 2, 0.5)
    for name in ("evolution", "random"):
        assert len(run_search(make(name, space), evaluate, max_evals=100).evaluations) == 7


def test_tpe_learns_from_measured_points_only() -> None:
    strategy = Tpe(SPACES["paper"], seed=0)
    asked = trace(strategy, n=20)
    complete = [trial for trial in strategy._study.trials if trial.value is not None]
    assert [tuple(trial.params[f"level_{s:02d}"] for s in range(10)) for trial in complete] == [
        levels for levels, _ in asked
    ]
    assert all(trial.state.is_finished() for trial in strategy._study.trials)


def test_feasible_lists_all_of_a_space() -> None:
    for label in ("unequal steps", "dense", "all pruned", "one stage", "one visited stage", "measured costs"):
        space = SPACES[label]
        every = itertools.product(range(space.max_level + 1), repeat=space.n_stages)
        assert list(feasible(space)) == [list(levels) for levels in every if space.is_feasible(levels)], label


def test_evopress_measures_survivors_on_all_probes() -> None:
    strategy = make("evopress", lam=8, fidelities=(0.25, 0.5, 1.0), survivors=(4, 2))
    for _ in range(3):
        sizes = []
        for fidelity in (0.25, 0.5, 1.0):
            batch = strategy.ask()
            sizes.append(len(batch))
            assert strategy.fidelity == fidelity
            best = sorted(batch, key=separable, reverse=True)
            strategy.tell(evaluate(batch, fidelity))
        assert sizes == [8, 4, 2]
    assert strategy._parent is not None and strategy._parent.fitness == strategy.best.fitness >= separable(best[0])


def test_nsga2_finds_a_front_and_a_result_within_the_budget() -> None:
    space = SPACES["paper"]
    result = run_search(make("nsga2"), evaluate, max_evals=300)
    front = result.front(space)
    costs = [space.cost(e.schedule.levels) for e in front]
    assert costs == sorted(set(costs)) and len(front) > 10
    assert costs[0] < space.budget < costs[-1]
    assert space.cost(result.best.schedule.levels) <= space.budget
    assert result.best in front
    assert result.best.fitness > separable(space.schedule(space.uniform()))


def test_crossover_of_evolution_has_two_parents() -> None:
    strategy = make("evolution", mu=4, crossover="level_exchange", crossover_rate=1)
    trace(strategy, 40)
    operators = {origin.operator: len(origin.parents) for origin in strategy.origins.values()}
    assert operators == {"level_exchange + level_switch": 2}
    assert {len(parent) for origin in strategy.origins.values() for parent in origin.parents} == {10}
