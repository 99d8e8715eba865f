from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffes.adapters import GroupSet
from diffes.pruning.allocation import Rungs, allocate

H = 4


def sets_of(rng: np.random.Generator, n: int, finer: int = 1) -> list[Rungs[GroupSet]]:
    made = []
    for i in range(n):
        groups = GroupSet(f"layer{i}", int(rng.choice([2, 4, 8])), 1, ("in",), ("out",))
        made.append(Rungs.of(groups, H, float(rng.integers(1, 50)), finer))
    return made


def sensitivity_of(rng: np.random.Generator, sets: list[Rungs[GroupSet]]) -> list[np.ndarray]:
    return [np.concatenate([[0.0], np.cumsum(rng.random(len(rungs.kept) - 1) ** 3)]) for rungs in sets]


def saved(sets: list[Rungs[GroupSet]], split: list[int]) -> float:
    return sum(float(rungs.saved[rung]) for rungs, rung in zip(sets, split, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_split_is_the_best_of_all_that_save_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = sets_of(rng, 4)
    sensitivity = sensitivity_of(rng, sets)
    found = allocate(sets, sensitivity)
    assert len(found) == H + 1
    for level, split in enumerate(found):
        wanted = saved(sets, [rungs.equal(level) for rungs in sets])
        assert saved(sets, split) >= wanted - 1e-9
        if 0 < level < H:  # those two are the ends: all dense, all gone
            every = itertools.product(*(range(len(rungs.kept)) for rungs in sets))
            least = min(
                sum(costs[rung] for costs, rung in zip(sensitivity, split, strict=True))
                for split in every
                if saved(sets, list(split)) >= wanted * (1 + 1e-3)
            )
            assert sum(costs[rung] for costs, rung in zip(sensitivity, split, strict=True)) <= least + 1e-12


def test_the_least_sensitive_gives_most() -> None:
    groups = [GroupSet(name, 8, 1, ("in",), ("out",)) for name in ("free", "dear")]
    sets = [Rungs.of(each, H, 1.0) for each in groups]
    sensitivity = [np.zeros(5), np.array([0.0, 10.0, 20.0, 30.0, 40.0])]
    splits = allocate(sets, sensitivity)
    assert splits[0] == [0, 0] and splits[4] == [4, 4]
    assert splits[1] == [2, 0] and splits[2] == [4, 0] and splits[3] == [4, 2]


def test_an_equal_split_that_is_no_more_sensitive_is_kept() -> None:
    sets = sets_of(np.random.default_rng(0), 3)
    sensitivity = [np.zeros(len(rungs.kept)) for rungs in sets]
    assert allocate(sets, sensitivity) == [[rungs.equal(level) for rungs in sets] for level in range(H + 1)]


def test_rungs_hold_every_level_and_finer_ones_between() -> None:
    heads = GroupSet("attn", 4, 8, ("q", "k", "v"), ("out",), attention="attn")
    channels = GroupSet("ff", 64, 1, ("in",), ("out",))
    assert Rungs.of(heads, H, 2.0).kept == (4, 3, 2, 1, 0)
    assert Rungs.of(heads, H, 2.0, finer=2).kept == (4, 3, 2, 1, 0)  # there are no halves of heads
    assert Rungs.of(channels, H, 2.0, finer=2).kept == (64, 56, 48, 40, 32, 24, 16, 8, 0)
    assert Rungs.of(channels, H, 2.0, finer=2).equal(1) == 2
    assert Rungs.of(channels, H, 2.0).saved.tolist() == [0, 32, 64, 96, 128]
