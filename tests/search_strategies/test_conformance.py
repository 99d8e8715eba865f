"""What holds for every strategy."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.schedule import Schedule, StagePlan
from diffes.search import run_search
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Strategy
from search_strategies.evolution import Evolution
from search_strategies.operators import MUTATIONS, Genome, mutation
from search_strategies.optuna_search import Tpe
from search_strategies.random_search import RandomSearch
from search_strategies.uniform import Uniform

ROOT = Path(__file__).parents[2]
STRATEGIES: dict[str, type[Strategy]] = {
    "evolution": Evolution,
    "random": RandomSearch,
    "tpe": Tpe,
    "uniform": Uniform,
}
SPACES = {
    "paper": SearchSpace.mean_sparsity(StagePlan.equal(10), 8, 0.25),
    "unequal": SearchSpace.mean_sparsity(StagePlan.equal(6), 8, 0.33, (1, 4, 2, 0, 2, 7)),
    "dense": SearchSpace.mean_sparsity(StagePlan.equal(3), 4, 0),
    "thinnest": SearchSpace.mean_sparsity(StagePlan.equal(3), 4, 1),
    "one_stage": SearchSpace.mean_sparsity(StagePlan.equal(1), 4, 0.3),
    "uneven_costs": SearchSpace(StagePlan.equal(4), 4, (3, 1, 2, 2), (100, 90, 60, 50, 13), 500),
}

each_strategy = pytest.mark.parametrize("name", STRATEGIES)


def make(name: str, space: SearchSpace = SPACES["paper"], seed: int = 0, **params: Any) -> Strategy:
    return STRATEGIES[name](space, seed=seed, **params)  # type: ignore[call-arg]


def score(schedule: Schedule) -> float:
    """Separable: the later a stage is sampled, the more a level costs."""
    weights = np.linspace(10, 1, len(schedule.levels))
    return -float(weights @ np.array(schedule.levels) ** 1.5)


def evaluate(schedules: Sequence[Schedule]) -> list[Evaluation]:
    return [Evaluation(schedule, score(schedule)) for schedule in schedules]


def trace(strategy: Strategy, n: int = 48, order: int = 1, failing: int = 0) -> list[tuple[int, ...]]:
    """Levels asked for in order; told forwards or backwards; every `failing`-th evaluation is a failure."""
    asked: list[tuple[int, ...]] = []
    while len(asked) < n and (batch := strategy.ask()):
        evaluations = evaluate(batch)
        if failing:
            evaluations = [
                Evaluation(e.schedule, -math.inf) if (len(asked) + i) % failing == 0 else e
                for i, e in enumerate(evaluations)
            ]
        asked += [schedule.levels for schedule in batch]
        strategy.tell(evaluations[::order])
    return asked


@each_strategy
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_batches_are_feasible_and_distinct(name: str, space: SearchSpace) -> None:
    strategy = make(name, space)
    for _ in range(8):
        batch = strategy.ask()
        assert all(space.is_feasible(schedule.levels) for schedule in batch)
        assert len({schedule.levels for schedule in batch}) == len(batch)
        strategy.tell(evaluate(batch))


@each_strategy
def test_nothing_is_asked_twice_in_a_large_space(name: str) -> None:
    asked = trace(make(name))
    assert len(set(asked)) == len(asked) == (1 if name == "uniform" else 48)


@each_strategy
def test_the_seed_decides_the_sequence(name: str) -> None:
    first = trace(make(name, seed=3))
    assert trace(make(name, seed=3)) == first
    assert (trace(make(name, seed=4)) == first) == (name == "uniform")


def test_the_sequence_is_the_same_in_another_process() -> None:
    code = (
        "import json, test_conformance as t; print(json.dumps({n: t.trace(t.make(n, seed=5)) for n in t.STRATEGIES}))"
    )
    path = [str(Path(__file__).parent), str(ROOT)]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "123"},
    )
    there = json.loads(run.stdout)
    for name in STRATEGIES:
        assert [tuple(levels) for levels in there[name]] == trace(make(name, seed=5)), name


@each_strategy
def test_the_order_of_telling_does_not_matter(name: str) -> None:
    assert trace(make(name), order=-1) == trace(make(name), order=1)


@each_strategy
def test_nan_is_refused_and_does_no_harm(name: str) -> None:
    strategy, twin = make(name), make(name)
    batch = strategy.ask()
    assert twin.ask() == batch
    with pytest.raises(DiffesError, match="NaN"):
        strategy.tell([Evaluation(schedule, math.nan) for schedule in batch])
    for each in (strategy, twin):
        each.tell(evaluate(batch))
    assert trace(strategy) == trace(twin)


@each_strategy
@pytest.mark.parametrize("failing", [1, 3])
def test_failed_evaluations_are_survived(name: str, failing: int) -> None:
    strategy = make(name)
    asked = trace(strategy, n=40, failing=failing)
    assert len(asked) >= (1 if name == "uniform" else 40)
    assert strategy.best is not None
    assert (strategy.best.fitness == -math.inf) == (failing == 1 or name == "uniform")


@each_strategy
@pytest.mark.parametrize("steps", [None, (2, 1, 0, 3)], ids=["equal", "unequal"])
def test_the_optimum_of_a_small_space_is_found(name: str, steps: tuple[int, ...] | None) -> None:
    space = SearchSpace.mean_sparsity(StagePlan.equal(4), 4, 0.5, steps)
    feasible = [levels for levels in itertools.product(range(5), repeat=4) if space.is_feasible(levels)]
    optimum = max(score(space.schedule(levels)) for levels in feasible)
    result = run_search(make(name, space), evaluate, max_evals=40 if name == "tpe" else 200)
    assert len(result.evaluations) <= len(feasible)
    assert (result.best.fitness == optimum) == (name != "uniform")


@each_strategy
def test_global_random_states_are_left_alone(name: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    trace(make(name))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index, union-attr]


@each_strategy
def test_global_random_states_do_not_matter(name: str) -> None:
    traces = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        traces.append(trace(make(name)))
    assert traces[0] == traces[1]


@pytest.mark.parametrize(
    ("name", "param", "value", "message"),
    [
        ("evolution", "mu", 0, "mu must be at least 1, got 0"),
        ("evolution", "lam", -1, "lam must be at least 1, got -1"),
        ("evolution", "initial", 0, "initial must be at least 1, got 0"),
        ("evolution", "mu", 1.5, "mu must be a whole number, got 1.5"),
        ("evolution", "mutation", "nothing", "unknown mutation 'nothing'"),
        ("evolution", "mutation_params", {"moves": 1}, "moves"),
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
        for name in STRATEGIES
    }
    assert min(best["evolution"], best["tpe"]) > best["random"] > best["uniform"]


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
    assert [tuple(trial.params[f"level_{s:02d}"] for s in range(10)) for trial in complete] == asked
    assert all(trial.state.is_finished() for trial in strategy._study.trials)
