"""Genome, fitness, level-switch mutation and the toolbox."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.schedule import StagePlan
from diffes.space import SearchSpace
from diffes.strategy import MUTATIONS, STRATEGIES, mutation
from search_strategies.operators import Fitness, Genome, level_switch, make_toolbox

BUDGETS = [0, 0.3, 0.33, 0.5, 1]
STEPS = [None, (1, 4, 2, 3, 2, 7), (0, 4, 0, 3, 5, 0), (0, 0, 5, 0, 0, 0)]
PAPER = SearchSpace.mean_sparsity(StagePlan.equal(10), 16, 0.5)


@pytest.mark.parametrize(("steps", "budget"), list(itertools.product(STEPS, BUDGETS)))
def test_level_switch_keeps_genomes_feasible(steps: tuple[int, ...] | None, budget: float) -> None:
    space = SearchSpace.mean_sparsity(StagePlan.equal(6), 8, budget, steps)
    rng = np.random.default_rng(0)
    genome = Genome(space.sample(rng))
    for _ in range(60):
        (genome,) = level_switch(genome, space=space, rng=rng, max_levels=5)
        assert isinstance(genome, Genome)
        assert space.is_feasible(genome)
        assert all(type(level) is int for level in genome)


def test_level_switch_keeps_genomes_feasible_under_uneven_costs() -> None:
    space = SearchSpace(StagePlan.equal(4), 4, (3, 1, 2, 2), ((100, 90, 60, 50, 13),) * 4, 500)
    rng = np.random.default_rng(0)
    genome = Genome(space.sample(rng))
    visited = set()
    for _ in range(100):
        (genome,) = level_switch(genome, space=space, rng=rng)
        assert space.is_feasible(genome)
        visited.add(tuple(genome))
    assert len(visited) > 10


def test_level_switch_moves_levels_and_leaves_the_generator_the_only_source() -> None:
    runs = []
    for seed in (0, 0, 1):
        genome, rng = Genome(PAPER.uniform()), np.random.default_rng(seed)
        runs.append([list(level_switch(genome, space=PAPER, rng=rng)[0]) for _ in range(20)])
    assert runs[0] == runs[1] != runs[2]


def test_one_move_of_one_level() -> None:
    for seed in range(30):
        (child,) = level_switch(
            Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(seed), max_moves=1, max_levels=1
        )
        change = sorted(a - b for a, b in zip(child, PAPER.uniform(), strict=True))
        assert change == [-1] + [0] * 8 + [1]


def test_amounts_are_even() -> None:
    amounts, rng = [], np.random.default_rng(0)
    for _ in range(900):
        (child,) = level_switch(Genome(PAPER.uniform()), space=PAPER, rng=rng, max_moves=1, max_levels=3)
        amounts.append(max(child) - 8)
    assert [amounts.count(a) for a in (1, 2, 3)] == pytest.approx([300, 300, 300], abs=60)


def test_number_of_moves_is_the_smaller_of_two_draws() -> None:
    class CountingGenerator:
        """Counts the pairs of stages drawn."""

        def __init__(self) -> None:
            self.rng, self.moves = np.random.default_rng(0), 0

        def integers(self, *args: Any) -> Any:
            return self.rng.integers(*args)

        def choice(self, *args: Any, **kwargs: Any) -> Any:
            self.moves += 1
            return self.rng.choice(*args, **kwargs)

    counting, moves = CountingGenerator(), []
    for _ in range(900):
        counting.moves = 0
        level_switch(Genome(PAPER.uniform()), space=PAPER, rng=counting, max_moves=3)  # type: ignore[arg-type]
        moves.append(counting.moves)
    assert [moves.count(n) for n in (1, 2, 3)] == pytest.approx([500, 300, 100], abs=60)


def test_moves_are_clipped_and_need_no_repair_where_steps_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    space, rng = SearchSpace.mean_sparsity(StagePlan.equal(4), 4, 0.75), np.random.default_rng(0)
    monkeypatch.delattr(SearchSpace, "repair")
    genome = Genome([3, 3, 3, 3])
    for _ in range(50):
        level_switch(genome, space=space, rng=rng, max_levels=5)
        assert space.is_feasible(genome)


def test_a_single_visited_stage_stays_as_it_is() -> None:
    space = SearchSpace.mean_sparsity(StagePlan.equal(3), 8, 0.5, (0, 5, 0))
    assert level_switch(Genome([0, 4, 0]), space=space, rng=np.random.default_rng(0)) == ([0, 4, 0],)


@pytest.mark.parametrize(("name", "value"), [("max_moves", 0), ("max_levels", 0), ("max_levels", 1.5)])
def test_wrong_parameters_are_refused(name: str, value: Any) -> None:
    with pytest.raises(DiffesError, match=rf"{name} must be .*got {value}"):
        level_switch(Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(0), **{name: value})


def test_fitness_refuses_nan_and_orders_failures_last() -> None:
    with pytest.raises(DiffesError, match="NaN"):
        Fitness((math.nan,))
    with pytest.raises(DiffesError, match="NaN"):
        Fitness().values = (math.nan,)
    assert Fitness((1.0,)) > Fitness((-1.0,)) > Fitness((-math.inf,)) > Fitness()
    assert Fitness((0.25,)).values == (0.25,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda genome: pickle.loads(pickle.dumps(genome))])
def test_a_genome_is_copied_with_its_own_fitness(copied: Any) -> None:
    genome = Genome([1, 2, 3])
    assert not genome.fitness.valid
    genome.fitness.values = (0.5,)
    twin = copied(genome)
    assert isinstance(twin, Genome)
    assert twin == genome
    del twin.fitness.values
    twin[0] = 9
    assert (genome[0], genome.fitness.values) == (1, (0.5,))


@pytest.fixture
def swap_ends() -> Iterator[str]:
    """A mutation as a user would write it in a notebook."""

    @mutation("swap_ends")
    def function(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, times: int = 1) -> tuple[Genome]:
        for _ in range(times):
            genome[0], genome[-1] = genome[-1], genome[0]
        return (genome,)

    yield "swap_ends"
    MUTATIONS.unregister("swap_ends")


def test_toolbox_uses_a_registered_mutation_with_its_parameters(swap_ends: str) -> None:
    assert swap_ends in MUTATIONS.names()
    rng = np.random.default_rng(0)
    assert make_toolbox(PAPER, rng, mutate=swap_ends).mutate(Genome([1, 2, 3])) == ([3, 2, 1],)
    assert make_toolbox(PAPER, rng, mutate=f"{swap_ends}:times=2").mutate(Genome([1, 2, 3])) == ([1, 2, 3],)


def test_toolbox_default_is_level_switch() -> None:
    (ours,) = make_toolbox(PAPER, np.random.default_rng(5), mutate="level_switch:max_levels=4").mutate(
        Genome(PAPER.uniform())
    )
    (theirs,) = level_switch(Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(5), max_levels=4)
    assert ours == theirs != PAPER.uniform()


def test_toolbox_selects_the_best_and_of_equals_the_earlier() -> None:
    toolbox = make_toolbox(PAPER, np.random.default_rng(0))
    genomes = [Genome([i]) for i in range(5)]
    for genome, fitness in zip(genomes, (1.0, 3.0, -math.inf, 3.0, 2.0), strict=True):
        genome.fitness.values = (fitness,)
    assert toolbox.select(genomes, 4) == [[1], [3], [4], [0]]


def test_toolbox_clones() -> None:
    genome = Genome([1, 2])
    clone = make_toolbox(PAPER, np.random.default_rng(0)).clone(genome)
    assert clone == genome
    assert clone is not genome
    assert clone.fitness is not genome.fitness


def test_toolbox_refuses_unknown_names_and_parameters() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DiffesError, match=r"unknown mutation 'level_swich'.*Did you mean 'level_switch'"):
        make_toolbox(PAPER, rng, mutate="level_swich")
    with pytest.raises(DiffesError, match=r"unknown selection 'worst'.*Known: best"):
        make_toolbox(PAPER, rng, select="worst")
    with pytest.raises(DiffesError, match=r"'level_switch:moves=3'.*its options are max_moves, max_levels"):
        make_toolbox(PAPER, rng, mutate="level_switch:moves=3")


def test_options_may_be_tuples_and_of_a_wrong_type_are_named() -> None:
    space = SearchSpace.mean_sparsity(StagePlan.equal(4), 4, 0.5)
    made = STRATEGIES.make("evopress:fidelities=(0.1,0.5,1.0),survivors=(8,2),lam=9", space, seed=0)
    assert (made.fidelities, made.survivors, made.lam) == ((0.1, 0.5, 1.0), (8, 2), 9)
    for spec in ("evopress:survivors=8", "evopress:fidelities=0.5", "evolution:crossover_rate=x"):
        with pytest.raises(DiffesError, match="not of its type"):
            STRATEGIES.make(spec, space, seed=0)
