"""What holds across strategies and operators, and that the suites of `diffes.testing` find what is wrong."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.registry import Registry
from diffes.spaces.loop import run_search
from diffes.spaces.operators import CROSSOVERS, MUTATIONS, mended
from diffes.spaces.plan import PlanSpace, schedules_only
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, Evaluation, Proposal, Strategy
from diffes.testing import (
    PLANS,
    SPACES,
    CrossoverConformance,
    MutationConformance,
    StrategyConformance,
    answer,
    evaluate,
)
from search_strategies.evolution import Evolution
from search_strategies.exhaustive import Exhaustive
from search_strategies.mutations import level_switch
from search_strategies.random_search import RandomSearch

PAPER = SPACES["paper"]
ELSEWHERE = "test_the_sequence_is_the_same_in_another_process"  # a class of this file is not known there


def suites(kind: type) -> set[str]:
    """Names, without options, that a conformance class of a file in this folder tests."""
    modules = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    classes = [
        thing
        for module in modules
        for label, thing in vars(module).items()
        if label.startswith("Test") and isinstance(thing, type) and issubclass(thing, kind)
    ]
    return {str(thing.__dict__["name"]).partition(":")[0] for thing in classes}


@pytest.mark.parametrize(
    ("registry", "kind"),
    [(STRATEGIES, StrategyConformance), (MUTATIONS, MutationConformance), (CROSSOVERS, CrossoverConformance)],
    ids=["strategies", "mutations", "crossovers"],
)
def test_every_registered_name_has_a_conformance_class(registry: Registry[Any], kind: type) -> None:
    ours = {point.name for point in entry_points(group=registry.group) if point.value.startswith("search_strategies.")}
    assert ours and ours <= set(registry.names())
    assert ours == suites(kind)


def test_a_search_beats_random_and_random_beats_uniform() -> None:
    best = {
        name: np.mean([
            run_search(STRATEGIES.make(name, PAPER, seed=s), evaluate, max_evals=64).best.fitness for s in range(2)
        ])
        for name in ("evolution", "evopress", "tpe", "random", "uniform")
    }  # fmt: skip
    assert min(best["evolution"], best["evopress"], best["tpe"]) > best["random"] > best["uniform"]


@pytest.mark.parametrize("name", ["cmaes", "evolution", "evopress", "nsga2", "optuna", "random", "surrogate", "tpe"])
def test_a_search_over_its_batches_is_the_same_as_by_hand(name: str) -> None:
    """`run_search` adds nothing to asking and telling."""
    result = run_search(STRATEGIES.make(name, PAPER, seed=1), evaluate, max_evals=24)
    strategy, asked = STRATEGIES.make(name, PAPER, seed=1), list[Proposal]()
    while sum(proposal.fidelity for proposal in asked) < 24:
        batch = strategy.ask()
        asked += batch
        strategy.tell(answer(batch))
    measured = [(e.schedule, e.fidelity) for e in result.evaluations]
    assert measured == [(p.schedule, p.fidelity) for p in asked][: len(measured)]
    assert sum(e.fidelity for e in result.evaluations) == 24


def failures(suite: Any, *, without: Sequence[str] = (ELSEWHERE,)) -> set[str]:
    """Tests of a suite that raise an AssertionError."""
    found = set()
    for name in [name for name in dir(suite) if name.startswith("test_") and name not in without]:
        try:
            getattr(suite, name)()
        except AssertionError:
            found.add(name)
    return found


def suite_of(make: Callable[..., Strategy], **attributes: Any) -> StrategyConformance:
    """The suite of a strategy that has no name."""

    class Suite(StrategyConformance):
        name = "local"

        def make(self, space: SearchSpace | None = None, seed: int = 0) -> Strategy:
            return make(space or SPACES["small"], seed=seed)

    suite = Suite()
    for name, value in attributes.items():
        setattr(suite, name, value)
    return suite


@pytest.mark.slow
def test_a_good_strategy_fails_nothing() -> None:
    assert failures(suite_of(Evolution)) == set()
    assert failures(suite_of(Exhaustive, random=False, plans=False)) == set()


class RefusesAll(RandomSearch):
    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        raise DiffesError("no")


class RefusesSmall(RandomSearch):
    """It takes only the spaces that a strategy may refuse."""

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        if space.n_stages < 10:
            raise DiffesError("no")
        super().__init__(space, seed=seed)


def test_who_refuses_every_space_is_found() -> None:
    with pytest.raises(AssertionError, match="refuses the space 'small'"):
        suite_of(RefusesAll).test_batches_are_feasible_and_distinct()
    with pytest.raises(AssertionError, match="refuses the space 'small'"):
        suite_of(RefusesSmall).test_batches_are_feasible_and_distinct()


class Stuck(RandomSearch):
    """It asks for the same until it is told."""

    asynchronous = True

    def _ask(self) -> list[Proposal]:
        return [self.propose(self.space.uniform())] if self.best is None or self.pending else list(super()._ask())


def test_who_asks_again_for_what_is_open_is_found() -> None:
    with pytest.raises(AssertionError, match="local asked for nothing new after"):
        suite_of(Stuck).test_an_asynchronous_one_takes_results_one_by_one()


class RefusesPlans(RandomSearch):
    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        schedules_only(space, "local")
        super().__init__(space, seed=seed)


def test_who_refuses_plans_has_to_say_so() -> None:
    with pytest.raises(AssertionError, match="refuses the space 'plans'"):
        suite_of(RefusesPlans).test_batches_are_feasible_and_distinct()
    suite = suite_of(RefusesPlans, plans=False)
    suite.test_batches_are_feasible_and_distinct()
    assert not PLANS.keys() & suite.spaces().keys()


class JunkInPlans(RandomSearch):
    """Calls every node that is skipped, whatever that costs."""

    explores = True

    def _ask(self) -> list[Proposal]:
        return [self.propose([self.space.most_pruned] * self.space.n_stages) for _ in super()._ask()[:1]]


class Silent(RandomSearch):
    def _ask(self) -> list[Proposal]:
        return []


def test_who_asks_for_nothing_is_found() -> None:
    with pytest.raises(AssertionError, match="local asked for nothing in the space 'small'"):
        suite_of(Silent).test_batches_are_feasible_and_distinct()
    with pytest.raises(AssertionError):
        suite_of(Silent).test_nothing_is_asked_twice_in_a_larger_space()


class SilentSomewhere(RandomSearch):
    """It does not know what to do with a single stage."""

    def _ask(self) -> list[Proposal]:
        return super()._ask() if self.space.n_stages > 1 else []


class LikesFailures(RandomSearch):
    """Takes the lowest fitness for the best."""

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        worst = min(evaluations, key=lambda evaluation: evaluation.fitness)
        if self.best is None or worst.fitness < self.best.fitness:
            self.best = worst


class ForgetsTheBest(RandomSearch):
    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        self.best = None


def test_who_makes_a_failed_evaluation_its_best_is_found() -> None:
    for bad in (LikesFailures, ForgetsTheBest):
        with pytest.raises(AssertionError, match="local makes -inf the best of"):
            suite_of(bad).test_failed_evaluations_are_survived()


class Repeats(RandomSearch):
    """Asks for the same batch again and again."""

    def _ask(self) -> list[Proposal]:
        self._seen.clear()
        self._rng = np.random.default_rng(self.seed)
        return super()._ask()


class Seedless(RandomSearch):
    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        super().__init__(space, seed=0)


class DrawsFromPython(RandomSearch):
    def _ask(self) -> list[Proposal]:
        batch = super()._ask()
        random.shuffle(batch)
        return batch


class DrawsFromNumpy(RandomSearch):
    """Draws more than numpy's legacy generator keeps at a time."""

    def _ask(self) -> list[Proposal]:
        batch = super()._ask()
        first = int(np.random.randint(0, 2**16, 1000).sum()) % max(len(batch), 1)
        return batch[first:] + batch[:first]


