"""Draws in spaces of stages, recorded before plans were added: the paper's search must not change, seed by seed."""

from __future__ import annotations

import numpy as np
import pytest

from diffes.spaces.initial import hybrid
from diffes.spaces.operators import CROSSOVERS, MUTATIONS
from diffes.spaces.strategy import STRATEGIES
from diffes.testing import SPACES, trace

PAPER = SPACES["paper"]


@pytest.mark.parametrize(
    ("name", "label", "levels"),
    [
        ("level_switch", "paper", [0, 1, 1, 2, 2, 3, 3, 1, 4, 3]),
        ("level_switch", "measured costs", [2, 0, 1, 2]),
        ("level_step", "unequal steps", [0, 1, 1, 0, 1, 5]),
        ("segment_transfer", "unequal steps", [0, 6, 2, 0, 1, 2]),
    ],
)
def test_five_mutations_in_a_row(name: str, label: str, levels: list[int]) -> None:
    rng = np.random.default_rng(5)
    genome = SPACES[label].sample(rng)
    for _ in range(5):
        (genome,) = MUTATIONS.get(name)(genome, space=SPACES[label], rng=rng)
    assert genome == levels


def test_a_crossover() -> None:
    rng = np.random.default_rng(5)
    one, other = PAPER.sample(rng), PAPER.sample(rng)
    children = CROSSOVERS.get("level_exchange")(one, other, space=PAPER, rng=rng)
    assert children == ([2, 2, 0, 1, 1, 3, 2, 3, 3, 3], [0, 2, 0, 3, 3, 3, 1, 3, 2, 3])


def test_the_last_of_a_hybrid_population() -> None:
    assert hybrid(PAPER, np.random.default_rng(3), 16)[-1] == [0, 4, 0, 0, 0, 3, 3, 3, 7, 0]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("evolution", ((1, 0, 1, 1, 1, 0, 2, 4, 5, 5), 1.0)),
        ("evopress", ((0, 0, 1, 2, 0, 2, 3, 3, 4, 5), 0.25)),
        ("nsga2", ((6, 8, 5, 4, 8, 8, 7, 8, 7, 7), 1.0)),
    ],
)
def test_the_last_of_48_schedules_that_a_strategy_asks_for(name: str, last: tuple[tuple[int, ...], float]) -> None:
    assert trace(STRATEGIES.make(name, PAPER, seed=3), 48)[-1] == last
