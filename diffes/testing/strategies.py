"""Conformance suites for strategies, mutations and crossovers."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from diffes.errors import DiffesError
from diffes.spaces.loop import run_search
from diffes.spaces.operators import CROSSOVERS, MUTATIONS
from diffes.spaces.plan import PlanSpace
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, Evaluation, Proposal, Strategy

SPACES = {
    "small": SearchSpace.mean_sparsity(Stages.equal(6), 4, 0.5),
    "paper": SearchSpace.mean_sparsity(Stages.equal(10), 8, 0.25),
    "half": SearchSpace.mean_sparsity(Stages.equal(10), 16, 0.5),
    "unequal steps": SearchSpace.mean_sparsity(Stages.equal(6), 8, 0.33, (1, 4, 2, 0, 2, 7)),
    "dense": SearchSpace.mean_sparsity(Stages.equal(3), 4, 0),
    "all pruned": SearchSpace.mean_sparsity(Stages.equal(3), 4, 1),
    "one stage": SearchSpace.mean_sparsity(Stages.equal(1), 4, 0.3),
    "one visited stage": SearchSpace.mean_sparsity(Stages.equal(3), 8, 0.5, (0, 5, 0)),
    "measured costs": SearchSpace.dense_fraction(
        Stages.equal(4),
        (3, 1, 2, 2),
        [[10, 9.1, 6.2, 5, 1.3], [10, 8, 8.5, 3, 2], [9, 8, 7, 6, 5], [9, 5, 4, 3, 3]],
        0.7,
    ),
}

LINEAR = [[1 - 0.2 * level for level in range(5)]] * 16
CROSSING = [[1.0, 1.05, 0.7, 0.75, 0.3 + 0.05 * node] for node in range(8)]  # a higher level may cost more
PLANS = {
    "plans": PlanSpace.dense_calls(LINEAR, 4),
    "dense calls only": PlanSpace.dense_calls(LINEAR, 4, allowed=(0,)),
    "crossing costs": PlanSpace.dense_calls(CROSSING, 2.2, allowed=(0, 1, 3, 4), starts=[[5, 5, 5, 4, 5, 5, 3, 0]]),
    "reusing": PlanSpace.dense_calls(CROSSING, 2.2, reusing=(2, 4)),
    "one call": PlanSpace.dense_calls(LINEAR, 0.5),
    "all nodes": PlanSpace.dense_calls(CROSSING, 20),
    "one node": PlanSpace.dense_calls([[1.0, 0.5]], 0.7),
    "no budget": PlanSpace.dense_calls(LINEAR, None),
}

LARGE = ("paper", "half")  # spaces that an exhaustive strategy may refuse


def _global_random_states() -> tuple[Any, ...]:
    _, words, *place = np.random.get_state()
    return random.getstate(), np.asarray(words).tolist(), place


class _OperatorConformance:
    """Tests that mutations and crossovers share: chains of 200 applications in every space.

    Attributes:
        name: name of a registered operator.
        applications: length of a chain.
        plans_only: True for an operator of plans, which refuses other spaces with a `DiffesError`.
    """

    name: ClassVar[str]
    applications: ClassVar[int] = 200
    plans_only: ClassVar[bool] = False

    def spaces(self) -> Mapping[str, SearchSpace]:
        """Return the spaces that the operator accepts."""
        return PLANS if self.plans_only else SPACES | PLANS

    def large(self) -> SearchSpace:
        """Return a space with much to change."""
        return PLANS["plans"] if self.plans_only else SPACES["half"]

    def operator(self) -> Callable[..., tuple[Any, ...]]:
        raise NotImplementedError

    def parents(self) -> int:
        raise NotImplementedError

    def chain(self, space: SearchSpace, seed: int) -> list[list[list[int]]]:
        """Return the genomes after each application. Each application takes the genomes of the one before."""
        rng, operator = np.random.default_rng(seed), self.operator()
        genomes, found = [space.sample(rng) for _ in range(self.parents())], []
        for i in range(self.applications):
            if i % 20 == 0:  # start afresh: a chain may reach genomes with nothing left to change
                genomes = [space.sample(rng) for _ in range(self.parents())]
            genomes = list(operator(*[list(genome) for genome in genomes], space=space, rng=rng))
            found.append([list(genome) for genome in genomes])
        return found

    def test_feasible_genomes_stay_feasible_in_every_space(self) -> None:
        for label, space in self.spaces().items():
            for genomes in self.chain(space, 0):
                for genome in genomes:
                    assert space.is_feasible(genome), f"{self.name} left the budget of the space {label!r}: {genome}"
                    assert all(type(level) is int for level in genome), f"{self.name} made levels that are no ints"

    def test_the_result_is_a_tuple_of_as_many_genomes(self) -> None:
        space = self.large()
        result = self.operator()(*[space.uniform()] * self.parents(), space=space, rng=np.random.default_rng(0))
        assert isinstance(result, tuple) and len(result) == self.parents(), f"{self.name} must return a tuple"

    def test_it_changes_something_in_a_large_space(self) -> None:
        distinct = {tuple(genome) for genomes in self.chain(self.large(), 1) for genome in genomes}
        assert len(distinct) > self.applications // 4, f"{self.name} found only {len(distinct)} different genomes"

    def test_the_generator_decides_everything(self) -> None:
        space = self.large()
        random.seed(1)
        first = self.chain(space, 3)
        random.seed(2)
        assert self.chain(space, 3) == first, f"{self.name} draws from something else than its rng"
        assert self.chain(space, 4) != first

    def test_global_random_states_are_left_alone(self) -> None:
        before = _global_random_states()
        self.chain(self.large(), 0)
        assert _global_random_states() == before, f"{self.name} draws from a global generator"

    def test_an_operator_of_plans_refuses_other_spaces(self) -> None:
        if not self.plans_only:
            return
        space = SPACES["paper"]
        try:
            self.operator()(*[space.uniform()] * self.parents(), space=space, rng=np.random.default_rng(0))
        except DiffesError:
            return
        raise AssertionError(f"{self.name} works on plans only, and did not refuse a space of stages")


class MutationConformance(_OperatorConformance):
    """Tests of the mutation called `name`, which may have options: "level_switch:max_moves=3"."""

    def operator(self) -> Callable[..., tuple[Any, ...]]:
        function, options = MUTATIONS.parse(self.name)
        return lambda genome, **given: function(genome, **given, **options)

    def parents(self) -> int:
        return 1


class CrossoverConformance(_OperatorConformance):
    """Tests of the crossover called `name`."""

    def operator(self) -> Callable[..., tuple[Any, ...]]:
        function, options = CROSSOVERS.parse(self.name)
        return lambda one, other, **given: function(one, other, **given, **options)

    def parents(self) -> int:
        return 2

    def test_equal_parents_have_equal_children(self) -> None:
        space, rng = self.large(), np.random.default_rng(0)
        genome = space.sample(rng)
        children = self.operator()(list(genome), list(genome), space=space, rng=rng)
        assert [list(child) for child in children] == [genome, genome]


def separable(schedule: Schedule) -> float:
    """Return a score for tests: the later a stage is sampled, the more a level costs."""
    weights = np.linspace(10, 1, len(schedule.levels))
    return -float(weights @ np.array(schedule.levels) ** 1.5)


def evaluate(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
    """Evaluate schedules by `separable`."""
    return [Evaluation(schedule, separable(schedule), 100, 0.01, fidelity) for schedule in schedules]


def answer(batch: Sequence[Proposal]) -> list[Evaluation]:
    """Evaluate a batch of proposals by `evaluate`."""
    return [evaluation for p in batch for evaluation in evaluate([p.schedule], p.fidelity)]


def trace(strategy: Strategy, n: int = 48, *, backwards: bool = False, failing: int = 0) -> list[tuple[Any, ...]]:
    """Return (levels, fidelity) of the first schedules asked for, at least n unless the strategy ends before.

    Every `failing`-th evaluation is a failure, and 0 means none. `backwards` reverses the order of telling.
    """
    asked: list[tuple[Any, ...]] = []
    while len(asked) < n and (batch := strategy.ask()):
        evaluations = answer(batch)
        if failing:
            evaluations = [
                Evaluation(e.schedule, -math.inf, fidelity=e.fidelity) if (len(asked) + i) % failing == 0 else e
                for i, e in enumerate(evaluations)
            ]
        asked += [(proposal.schedule.levels, proposal.fidelity) for proposal in batch]
        strategy.tell(evaluations[::-1] if backwards else evaluations)
    return asked


class StrategyConformance:
    """Tests of the strategy called `name`, which may have options: "evolution:mu=4,lam=16".

    Attributes:
        name: name of a registered strategy.
        plans: False for a strategy that refuses spaces of plans with a `DiffesError`.
        searches: False for a baseline that need not find the optimum.
        random: False for a strategy that does the same for every seed.
        evaluations: number of evaluations that it may take to find the optimum of a space of 85 schedules.
    """

    name: ClassVar[str]
    plans: ClassVar[bool] = True
    searches: ClassVar[bool] = True
    random: ClassVar[bool] = True
    evaluations: ClassVar[int] = 200

    def make(self, space: SearchSpace | None = None, seed: int = 0) -> Strategy:
        """Make a new strategy. Tests leave out spaces that it refuses as too large."""
        return STRATEGIES.make(self.name, space or SPACES["small"], seed=seed)

    def spaces(self) -> dict[str, SearchSpace]:
        """Return the spaces that the strategy accepts.

        It may refuse the largest with a `DiffesError`, and those of plans if `plans` is False.
        """
        accepted: dict[str, SearchSpace] = {}
        for label, space in (SPACES | PLANS).items():
            may_refuse = label in LARGE or (label in PLANS and not self.plans)
            try:
                self.make(space)
            except DiffesError:
                assert may_refuse, f"{self.name} refuses the space {label!r}"
                continue
            accepted[label] = space
        return accepted

    def test_batches_are_feasible_and_distinct(self) -> None:
        for label, space in self.spaces().items():
            strategy, n_asked = self.make(space), 0
            for _ in range(6):
                batch = strategy.ask()
                n_asked += len(batch)
                assert len({(proposal.schedule, proposal.fidelity) for proposal in batch}) == len(batch)
                for levels in (proposal.schedule.levels for proposal in batch):
                    assert strategy.explores or space.is_feasible(levels), f"off the budget of {label!r}"
                    assert all(n > 0 or level == 0 for n, level in zip(space.steps, levels, strict=True))
                    assert set(levels) <= set(space.genes), f"levels that {label!r} does not have"
                strategy.tell(answer(batch))
            assert n_asked, f"{self.name} asked for nothing in the space {label!r}"

    def test_nothing_is_asked_twice_in_a_larger_space(self) -> None:
        asked = trace(self.make(), 40)
        assert len(set(asked)) == len(asked) > 0

    def test_the_seed_decides_the_sequence(self) -> None:
        random.seed(1)
        np.random.seed(1)
        first = trace(self.make(seed=3))
        random.seed(2)
        np.random.seed(2)
        assert trace(self.make(seed=3)) == first
        assert (trace(self.make(seed=4)) != first) == self.random

    def test_the_sequence_is_the_same_in_another_process(self) -> None:
        module = STRATEGIES.parse(self.name)[0].__module__  # that of a decorated class has to be imported first
        code = (
            f"import json, sys; sys.path[:] = {sys.path!r}; import {module}; from diffes import testing; "
            f"s = testing.STRATEGIES.make({self.name!r}, testing.SPACES['small'], seed=5); "
            "print(json.dumps(testing.trace(s)))"
        )
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "123"})
        assert run.returncode == 0, run.stderr
        there = [(tuple(levels), fidelity) for levels, fidelity in json.loads(run.stdout)]
        assert there == trace(self.make(seed=5))

    def test_the_seed_decides_the_sequence_of_plans(self) -> None:
        if self.plans:
            first = trace(self.make(PLANS["plans"], seed=3), 24)
            assert trace(self.make(PLANS["plans"], seed=3), 24) == first
            assert len(set(first)) == len(first) > 0

    def test_the_order_of_telling_does_not_matter(self) -> None:
        assert trace(self.make(), backwards=True) == trace(self.make())

    def test_an_asynchronous_one_takes_results_one_by_one(self) -> None:
        """Tell results one by one while others are open. The strategy must keep asking for new schedules."""
        if not self.make().asynchronous:
            return
        strategy = self.make(SPACES["paper"])
        waiting: list[Proposal] = []
        told: set[Schedule] = set()
        while len(told) < 40:
            while len(waiting) < 4 and (told or not waiting):
                fresh = [p for p in strategy.ask_more() if p.schedule not in told and p not in waiting]
                assert fresh, f"{self.name} asked for nothing new after {len(told)} evaluations"
                assert strategy.explores or all(strategy.space.is_feasible(p.schedule.levels) for p in fresh)
                waiting += fresh
            (evaluation,) = answer([waiting.pop(len(told) * 7 % len(waiting))])
            strategy.tell_one(evaluation)
            told.add(evaluation.schedule)
            assert strategy.pending == waiting
            assert strategy.best is not None and strategy.best.fitness == max(map(separable, told))

    def test_nan_is_refused_and_does_no_harm(self) -> None:
        strategy, twin = self.make(), self.make()
        batch = strategy.ask()
        assert twin.ask() == batch
        try:
            strategy.tell([Evaluation(each.schedule, math.nan, fidelity=each.fidelity) for each in batch])
        except DiffesError as error:
            assert "NaN" in str(error)
        else:
            raise AssertionError("a fitness of NaN was taken")
        for each in (strategy, twin):
            each.tell(answer(batch))
        assert trace(strategy) == trace(twin)

    def test_failed_evaluations_are_survived(self) -> None:
        for failing in (1, 3):
            strategy = self.make()
            asked = trace(strategy, 40, failing=failing)
            survivors = [e for i, e in enumerate(asked) if i % failing and e[1] == 1]
            best = -math.inf if strategy.best is None else strategy.best.fitness
            assert (best == -math.inf) == (not survivors), f"{self.name} makes {best} the best of {survivors}"

    def test_the_optimum_of_a_small_space_is_found(self) -> None:
        for steps in (None, (2, 1, 0, 3)):
            space = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5, steps)
            levels = np.stack(np.meshgrid(*[np.arange(5)] * 4), -1).reshape(-1, 4).tolist()
            optimum = max(separable(space.any_schedule(each)) for each in levels if space.is_feasible(each))
            found = run_search(self.make(space), evaluate, max_evals=self.evaluations).best.fitness
            assert found == optimum or not self.searches, f"found {found}, the optimum is {optimum}"

    def test_global_random_states_are_left_alone(self) -> None:
        before = _global_random_states()
        trace(self.make())
        assert _global_random_states() == before
