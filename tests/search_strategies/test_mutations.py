"""Mutations: what each changes, and by how much."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.genome import Genome
from diffes.spaces.operators import MUTATIONS
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.testing import MutationConformance
from search_strategies.mutations import level_step, level_switch, segment_transfer, shift_window, swap_stages

BUDGETS = [0, 0.3, 0.33, 0.5, 1]
STEPS = [None, (1, 4, 2, 3, 2, 7), (0, 4, 0, 3, 5, 0), (0, 0, 5, 0, 0, 0)]
PAPER = SearchSpace.mean_sparsity(Stages.equal(10), 16, 0.5)
FREE = PAPER.without_budget()
RAMP = [0, 2, 4, 6, 8, 8, 10, 12, 14, 16]  # 80 levels, as the budget has them


class TestLevelSwitch(MutationConformance):
    name = "level_switch"


class TestLevelSwitchWithOptions(MutationConformance):
    name = "level_switch:max_moves=2,max_levels=4"


class TestLevelSwitchSmall(MutationConformance):
    name = "level_switch_small"


class TestLevelStep(MutationConformance):
    name = "level_step"


class TestSegmentTransfer(MutationConformance):
    name = "segment_transfer"


class TestShiftWindow(MutationConformance):
    name = "shift_window"


class TestSwapStages(MutationConformance):
    name = "swap_stages"


@pytest.mark.parametrize(("steps", "budget"), list(itertools.product(STEPS, BUDGETS)))
def test_level_switch_keeps_genomes_feasible(steps: tuple[int, ...] | None, budget: float) -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(6), 8, budget, steps)
    rng = np.random.default_rng(0)
    genome = Genome(space.sample(rng))
    for _ in range(60):
        (genome,) = level_switch(genome, space=space, rng=rng, max_levels=5)
        assert isinstance(genome, Genome)
        assert space.is_feasible(genome)
        assert all(type(level) is int for level in genome)


def test_level_switch_keeps_genomes_feasible_under_uneven_costs() -> None:
    space = SearchSpace(Stages.equal(4), 4, (3, 1, 2, 2), ((100, 90, 60, 50, 13),) * 4, 500)
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


class CountingGenerator:
    """Counts the pairs of stages drawn."""

    def __init__(self) -> None:
        self.rng, self.moves = np.random.default_rng(0), 0

    def integers(self, *args: Any) -> Any:
        return self.rng.integers(*args)

    def choice(self, *args: Any, **kwargs: Any) -> Any:
        self.moves += 1
        return self.rng.choice(*args, **kwargs)


def test_number_of_moves_is_the_smaller_of_two_draws() -> None:
    counting, moves = CountingGenerator(), []
    for _ in range(900):
        counting.moves = 0
        level_switch(Genome(PAPER.uniform()), space=PAPER, rng=counting, max_moves=3)  # type: ignore[arg-type]
        moves.append(counting.moves)
    assert [moves.count(n) for n in (1, 2, 3)] == pytest.approx([500, 300, 100], abs=60)


def test_the_small_one_makes_up_to_three_moves_of_one_level() -> None:
    small = MUTATIONS.get("level_switch_small")
    counting, moves, amounts = CountingGenerator(), set(), set()
    for _ in range(200):
        counting.moves = 0
        (child,) = small(Genome(PAPER.uniform()), space=PAPER, rng=counting)
        moves.add(counting.moves)
        amounts.add(sum(map(abs, np.subtract(child, PAPER.uniform()))))
    assert moves == {1, 2, 3} and max(amounts) == 6


def test_moves_are_clipped_and_need_no_repair_where_steps_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    space, rng = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.75), np.random.default_rng(0)
    monkeypatch.delattr(SearchSpace, "repair")
    genome = Genome([3, 3, 3, 3])
    for _ in range(50):
        level_switch(genome, space=space, rng=rng, max_levels=5)
        assert space.is_feasible(genome)


@pytest.mark.parametrize("function", [level_switch, segment_transfer, shift_window, swap_stages])
def test_a_single_visited_stage_stays_as_it_is(function: Callable[..., tuple[Genome]]) -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(3), 8, 0.5, (0, 5, 0))
    assert function(Genome([0, 4, 0]), space=space, rng=np.random.default_rng(0)) == ([0, 4, 0],)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (level_switch, "max_moves", 0),
        (level_switch, "max_levels", 0),
        (level_switch, "max_levels", 1.5),
        (shift_window, "max_shift", 0),
        (level_step, "max_levels", 0),
        (segment_transfer, "max_length", 0),
        (segment_transfer, "max_levels", -1),
    ],
)
def test_wrong_parameters_are_refused(function: Callable[..., tuple[Genome]], name: str, value: Any) -> None:
    with pytest.raises(DiffesError, match=rf"{name} must be .*got {value}"):
        function(Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(0), **{name: value})


def test_swap_stages_exchanges_two_levels_that_differ() -> None:
    found = set()
    for seed in range(300):
        (child,) = swap_stages(Genome(RAMP), space=PAPER, rng=np.random.default_rng(seed))
        changed = [s for s in range(10) if child[s] != RAMP[s]]
        assert len(changed) == 2
        i, j = changed
        assert (child[i], child[j]) == (RAMP[j], RAMP[i])
        found.add((i, j))
    assert found == set(itertools.combinations(range(10), 2)) - {(4, 5)}
    assert swap_stages(Genome(PAPER.uniform()), space=PAPER, rng=np.random.default_rng(0)) == (PAPER.uniform(),)


def test_shift_window_rotates_a_window() -> None:
    shifts: set[int] = set()
    for seed in range(100):
        (child,) = shift_window(Genome(RAMP), space=PAPER, rng=np.random.default_rng(seed), max_shift=3)
        rotations = [
            (last - first, shift)
            for first, last in itertools.combinations(range(10), 2)
            for shift in (-3, -2, -1, 1, 2, 3)
            if child == [*RAMP[:first], *np.roll(RAMP[first : last + 1], shift).tolist(), *RAMP[last + 1 :]]
        ]
        assert rotations, child
        shifts.update(shift for _, shift in rotations)
    assert shifts == {-3, -2, -1, 1, 2, 3}


def test_level_step_changes_the_cost_of_one_stage() -> None:
    steps = set()
    for seed in range(200):
        (child,) = level_step(Genome([8] * 10), space=FREE, rng=np.random.default_rng(seed), max_levels=3)
        (change,) = [b - 8 for b in child if b != 8]
        steps.add(change)
    assert steps == {-3, -2, -1, 1, 2, 3}


def test_level_step_stays_within_the_levels() -> None:
    for seed in range(40):
        for end in (0, 16):
            (child,) = level_step(Genome([end] * 10), space=FREE, rng=np.random.default_rng(seed), max_levels=5)
            assert FREE.is_feasible(child) and sum(level != end for level in child) <= 1


def test_segment_transfer_thickens_one_segment_and_thins_another() -> None:
    lengths, amounts = set(), set()
    reached: dict[int, set[int]] = {1: set(), 2: set(), 3: set()}
    for seed in range(200):
        (child,) = segment_transfer(Genome([8] * 10), space=PAPER, rng=np.random.default_rng(seed))
        change = [b - 8 for b in child]
        down, up = ([s for s, c in enumerate(change) if c * sign > 0] for sign in (-1, 1))
        for segment in (down, up):
            assert segment == list(range(segment[0], segment[0] + len(segment)))
        (amount,) = {abs(c) for c in change if c}
        assert len(down) == len(up)
        lengths.add(len(down))
        amounts.add(amount)
        reached[len(down)].update(down)
    assert (lengths, amounts) == ({1, 2, 3}, {1, 2})
    assert all(stages == set(range(10)) for stages in reached.values())


def test_segments_of_a_transfer_are_at_most_half_of_the_stages() -> None:
    space = SearchSpace.mean_sparsity(Stages.equal(5), 8, 0.5)
    lengths = set()
    for seed in range(100):
        (child,) = segment_transfer(
            Genome([4] * 5), space=space, rng=np.random.default_rng(seed), max_length=9, max_levels=1
        )
        lengths.add(sum(level < 4 for level in child))
    assert lengths == {1, 2}
