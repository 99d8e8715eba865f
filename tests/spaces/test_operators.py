"""Mutations and crossovers by name: ours, DEAP's, and plain ones of a user."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from deap import algorithms, base, creator, tools

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome, Origin
from diffes.spaces.operators import (
    CROSSOVERS,
    MUTATIONS,
    BoundOperator,
    OperatorRegistry,
    PlainOperator,
    confined,
    crossover,
    default_of,
    mended,
    mutation,
)
from diffes.spaces.plan import PlanSpace
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.variation import make_toolbox
from diffes.testing import SPACES, CrossoverConformance, MutationConformance

PAPER = SPACES["paper"]
TINY = SearchSpace.mean_sparsity(Stages.equal(3), 4, 0.5)


def states() -> tuple[Any, ...]:
    """Python's and numpy's global random state."""
    legacy: Any = np.random.get_state()
    return random.getstate(), legacy[1].tolist(), legacy[2:]


def bind(registry: OperatorRegistry, spec: str, space: SearchSpace = PAPER, seed: int = 0) -> Any:
    n_parents = 1 if registry is MUTATIONS else 2
    return registry.bind(spec, n_parents, space=space, rng=np.random.default_rng(seed))


@pytest.fixture(autouse=True)
def names_are_taken_back() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = [dict(registry._registered) for registry in (MUTATIONS, CROSSOVERS)]
    yield
    for registry, names in zip((MUTATIONS, CROSSOVERS), before, strict=True):
        for name in set(registry._registered) - set(names):
            registry.unregister(name)


class TestMutUniformInt(MutationConformance):
    name = "deap.mutUniformInt:indpb=0.2"


class TestMutFlipBit(MutationConformance):
    name = "deap.mutFlipBit:indpb=0.2"


class TestMutGaussian(MutationConformance):
    name = "deap.mutGaussian:mu=0,sigma=2.5,indpb=0.4"


class TestMutPolynomialBounded(MutationConformance):
    name = "deap.mutPolynomialBounded:eta=0.5,indpb=0.4"


class TestMutInversion(MutationConformance):
    name = "deap.mutInversion"


class TestCxUniform(CrossoverConformance):
    name = "deap.cxUniform:indpb=0.5"


class TestCxBlend(CrossoverConformance):
    name = "deap.cxBlend:alpha=0.5"


class TestCxSimulatedBinaryBounded(CrossoverConformance):
    name = "deap.cxSimulatedBinaryBounded:eta=2"


@pytest.mark.parametrize("spec", ["deap.mutShuffleIndexes:indpb=0.5", "deap.mutUniformInt:indpb=0.5"])
def test_deaps_mutations_keep_the_budget(spec: str) -> None:
    for label in ("paper", "half", "unequal steps", "measured costs"):
        space, found = SPACES[label], set()
        mutate = bind(MUTATIONS, spec, space)
        for seed in range(40):
            (genome,) = mutate(Genome(space.sample(np.random.default_rng(seed))))
            assert isinstance(genome, Genome) and space.is_feasible(genome), label
            assert all(type(level) is int for level in genome)
            found.add(tuple(genome))
        assert len(found) > 10


@pytest.mark.parametrize("spec", ["deap.cxOnePoint", "deap.cxTwoPoint", "deap.cxUniform:indpb=0.5"])
def test_deaps_crossovers_keep_the_budget(spec: str) -> None:
    for label in ("paper", "half", "unequal steps", "measured costs"):
        space, found = SPACES[label], set()
        mate = bind(CROSSOVERS, spec, space)
        for seed in range(40):
            rng = np.random.default_rng(seed)
            children = mate(Genome(space.sample(rng)), Genome(space.sample(rng)))
            assert len(children) == 2
            for genome in children:
                assert isinstance(genome, Genome) and space.is_feasible(genome), label
                found.add(tuple(genome))
        assert len(found) > 10


def test_deaps_shuffle_exchanges_levels() -> None:
    """Steps are equal, so what only exchanges levels needs no repair."""
    genome = Genome([0, 8, 4, 4, 1, 1, 1, 1, 0, 0])
    changed = 0
    for seed in range(20):
        (shuffled,) = bind(MUTATIONS, "deap.mutShuffleIndexes:indpb=0.2", seed=seed)(Genome(genome))
        assert sorted(shuffled) == sorted(genome)
        changed += shuffled != genome
    assert changed > 10


def test_bounds_come_from_the_space_unless_they_are_given() -> None:
    drawn: set[int] = set()
    free = PAPER.without_budget()
    mutate = bind(MUTATIONS, "deap.mutUniformInt:indpb=1", free)
    for _ in range(30):
        drawn.update(mutate(Genome([0] * 10))[0])
    assert drawn == set(range(9))
    assert bind(MUTATIONS, "deap.mutUniformInt:indpb=1,low=3,up=3", free)(Genome([0] * 10)) == ([3] * 10,)
    (genome,) = bind(MUTATIONS, "deap.mutUniformInt:indpb=1,low=7", free)(Genome([0] * 10))
    assert set(genome) <= {7, 8}


@pytest.mark.parametrize(
    ("registry", "spec", "message"),
    [
        (MUTATIONS, "nothing", r"unknown mutation 'nothing'"),
        (MUTATIONS, "level_swich", r"unknown mutation 'level_swich'.*Did you mean 'level_switch'"),
        (MUTATIONS, "deap.mutShuffle", r"unknown mutation 'deap.mutShuffle'. Did you mean 'deap.mutShuffleIndexes'"),
        (MUTATIONS, "deap.cxTwoPoint", r"unknown mutation 'deap.cxTwoPoint'.*Known: deap.mutESLogNormal"),
        (MUTATIONS, "deap.mutation", r"unknown mutation 'deap.mutation'"),
        (CROSSOVERS, "deap.mutFlipBit", r"unknown crossover 'deap.mutFlipBit'.*Known: deap.cxBlend"),
        (MUTATIONS, "level_switch:moves=3", r"'level_switch:moves=3'.*Its options: max_moves, max_levels"),
        (MUTATIONS, "deap.mutUniformInt", r"missing a required argument: 'indpb'. Its options: low, up, indpb"),
        (MUTATIONS, "deap.mutUniformInt:p=1,indpb=1", r"'p'.*Its options: low, up, indpb"),
        (CROSSOVERS, "deap.cxTwoPoint:indpb=1", r"'indpb'. Its options: none"),
    ],
)
def test_wrong_names_and_options_are_named(registry: OperatorRegistry, spec: str, message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        bind(registry, spec)


def test_names_list_ours_and_what_was_registered_and_none_of_deaps() -> None:
    @mutation("mine")
    def mine(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome]:
        return (genome,)

    assert {"level_switch", "mine"} <= set(MUTATIONS.names())
    assert "mine" not in CROSSOVERS.names()
    assert not any(name.startswith("deap.") for name in MUTATIONS.names())
    MUTATIONS.unregister("mine")
    assert "mine" not in MUTATIONS.names()


def test_an_operator_of_ours_is_taken_as_it_is() -> None:
    @mutation("mine")
    def mine(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, times: int = 1) -> tuple[Genome]:
        genome[0] += times
        return (genome,)

    @crossover("theirs")
    def theirs(one: Genome, other: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome, Genome]:
        return other, one

    assert MUTATIONS.get("mine") is mine and CROSSOVERS.get("theirs") is theirs
    assert bind(MUTATIONS, "mine:times=5")(Genome([0] * 10)) == ([5] + [0] * 9,)  # nobody repairs it


def test_a_plain_operator_of_a_user_is_rounded_and_repaired() -> None:
    @mutation("noisy")
    def noisy(individual: list[float], indpb: float = 0.5) -> tuple[list[float]]:
        for i in range(len(individual)):
            if random.random() < indpb:
                individual[i] += random.gauss(0, 3)
        return (individual,)

    plain = MUTATIONS.get("noisy")
    assert isinstance(plain, PlainOperator)
    found = set()
    mutate = bind(MUTATIONS, "noisy:indpb=0.9")
    for _ in range(30):
        (genome,) = mutate(Genome(PAPER.uniform()))
        assert PAPER.is_feasible(genome) and all(type(level) is int for level in genome)
        found.add(tuple(genome))
    assert len(found) > 20
    assert bind(MUTATIONS, "noisy:indpb=0")(Genome(PAPER.uniform())) == (PAPER.uniform(),)
    with pytest.raises(DiffesError, match=r"'noisy:p=1'.*Its options: indpb"):
        bind(MUTATIONS, "noisy:p=1")


def test_levels_are_rounded_to_the_nearest() -> None:
    @mutation("push")
    def push(individual: list[float]) -> tuple[list[float]]:
        individual[:] = [1.4, 1.6, 2.6]
        return (individual,)

    for seed in range(10):  # cut off, they would need a repair
        assert bind(MUTATIONS, "push", TINY, seed)(Genome(TINY.uniform())) == ([1, 2, 3],)


def test_a_plain_crossover_of_a_user_is_adapted() -> None:
    @crossover("swap_heads")
    def swap_heads(one: list[int], other: list[int], n: int = 3) -> tuple[list[int], list[int]]:
        one[:n], other[:n] = other[:n], one[:n]
        return one, other

    one, other = [8, 2, 0, 0, 0, 5, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 4, 8, 8]
    children = bind(CROSSOVERS, "swap_heads")(Genome(one), Genome(other))
    assert len(children) == 2 and all(map(PAPER.is_feasible, children))
    assert bind(CROSSOVERS, "swap_heads:n=10")(Genome(one), Genome(other)) == (other, one)


def test_the_generator_decides_what_a_plain_operator_draws() -> None:
    @mutation("both")
    def both(individual: list[int]) -> tuple[list[int]]:
        individual[:] = [random.randrange(9) for _ in individual]
        individual[0] = int(np.random.randint(9))
        return (individual,)

    def chain(seed: int) -> list[list[int]]:
        mutate = bind(MUTATIONS, "both", PAPER.without_budget(), seed)
        return [list(mutate(Genome([0] * 10))[0]) for _ in range(5)]

    random.seed(1)
    np.random.seed(1)
    first, before = chain(3), states()
    random.seed(2)
    np.random.seed(2)
    assert chain(3) == first
    assert chain(4) != first
    assert len({tuple(genome) for genome in first}) == 5  # each application is seeded anew
    assert len({genome[0] for genome in first}) > 1
    random.seed(1)
    np.random.seed(1)
    assert states() == before


def test_global_states_are_as_before_even_after_an_error() -> None:
    @mutation("broken")
    def broken(individual: list[int]) -> tuple[list[int]]:
        random.random()
        np.random.random()
        raise RuntimeError("broken")

    before = states()
    with pytest.raises(RuntimeError, match="broken"):
        bind(MUTATIONS, "broken")(Genome(PAPER.uniform()))
    assert states() == before


def test_confined_seeds_both_and_restores_both() -> None:
    def draws(seed: int) -> tuple[float, float]:
        with confined(np.random.default_rng(seed)):
            return random.random(), float(np.random.random())

    random.seed(1)
    np.random.seed(1)
    before = states()
    first = draws(0)
    assert states() == before
    random.seed(2)
    np.random.seed(2)
    assert draws(0) == first
    assert draws(1)[0] != first[0] and draws(1)[1] != first[1]


def nothing(individual: Sequence[int]) -> Any:
    """Returns no genome."""


def not_a_tuple(individual: Sequence[int]) -> Any:
    return individual


def not_a_number(individual: list[float]) -> Any:
    individual[0] = float("nan")
    return (individual,)


def infinite(individual: list[float]) -> Any:
    individual[0] = float("inf")
    return (individual,)


def letters(individual: Sequence[int]) -> Any:
    return (["a"] * len(individual),)


def beyond(individual: Sequence[int]) -> Any:
    return (individual[len(individual)],)


def longer(individual: list[int]) -> Any:
    individual.append(0)
    return (individual,)


def shorter(individual: list[int]) -> Any:
    return (individual[1:],)


@pytest.mark.parametrize("function", [not_a_number, infinite, letters, beyond])
def test_a_plain_operator_that_cannot_work_is_named(function: Any) -> None:
    mutation("bad")(function)
    with pytest.raises(DiffesError, match=r"operator 'bad' fails on a genome of 10 levels from 0 to 8 \(.+\). Choose"):
        bind(MUTATIONS, "bad")(Genome(PAPER.uniform()))


@pytest.mark.parametrize("function", [nothing, not_a_tuple])
def test_a_plain_operator_that_returns_no_tuple_is_named(function: Any) -> None:
    mutation("bad")(function)
    with pytest.raises(DiffesError, match="operator 'bad' must return a tuple of 1 genomes, got"):
        bind(MUTATIONS, "bad")(Genome(PAPER.uniform()))


@pytest.mark.parametrize(("function", "length"), [(longer, 11), (shorter, 9)])
def test_a_plain_operator_that_changes_the_length_is_named(function: Any, length: int) -> None:
    mutation("bad")(function)
    with pytest.raises(DiffesError, match=rf"operator 'bad' returned a genome of {length} levels, and it must have 10"):
        bind(MUTATIONS, "bad")(Genome(PAPER.uniform()))


@pytest.mark.parametrize(
    ("registry", "spec", "message"),
    [
        (MUTATIONS, "deap.mutESLogNormal:c=1,indpb=1", "'deap.mutESLogNormal' fails on a"),  # wants a strategy vector
        (MUTATIONS, "deap.mutUniformInt:indpb=1,low=(1,2)", "'deap.mutUniformInt' fails on a genome"),
        (MUTATIONS, "deap.mutUniformInt:indpb=often", "'deap.mutUniformInt' fails on a genome"),
        (CROSSOVERS, "deap.cxESBlend:alpha=0.5", "'deap.cxESBlend' fails on a genome"),
        (CROSSOVERS, "deap.cxMessyOnePoint", "'deap.cxMessyOnePoint' returned a genome of .* levels, and it must"),
    ],
)
def test_those_of_deap_that_do_not_suit_are_named(registry: OperatorRegistry, spec: str, message: str) -> None:
    genomes = [Genome(PAPER.uniform()) for _ in range(1 if registry is MUTATIONS else 2)]
    with pytest.raises(DiffesError, match=message):
        bind(registry, spec)(*genomes)


def test_a_function_without_room_for_a_genome_is_refused() -> None:
    def none_at_all() -> Any:
        return ()

    mutation("bad")(none_at_all)
    with pytest.raises(DiffesError, match="too many positional arguments"):
        bind(MUTATIONS, "bad")


def test_an_adapted_operator_shows_its_options_and_its_text() -> None:
    plain = MUTATIONS.get("deap.mutUniformInt")
    assert list(inspect.signature(plain).parameters)[1:] == ["space", "rng", "low", "up", "indpb"]
    assert "low" in str(plain.__doc__)


def test_mended_repairs_in_place_and_leaves_the_feasible_alone() -> None:
    rng = np.random.default_rng(0)
    feasible = Genome(TINY.uniform())
    assert mended(feasible, TINY, rng) is feasible and feasible == TINY.uniform()
    off = Genome([4, 4, 4])
    assert mended(off, TINY, rng) is off and TINY.is_feasible(off)


def bound(registry: OperatorRegistry, spec: str, space: SearchSpace = TINY) -> BoundOperator:
    return BoundOperator(registry, spec, space, np.random.default_rng(0))


def test_a_bound_operator_makes_genomes_without_fitness_of_known_origin() -> None:
    genome = Genome([2, 2, 2], 0.5)
    (child,) = bound(MUTATIONS, "level_switch:max_moves=1")(genome)
    assert isinstance(child, Genome) and not child.fitness.valid
    assert child.origin == Origin("level_switch:max_moves=1", ((2, 2, 2),))


def test_a_bound_operator_takes_lists_too() -> None:
    @mutation("fresh")
    def fresh(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[list[int]]:
        return ([4, 2, 0],)

    (child,) = bound(MUTATIONS, "fresh")(Genome([2, 2, 2], 0.5))
    assert isinstance(child, Genome) and child == [4, 2, 0] and child.origin == Origin("fresh", ((2, 2, 2),))


def test_the_origin_of_a_chain_names_every_operator_once_and_the_measured_parents() -> None:
    one, other = Genome([4, 2, 0], 1.0), Genome([0, 2, 4], 2.0)
    child, twin = bound(CROSSOVERS, "level_exchange")(one, other)
    assert child.origin == twin.origin == Origin("level_exchange", ((4, 2, 0), (0, 2, 4)))
    switch, swap = bound(MUTATIONS, "level_switch"), bound(MUTATIONS, "swap_stages")
    for _ in range(3):
        (child,) = switch(child)
    (child,) = swap(child)
    assert child.origin == Origin("level_exchange + level_switch + swap_stages", ((4, 2, 0), (0, 2, 4)))


def test_the_origin_of_a_measured_genome_ends_with_itself() -> None:
    genome = Genome([1, 2, 3], 1.0, Origin("level_switch", ((2, 2, 2),)))
    (child,) = bound(MUTATIONS, "swap_stages")(genome)
    assert child.origin == Origin("swap_stages", ((1, 2, 3),))


def test_equal_parents_count_once() -> None:
    child, _ = bound(CROSSOVERS, "level_exchange")(Genome([1, 2, 3], 1.0), Genome([1, 2, 3], 1.0))
    assert child.origin == Origin("level_exchange", ((1, 2, 3),))


def test_an_array_becomes_a_list_of_whole_levels() -> None:
    @mutation("array")
    def array(individual: list[int]) -> tuple[Any]:
        return (np.array(individual, dtype=float) + 0.4,)

    try:
        (made,) = MUTATIONS.bind("array", 1, space=TINY, rng=np.random.default_rng(0))(Genome(TINY.uniform()))
        assert made == TINY.uniform() and all(type(level) is int for level in made)
    finally:
        MUTATIONS.unregister("array")


@pytest.mark.parametrize("returned", [2, 0])
def test_an_operator_that_returns_another_number_of_genomes_is_named(returned: int) -> None:
    @mutation("many")
    def many(genome: Genome, *, space: SearchSpace, rng: np.random.Generator) -> tuple[Genome, ...]:
        return (genome,) * returned

    try:
        with pytest.raises(DiffesError, match="operator 'many' must return a tuple of 1 genomes"):
            bound(MUTATIONS, "many")(Genome(TINY.uniform()))
    finally:
        MUTATIONS.unregister("many")


def test_an_operator_that_takes_a_space_and_no_generator_is_refused_by_name() -> None:
    @mutation("half")
    def half(genome: Genome, *, space: SearchSpace) -> tuple[Genome]:
        return (genome,)

    try:
        with pytest.raises(DiffesError, match=r"'half'.*'rng'"):
            bound(MUTATIONS, "half")
    finally:
        MUTATIONS.unregister("half")


def test_individuals_of_deaps_creator_work_as_its_documentation_teaches() -> None:
    """`creator.create("Individual", list, fitness=...)` and an algorithm of DEAP, on our mutation and crossover."""
    creator.create("FitnessHigh", base.Fitness, weights=(1.0,))
    creator.create("Individual", list, fitness=creator.FitnessHigh)
    state = random.getstate()
    try:
        rng = np.random.default_rng(0)
        toolbox = make_toolbox(PAPER, rng)
        toolbox.register("individual", tools.initIterate, creator.Individual, lambda: PAPER.sample(rng))
        toolbox.register("population", tools.initRepeat, list, toolbox.individual)
        toolbox.register("evaluate", lambda genome: (-float(genome[0]),))
        random.seed(0)
        found, _ = algorithms.eaMuPlusLambda(toolbox.population(n=4), toolbox, 4, 8, 0.5, 0.5, 5, verbose=False)
    finally:
        random.setstate(state)
        del creator.FitnessHigh, creator.Individual
    assert all(type(each).__name__ == "Individual" and PAPER.is_feasible(each) for each in found)
    assert max(each.fitness.values[0] for each in found) == 0.0


class Derived(SearchSpace):
    """A kind of space that nobody wrote a default for."""


def test_the_default_of_a_space_is_the_operator_that_was_written_for_its_kind() -> None:
    plans = PlanSpace.dense_calls([[1.0, 0.5]] * 4, 2)
    derived = Derived.mean_sparsity(Stages.equal(3), 4, 0.5)
    found = [[MUTATIONS.default(s), MUTATIONS.default(s, small=True), CROSSOVERS.default(s)] for s in (TINY, derived)]
    assert found == [["level_switch", "level_switch_small", "level_exchange"]] * 2
    assert MUTATIONS.default(plans) == "plan_move"
    assert MUTATIONS.default(plans, small=True) == "plan_move:max_moves=1"
    assert CROSSOVERS.default(plans) == "node_exchange"


def test_a_default_of_ones_own_goes_before_that_of_the_base_class() -> None:
    @mutation("mine")
    @default_of(Derived, options="times=2")
    def mine(genome: Genome, *, space: SearchSpace, rng: np.random.Generator, times: int = 1) -> tuple[Genome]:
        return (genome,)

    assert MUTATIONS.default(Derived.mean_sparsity(Stages.equal(3), 4, 0.5)) == "mine:times=2"
    assert MUTATIONS.default(TINY) == "level_switch"


def test_two_defaults_of_one_kind_are_refused_and_a_wrapper_of_one_is_none() -> None:
    level_switch = MUTATIONS.get("level_switch")
    mutation("wrapped")(functools.wraps(level_switch)(lambda genome, **options: level_switch(genome, **options)))
    assert MUTATIONS.default(TINY) == "level_switch"
    mutation("wrapped")(default_of(SearchSpace)(lambda genome, *, space, rng: (genome,)))
    with pytest.raises(DiffesError, match="level_switch and wrapped are both the default mutation of SearchSpace"):
        MUTATIONS.default(TINY)


def test_a_registry_without_a_default_says_so() -> None:
    with pytest.raises(DiffesError, match="no installed mutation is the default of SearchSpace"):
        OperatorRegistry("mutation", "diffes.nothing", "mut", 1).default(TINY)
