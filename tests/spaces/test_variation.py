"""DEAP's toolbox on a space, and the variation step that the evolutionary strategies share."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from deap import algorithms, base, tools

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome, Origin
from diffes.spaces.initial import hybrid
from diffes.spaces.operators import MUTATIONS, mutation
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.variation import MUTATION_TRIES, make_toolbox, vary
from diffes.testing import SPACES, separable
from search_strategies.mutations import level_switch

PAPER = SearchSpace.mean_sparsity(Stages.equal(10), 16, 0.5)
SMALL = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5)  # 7 feasible schedules
ALL_OF_SMALL = {levels for levels in itertools.product(range(3), repeat=3) if sum(levels) == 3}


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
    rising, falling = [1, *[8] * 8, 15], [15, *[8] * 8, 1]
    assert make_toolbox(PAPER, rng, mutate=swap_ends).mutate(Genome(rising)) == (falling,)
    assert make_toolbox(PAPER, rng, mutate=f"{swap_ends}:times=2").mutate(Genome(rising)) == (rising,)


def test_toolbox_default_is_level_switch() -> None:
    (ours,) = make_toolbox(PAPER, np.random.default_rng(5), mutate="level_switch:max_levels=4").mutate(
        Genome(PAPER.uniform())
    )
    (theirs,) = level_switch(Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(5), max_levels=4)
    assert ours == theirs != PAPER.uniform()
    (plain,) = make_toolbox(PAPER, np.random.default_rng(5)).mutate(Genome(PAPER.uniform()))
    assert (plain,) == level_switch(Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(5))


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
    with pytest.raises(DiffesError, match=r"unknown crossover 'worst'.*Known: level_exchange"):
        make_toolbox(PAPER, rng, mate="worst")
    with pytest.raises(DiffesError, match=r"'level_switch:moves=3'.*Its options: max_moves, max_levels"):
        make_toolbox(PAPER, rng, mutate="level_switch:moves=3")


def test_toolbox_draws_individuals_and_a_hybrid_population() -> None:
    toolbox = make_toolbox(PAPER, np.random.default_rng(3))
    individual = toolbox.individual()
    assert isinstance(individual, Genome) and individual == PAPER.sample(np.random.default_rng(3))
    assert not individual.fitness.valid and individual.origin is None
    population = make_toolbox(PAPER, np.random.default_rng(3)).population()
    assert population == hybrid(PAPER, np.random.default_rng(3), 16)
    assert all(isinstance(genome, Genome) and not genome.fitness.valid for genome in population)
    assert len(toolbox.population(n=20)) == 20


def score(genome: Genome) -> tuple[float]:
    return (separable(PAPER.schedule(genome)),)  # refuses what is off the budget


def mu_plus_lambda(seed: int, **operators: str) -> tuple[list[Genome], tools.Logbook, tools.HallOfFame, list[Genome]]:
    """DEAP's own algorithm on our toolbox: population, logbook, hall of fame, and all that was scored."""
    toolbox = make_toolbox(PAPER, np.random.default_rng(seed), **operators)
    scored: list[Genome] = []

    def evaluate(genome: Genome) -> tuple[float]:
        scored.append(toolbox.clone(genome))
        return score(genome)

    toolbox.register("evaluate", evaluate)
    stats = tools.Statistics(lambda genome: genome.fitness.values[0])
    stats.register("max", max)
    stats.register("mean", np.mean)
    hall = tools.HallOfFame(3)
    before = random.getstate()
    random.seed(seed)  # DEAP's varOr draws from the global generator
    try:
        population, logbook = algorithms.eaMuPlusLambda(
            toolbox.population(n=12), toolbox, mu=6, lambda_=12, cxpb=0.4, mutpb=0.5, ngen=15, stats=stats,
            halloffame=hall, verbose=False,
        )  # fmt: skip
    finally:
        random.setstate(before)
    return population, logbook, hall, scored


