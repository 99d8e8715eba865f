"""Stages and Schedule: which timestep belongs where, and what a schedule refuses."""

from __future__ import annotations

import json

import pytest

from diffes.errors import DiffesError
from diffes.spaces.schedule import Schedule, Stages


def test_equal_stages_are_the_papers_ranges() -> None:
    stages = Stages.equal(10)
    assert stages.ranges[0] == (0, 100)
    assert stages.ranges[9] == (900, 1000)
    assert Stages.equal(3).ranges == ((0, 333), (333, 666), (666, 1000))


@pytest.mark.parametrize("n_stages", [1, 3, 7, 10, 1000])
def test_each_timestep_lies_in_the_range_of_its_stage(n_stages: int) -> None:
    stages = Stages.equal(n_stages)
    for timestep in range(1000):
        lo, hi = stages.ranges[stages.stage_of(timestep)]
        assert lo <= timestep < hi


def test_fractional_and_outlying_timesteps_have_a_stage() -> None:
    stages = Stages.equal(10)
    assert stages.stage_of(99.99) == 0
    assert stages.stage_of(100.0) == 1
    assert stages.stage_of(-1) == 0
    assert stages.stage_of(1000) == 9


def test_count_steps() -> None:
    assert Stages.equal(4).count_steps([999, 750, 500, 250.5, 0]) == (1, 1, 1, 2)


@pytest.mark.parametrize(
    "stages", [(), ((1, 5),), ((0, 5), (6, 9)), ((0, 5), (4, 9)), ((0, 0),), ((0, 5), (5, 5)), ((5, 9), (0, 5))]
)
def test_stages_that_are_not_contiguous_are_refused(stages: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(DiffesError, match=r"[Ss]tage"):
        Stages(stages)


@pytest.mark.parametrize("n_stages", [0, -1, 1001])
def test_a_wrong_number_of_stages_is_refused(n_stages: int) -> None:
    with pytest.raises(DiffesError, match=rf"n_stages must be in \[1, 1000\], got {n_stages}"):
        Stages.equal(n_stages)


@pytest.mark.parametrize("levels", [(0, 1), (0, 1, 2, 3), (0, 1, 9), (0, -1, 2), (0, 1, 2.0), (0, 1, True)])
def test_wrong_levels_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(DiffesError, match="level"):
        Schedule(Stages.equal(3), levels, 8)


def test_nominal_sparsity_is_weighted_by_steps() -> None:
    schedule = Schedule(Stages.equal(2), (8, 0), 8)
    assert schedule.nominal_sparsity([1, 1]) == 0.5
    assert schedule.nominal_sparsity([1, 3]) == 0.25


def test_json_round_trip() -> None:
    schedule = Schedule(Stages.equal(3), (0, 4, 8), 8)
    text = json.dumps(schedule.to_json() | {"fitness": 0.5})
    assert Schedule.from_json(json.loads(text)) == schedule


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages", None),
        ("stages", [[0, 1, 2], [2, 3, 4]]),
        ("stages", [["a", "b"], ["c", "d"]]),
        ("levels", 3),
        ("levels", [0, "x"]),
        ("max_level", "many"),
        ("max_level", None),
    ],
)
def test_broken_json_is_refused(key: str, value: object) -> None:
    data = Schedule(Stages.equal(2), (0, 4), 8).to_json()
    with pytest.raises(DiffesError):
        Schedule.from_json(data | {key: value})
    with pytest.raises(DiffesError):
        Schedule.from_json({k: v for k, v in data.items() if k != key})
