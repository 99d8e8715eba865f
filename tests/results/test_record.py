"""Records go to JSON and come back whole; rows of older versions are read."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from diffes.config import RunConfig
from diffes.results.record import Candidate, Report, RunRecord, Timing, rises
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.strategy import Evaluation

SCHEDULE = Schedule(Stages.equal(2), (3, 1), 4)
SEARCHED = Candidate(20, (3, 1), 0.61, 0.02, 0.5, 0.55, search=0.63)
UNIFORM = Candidate(20, (2, 2), 0.51, 0.03, 0.45, 0.57)
FEWER = Candidate(11, None, 0.41, 0.04, 0.0, 0.55)
RECORD = RunRecord(
    RunConfig(seed=7).to_json(), {"torch": "2.8"}, SCHEDULE, SEARCHED, UNIFORM, FEWER, 9, 1234, 5.25,
    ((100, 0.5), (1234, 0.63)),
)  # fmt: skip


def through_json(record: RunRecord) -> RunRecord:
    return RunRecord.from_json(json.loads(json.dumps(record.to_json())))


def test_a_run_comes_back_from_json_as_it_was() -> None:
    assert through_json(RECORD) == RECORD


def test_a_failed_run_comes_back_too() -> None:
    failed = replace(SEARCHED, heldout_mean=None, heldout_std=None, search=None)
    assert through_json(replace(RECORD, searched=failed)).searched == failed


def test_rows_of_older_versions_lack_the_rivals_details() -> None:
    row = RECORD.to_json()
    for name in ("uniform_levels", "uniform_heldout_std", "uniform_sparsity", "fewer_steps_heldout_std"):
        del row[name]
    old = RunRecord.from_json(row)
    assert old.searched == SEARCHED
    assert old.uniform == replace(UNIFORM, levels=None, heldout_std=None, nominal_sparsity=0.5)
    assert old.fewer_steps == replace(FEWER, heldout_std=None)
    del row["heldout"]
    with pytest.raises(KeyError):
        RunRecord.from_json(row)


def a_report() -> tuple[Report, dict[str, object]]:
    """A report whose numbers are all different, and what `schedule.json` says beside the schedule."""
    kept = ("model", "method", "metric", "strategy", "seed", "steps", "guidance", "dtype", "heldout")
    settings = {name: RECORD.settings[name] for name in kept}
    run = replace(
        RECORD,
        settings=settings,
        versions={},
        searched=replace(SEARCHED, ms=6.0),
        uniform=replace(UNIFORM, search=0.52, ms=7.0),
        fewer_steps=replace(FEWER, ms=8.0),
        curve=(),
    )
    front = {
        "searched": [Candidate(20, (4, 4), 0.2, None, 0.0, 0.1, 0.25), Candidate(20, (0, 0), None, None, 0.0, 1.0)],
        "dense, fewer steps": [Candidate(5, None, 0.3, None, 0.0, 0.25)],
    }
    report = Report(run, Timing(12.0, 16, 5, "cpu", 2), 0.33, 4096, front)
    return report, {"steps": 20, "guidance": 2.0, "dtype": "float32"}


def test_a_report_comes_back_from_json_as_it_was() -> None:
    report, facts = a_report()
    assert Report.from_json(json.loads(json.dumps(report.to_json())), SCHEDULE, facts) == report


def test_speedups_are_those_of_the_dense_model_over_each_candidate() -> None:
    data = a_report()[0].to_json()
    rivals = data["baselines"]
    assert (data["latency"]["speedup"], rivals["uniform"]["speedup"], rivals["fewer_steps"]["speedup"]) == (
        2.0, 12 / 7, 1.5,
    )  # fmt: skip


def test_the_curve_has_the_points_where_the_best_rose_and_the_last_one() -> None:
    fitness = [-math.inf, 1.0, 0.5, 2.0, 2.0]
    evaluations = tuple(
        Evaluation(Schedule(Stages.equal(2), (i, 0), 4), value, denoiser_calls=10) for i, value in enumerate(fitness)
    )
    result = SearchResult(evaluations[3], evaluations, (True,) * 5, 50, 1.0)
    assert rises(result) == ((20, 1.0), (40, 2.0), (50, 2.0))
    first = SearchResult(evaluations[1], evaluations[:2], (True,) * 2, 20, 1.0)
    assert rises(first) == ((20, 1.0),)


def test_what_a_record_costs_and_the_search_above_come_back() -> None:
    above = replace(RECORD, searched=replace(SEARCHED, cost=0.6))
    record = replace(RECORD, searched=replace(SEARCHED, cost=0.5), uniform=replace(UNIFORM, cost=0.4), above=above)
    assert RunRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