@pytest.mark.parametrize(
    "operators", [{}, {"mutate": "deap.mutShuffleIndexes:indpb=0.2", "mate": "deap.cxTwoPoint"}], ids=["ours", "deap"]
)
def test_deaps_own_algorithm_runs_on_the_toolbox(operators: dict[str, str]) -> None:
    population, logbook, hall, scored = mu_plus_lambda(0, **operators)
    assert len(population) == 6 and all(PAPER.is_feasible(genome) for genome in [*population, *hall, *scored])
    assert [line["gen"] for line in logbook] == list(range(16))
    assert sum(line["nevals"] for line in logbook) == len(scored)
    best = [line["max"] for line in logbook]
    assert best == sorted(best) and best[-1] > best[0]  # an elitist search climbs
    assert all(line["mean"] <= line["max"] for line in logbook)
    top = sorted({score(genome)[0] for genome in scored}, reverse=True)
    assert hall[0].fitness.values == (top[0],) == (best[-1],)
    assert len(hall) == 3 and [genome.fitness.values[0] for genome in hall] == top[:3]
    assert population[0] == hall[0]


def test_deaps_own_algorithm_repeats_itself() -> None:
    first, again, other = (mu_plus_lambda(seed) for seed in (0, 0, 1))
    assert again[3] == first[3] != other[3]
    assert again[0] == first[0] and list(again[1]) == list(first[1]) and list(again[2]) == list(first[2])


def children(
    parents: list[Genome], n: int, seed: int = 0, toolbox: base.Toolbox | None = None, **options: Any
) -> list[Genome]:
    """`vary` on the paper's space unless another is named; parents count as seen."""
    rng = np.random.default_rng(seed)
    space = options.pop("space", PAPER)
    seen = options.pop("seen", {tuple(parent) for parent in parents})
    return vary(parents, toolbox or make_toolbox(space, rng), n, space=space, rng=rng, seen=seen, **options)


def measured(*genomes: list[int]) -> list[Genome]:
    return [Genome(levels, float(i)) for i, levels in enumerate(genomes)]


def several(n: int) -> list[Genome]:
    return measured(*hybrid(PAPER, np.random.default_rng(9), n))