class TakesNan(RandomSearch):
    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        super().tell([e if e.fitness == e.fitness else Evaluation(e.schedule, 0.0) for e in evaluations])


class LearnsInAnyOrder(Evolution):
    """Draws differently after the order in which it was told."""

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        super().tell(evaluations)
        first, last = evaluations[0].schedule.levels, evaluations[-1].schedule.levels
        self._rng.integers(2, size=1 + (first > last))


class ThinsUnvisited(RandomSearch):
    """Explores stages that no step visits."""

    explores = True

    def _ask(self) -> list[Proposal]:
        return [self.propose([max(level, 1) for level in p.schedule.levels]) for p in super()._ask()[:1]]


class OnlyUniform(RandomSearch):
    """No search, but it says that it is one."""

    def _ask(self) -> list[Proposal]:
        batch = [] if self._seen else [self.propose(self.space.uniform())]
        self._seen.add((0,))
        return batch


@pytest.mark.parametrize(
    ("bad", "test"),
    [
        (RefusesAll, "test_batches_are_feasible_and_distinct"),
        (Silent, "test_nothing_is_asked_twice_in_a_larger_space"),
        (SilentSomewhere, "test_batches_are_feasible_and_distinct"),
        (Repeats, "test_nothing_is_asked_twice_in_a_larger_space"),
        (Seedless, "test_the_seed_decides_the_sequence"),
        (DrawsFromPython, "test_the_seed_decides_the_sequence"),
        (DrawsFromPython, "test_global_random_states_are_left_alone"),
        (DrawsFromNumpy, "test_the_seed_decides_the_sequence"),
        (DrawsFromNumpy, "test_global_random_states_are_left_alone"),
        (TakesNan, "test_nan_is_refused_and_does_no_harm"),
        (LearnsInAnyOrder, "test_the_order_of_telling_does_not_matter"),
        (JunkInPlans, "test_the_seed_decides_the_sequence_of_plans"),
        (ThinsUnvisited, "test_batches_are_feasible_and_distinct"),
        (OnlyUniform, "test_the_optimum_of_a_small_space_is_found"),
        (OnlyUniform, "test_the_seed_decides_the_sequence"),
        (LikesFailures, "test_failed_evaluations_are_survived"),
    ],
)
def test_the_suite_finds_what_is_wrong(bad: type[Strategy], test: str) -> None:
    with pytest.raises(AssertionError):
        getattr(suite_of(bad), test)()


