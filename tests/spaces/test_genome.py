"""Individuals as DEAP knows them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
from deap import tools

from diffes.errors import DiffesError
from diffes.spaces.genome import Fitness, Genome, Origin


def pickled(genome: Genome) -> Genome:
    copied: Genome = pickle.loads(pickle.dumps(genome))
    return copied


def test_fitness_refuses_nan_and_orders_failures_last() -> None:
    with pytest.raises(DiffesError, match="NaN"):
        Fitness((math.nan,))
    with pytest.raises(DiffesError, match="NaN"):
        Fitness().values = (math.nan,)
    assert Fitness((1.0,)) > Fitness((-1.0,)) > Fitness((-math.inf,)) > Fitness()
    assert Fitness((0.25,)).values == (0.25,)


def test_a_refused_fitness_changes_nothing() -> None:
    fitness = Fitness((0.5,))
    with pytest.raises(DiffesError, match="NaN"):
        fitness.values = (math.nan,)
    assert fitness.values == (0.5,)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_genome_is_copied_with_its_own_fitness(copied: Callable[[Genome], Genome]) -> None:
    genome = Genome([1, 2, 3])
    assert not genome.fitness.valid
    genome.fitness.values = (0.5,)
    twin = copied(genome)
    assert isinstance(twin, Genome)
    assert twin == genome
    del twin.fitness.values
    twin[0] = 9
    assert (genome[0], genome.fitness.values) == (1, (0.5,))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_keeps_its_origin(copied: Callable[[Genome], Genome]) -> None:
    origin = Origin("swap", ((3, 2, 1),))
    assert copied(Genome([1, 2, 3], origin=origin)).origin == origin
    assert copied(Genome([1, 2, 3])).origin is None


def test_a_genome_is_a_list_that_may_be_made_with_its_fitness() -> None:
    assert Genome((1, 2)) == [1, 2] and Genome() == []
    assert not Genome([1, 2]).fitness.valid
    assert Genome([1, 2], 0.0).fitness.values == (0.0,)
    with pytest.raises(DiffesError, match="NaN"):
        Genome([1, 2], math.nan)


def test_genomes_do_not_share_a_fitness() -> None:
    one, other = Genome([1]), Genome([1])
    one.fitness.values = (1.0,)
    assert not other.fitness.valid


def test_deaps_tools_take_genomes() -> None:
    genomes = [Genome([i], fitness) for i, fitness in enumerate([1.0, 3.0, -math.inf, 2.0])]
    assert tools.selBest(genomes, 2) == [[1], [3]]
    best = tools.HallOfFame(1)
    best.update(genomes)
    del genomes[1].fitness.values
    assert best[0] == [1] and best[0].fitness.values == (3.0,)