@pytest.mark.parametrize("cxpb", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("label", SPACES)
def test_children_are_feasible_distinct_and_never_seen(label: str, cxpb: float) -> None:
    space = SPACES[label]
    rng = np.random.default_rng(0)
    parents = measured(*hybrid(space, rng, 4))
    seen = {tuple(space.sample(rng)) for _ in range(50)} | {tuple(parent) for parent in parents}
    before = set(seen)
    made = children(parents, 30, space=space, seen=seen, cxpb=cxpb)
    levels = [tuple(child) for child in made]
    assert len(set(levels)) == len(levels) <= 30
    assert not set(levels) & seen and seen == before
    assert all(space.is_feasible(child) and not child.fitness.valid for child in made)


def test_as_many_children_as_asked_for_where_there_are_enough() -> None:
    for n in (0, 1, 17):
        assert len(children(several(3), n)) == n


def test_parents_are_left_as_they_are() -> None:
    parents = several(4)
    before = [(list(parent), parent.fitness.values, parent.origin) for parent in parents]
    children(parents, 30, cxpb=0.5)
    assert [(list(parent), parent.fitness.values, parent.origin) for parent in parents] == before


def test_the_same_draws_for_the_same_seed() -> None:
    first, again, other = (children(several(4), 20, seed, cxpb=0.5) for seed in (1, 1, 2))
    assert again == first != other
    assert [child.origin for child in again] == [child.origin for child in first]


def test_nothing_is_drawn_from_a_global_generator() -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate()
    first = children(several(4), 20, cxpb=0.5)
    assert random.getstate() == before
    random.seed(2)
    np.random.seed(2)
    assert children(several(4), 20, cxpb=0.5) == first


def test_every_parent_has_children() -> None:
    parents = several(4)
    made = children(parents, 60)
    counts = [sum(child.origin == Origin("level_switch", (tuple(p),)) for child in made) for p in parents]
    assert sum(counts) == 60 and min(counts) >= 5


def test_without_a_crossover_the_mate_is_never_called() -> None:
    rng = np.random.default_rng(0)
    toolbox = make_toolbox(PAPER, rng)

    def never(one: Genome, other: Genome) -> tuple[Genome, Genome]:
        raise AssertionError("crossed")

    toolbox.register("mate", never)
    assert len(children(several(4), 20, toolbox=toolbox)) == 20


def test_a_crossover_is_as_frequent_as_asked_for() -> None:
    crossed = [len(child.origin.parents) == 2 for child in children(several(8), 300, cxpb=0.3) if child.origin]
    assert len(crossed) == 300
    assert sum(crossed) == pytest.approx(90, abs=25)


def test_nobody_is_crossed_with_itself() -> None:
    """With two parents and a sure crossover, each child has both; so it is where one of them is listed twice."""
    a, b = several(2)
    for parents in ([a, b], [a, a, b], [b, a, b, a]):
        made = children(parents, 40, cxpb=1.0)
        assert len(made) == 40
        assert {child.origin.operator for child in made if child.origin} == {"level_exchange + level_switch"}
        assert [sorted(child.origin.parents) for child in made if child.origin] == [sorted([tuple(a), tuple(b)])] * 40


def test_mates_are_two_different_genomes() -> None:
    rng = np.random.default_rng(0)
    toolbox, parents, pairs = make_toolbox(PAPER, rng), several(5), list[tuple[tuple[int, ...], tuple[int, ...]]]()
    mate = toolbox.mate

    def noting(one: Genome, other: Genome) -> tuple[Genome, ...]:
        assert not any(one is parent or other is parent for parent in parents)  # clones only
        pairs.append((tuple(one), tuple(other)))
        result: tuple[Genome, ...] = mate(one, other)
        return result

    toolbox.register("mate", noting)
    children([*parents, *parents], 200, toolbox=toolbox, cxpb=1.0)
    assert len(pairs) >= 200
    assert all(one != other for one, other in pairs)
    assert len(set(pairs)) == 20  # every ordered pair


def test_a_single_parent_is_not_crossed() -> None:
    (parent,) = several(1)
    for parents in ([parent], [parent, parent]):
        made = children(parents, 10, cxpb=1.0)
        assert [child.origin for child in made] == [Origin("level_switch", (tuple(parent),))] * 10


def test_a_child_is_mutated_on_until_it_is_new() -> None:
    """A walk along the line of levels of the first stage: all but its end was seen."""
    rng, space = np.random.default_rng(0), PAPER.without_budget()
    toolbox = make_toolbox(space, rng)
    mutate = toolbox.mutate
    steps = 0

    def step(genome: Genome) -> tuple[Genome]:
        nonlocal steps
        steps += 1
        (child,) = mutate(genome)  # for its origin
        child[:] = [steps, *[0] * 9]
        return (child,)

    toolbox.register("mutate", step)
    parent = Genome([0] * 10, 1.0)
    seen = {(level, *[0] * 9) for level in range(12)}
    (child,) = children([parent], 1, toolbox=toolbox, space=space, seen=seen)
    assert child == [12, *[0] * 9] and child.origin == Origin("level_switch", (tuple(parent),))


def test_a_mutation_that_does_nothing_falls_back_to_random() -> None:
    rng = np.random.default_rng(0)
    toolbox = make_toolbox(PAPER, rng)
    calls = 0

    def idle(genome: Genome) -> tuple[Genome]:
        nonlocal calls
        calls += 1
        return (genome,)

    toolbox.register("mutate", idle)
    made = children(several(2), 5, toolbox=toolbox)
    assert [child.origin for child in made] == [Origin("random")] * 5
    assert len({tuple(child) for child in made}) == 5 and all(map(PAPER.is_feasible, made))
    assert calls == 5 * MUTATION_TRIES


def test_it_stops_where_nothing_is_left() -> None:
    parents = measured([1, 1, 1])
    assert {tuple(child) for child in children(parents, 100, space=SMALL)} == ALL_OF_SMALL - {(1, 1, 1)}
    left = {(2, 1, 0), (0, 1, 2)}
    made = children(parents, 100, space=SMALL, seen=ALL_OF_SMALL - left)
    assert {tuple(child) for child in made} == left and len(made) == 2
    assert children(parents, 100, space=SMALL, seen=ALL_OF_SMALL) == []
