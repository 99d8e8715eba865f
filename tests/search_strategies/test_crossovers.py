"""Crossovers: children between their parents."""

from __future__ import annotations

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome
from diffes.spaces.space import SearchSpace
from diffes.testing import PLANS, SPACES, CrossoverConformance
from search_strategies.crossovers import level_exchange, node_exchange

PAPER = SPACES["paper"]


class TestLevelExchange(CrossoverConformance):
    name = "level_exchange"


class TestFewMoves(CrossoverConformance):
    name = "level_exchange:rate=0.2"


class TestNodeExchange(CrossoverConformance):
    name = "node_exchange"
    plans_only = True


def pair(seed: int) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    return PAPER.sample(rng), PAPER.sample(rng)


def crossed(seed: int, rate: float = 0.5) -> tuple[Genome, Genome]:
    one, other = pair(seed)
    return level_exchange(Genome(one), Genome(other), space=PAPER, rng=np.random.default_rng(seed), rate=rate)


def test_children_are_between_their_parents_and_complement_each_other() -> None:
    for seed in range(30):
        one, other = pair(seed)
        for a, b, x, y in zip(one, other, *crossed(seed), strict=True):
            assert min(a, b) <= x <= max(a, b) and x + y == a + b


def test_a_rate_of_nothing_copies_and_a_full_rate_exchanges() -> None:
    for seed in range(10):
        one, other = pair(seed)
        assert crossed(seed, 0) == (one, other)
        assert crossed(seed, 1) == (other, one)


def test_as_many_moves_are_made_as_the_rate_says() -> None:
    """A move changes two levels of each child by one."""
    made = moves = 0
    for seed in range(60):
        one, other = pair(seed)
        child, _ = crossed(seed, 0.25)
        moves += int(np.abs(np.subtract(one, other)).sum()) // 2
        made += int(np.abs(np.subtract(one, child)).sum()) // 2
    assert made / moves == pytest.approx(0.25, abs=0.04)


def test_no_repair_is_needed_where_steps_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair(seed) for seed in range(20)]
    monkeypatch.delattr(SearchSpace, "repair")
    for one, other in pairs:
        children = level_exchange(Genome(one), Genome(other), space=PAPER, rng=np.random.default_rng(0))
        assert all(map(PAPER.is_feasible, children))


def test_both_are_changed_in_place() -> None:
    one, other = (Genome(levels) for levels in pair(3))
    child, twin = level_exchange(one, other, space=PAPER, rng=np.random.default_rng(0))
    assert child is one and twin is other and child != pair(3)[0]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_beyond_its_ends_is_refused(rate: float) -> None:
    with pytest.raises(DiffesError, match=r"rate must be in \[0, 1\]"):
        crossed(0, rate)


def test_node_exchange_swaps_what_is_below_a_cut() -> None:
    """In a space without a budget nothing is repaired; the cut is anywhere between two nodes."""
    space, cuts = PLANS["no budget"], set()
    for seed in range(100):
        one, other = [0] * 16, [3] * 16
        a, b = node_exchange(Genome(one), Genome(other), space=space, rng=np.random.default_rng(seed))
        cuts.add(a.count(3))
        assert a == [3] * a.count(3) + [0] * a.count(0) and b == [3 - level for level in a]
    assert cuts == set(range(1, 16))


def test_level_exchange_leaves_alone_who_is_called() -> None:
    space, rng = PLANS["no budget"], np.random.default_rng(0)
    one, other = [5, 0, 4, 1, 5, 2, *[5] * 10], [1, 5, 0, 3, 5, 4, *[5] * 10]
    changed: set[int] = set()
    for _ in range(50):
        a, b = level_exchange(Genome(one), Genome(other), space=space, rng=rng)
        assert [s for s, level in enumerate(a) if level == 5] == [0, 4, *range(6, 16)]
        assert [s for s, level in enumerate(b) if level == 5] == [1, 4, *range(6, 16)]
        changed.update(s for s in range(16) if a[s] != one[s])
    assert changed == {2, 3, 5}