def operators(kind: type[MutationConformance | CrossoverConformance], operator: Callable[..., Any]) -> Any:
    """The suite of an operator that has no name."""

    class Suite(kind):  # type: ignore[misc, valid-type]
        name = "local"

        def operator(self) -> Callable[..., Any]:
            return operator

    return Suite()


def leaves_the_budget(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    genome[0] = max(genome[0] - 1, 0)
    return (genome,)


def makes_an_array(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    (genome,) = level_switch(genome, space=space, rng=rng)  # type: ignore[arg-type]
    return (np.array(genome),)


def returns_a_list(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    return list(level_switch(genome, space=space, rng=rng))  # type: ignore[arg-type]


def returns_two(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    return genome, genome


def does_nothing(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    return (genome,)


def draws_from_python(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    random.shuffle(genome)
    return (mended(genome, space, rng),)


def draws_from_numpy(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    np.random.shuffle(genome)
    return (mended(genome, space, rng),)


@pytest.mark.parametrize(
    ("bad", "test"),
    [
        (leaves_the_budget, "test_feasible_genomes_stay_feasible_in_every_space"),
        (makes_an_array, "test_feasible_genomes_stay_feasible_in_every_space"),
        (returns_a_list, "test_the_result_is_a_tuple_of_as_many_genomes"),
        (returns_two, "test_the_result_is_a_tuple_of_as_many_genomes"),
        (does_nothing, "test_it_changes_something_in_a_large_space"),
        (draws_from_python, "test_the_generator_decides_everything"),
        (draws_from_python, "test_global_random_states_are_left_alone"),
        (draws_from_numpy, "test_global_random_states_are_left_alone"),
    ],
)
def test_the_suite_of_mutations_finds_what_is_wrong(bad: Callable[..., Any], test: str) -> None:
    assert failures(operators(MutationConformance, level_switch)) == set()
    with pytest.raises(AssertionError):
        getattr(operators(MutationConformance, bad), test)()


def test_an_operator_of_plans_has_to_refuse_other_spaces() -> None:
    suite = operators(MutationConformance, level_switch)
    suite.plans_only = True
    assert failures(suite) == {"test_an_operator_of_plans_refuses_other_spaces"}


def skips_all(genome: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    """It takes the highest value for a level like others."""
    return ([max(level, space.most_pruned + isinstance(space, PlanSpace)) for level in genome],)


def test_an_operator_that_knows_nothing_of_skipped_nodes_is_found() -> None:
    suite = operators(MutationConformance, skips_all)
    suite.plans_only = True
    with pytest.raises(AssertionError, match="left the budget of the space 'plans'"):
        suite.test_feasible_genomes_stay_feasible_in_every_space()


def random_children(one: list[int], other: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    return space.sample(rng), space.sample(rng)


def cut_and_swapped(one: list[int], other: list[int], *, space: SearchSpace, rng: np.random.Generator) -> Any:
    half = len(one) // 2
    return one[:half] + other[half:], other[:half] + one[half:]


@pytest.mark.parametrize(
    ("bad", "test"),
    [
        (random_children, "test_equal_parents_have_equal_children"),
        (cut_and_swapped, "test_feasible_genomes_stay_feasible_in_every_space"),
    ],
)
def test_the_suite_of_crossovers_finds_what_is_wrong(bad: Callable[..., Any], test: str) -> None:
    with pytest.raises(AssertionError):
        getattr(operators(CrossoverConformance, bad), test)()


def test_a_failed_evaluation_is_never_the_best_of_a_search() -> None:
    class Failing:
        """Every other evaluation fails."""

        def __call__(self, schedules: Sequence[Any], fidelity: float = 1.0) -> list[Evaluation]:
            return [Evaluation(s, -math.inf if sum(s.levels[::2]) % 2 else 1.0, 1, 1.0, fidelity) for s in schedules]

    for name in ("evolution", "evopress", "nsga2", "random", "surrogate", "tpe"):
        result = run_search(STRATEGIES.make(name, PAPER, seed=0), Failing(), max_evals=40)
        assert result.best.fitness == 1.0
        assert -math.inf in [evaluation.fitness for evaluation in result.evaluations]
