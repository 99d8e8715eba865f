"""Records go to JSON and come back whole; rows of older versions are read."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.results import record
from diffes.results.record import Candidate, Report, RunRecord, Timing, rises
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Plan, Schedule, Stages
from diffes.spaces.strategy import Evaluation

SCHEDULE = Schedule(Stages.equal(2), (3, 1), 4)
SEARCHED = Candidate(20, (3, 1), 0.61, 0.02, 0.5, 0.55, search=0.63)
UNIFORM = Candidate(20, (2, 2), 0.51, 0.03, 0.45, 0.57)
FEWER = Candidate(11, None, 0.41, 0.04, 0.0, 0.55)
RECORD = RunRecord(
    RunConfig(seed=7).to_json(), {"torch": "2.8"}, SCHEDULE, SEARCHED,
    {record.UNIFORM: UNIFORM, record.FEWER_STEPS: FEWER}, 9, 1234, 5.25, ((100, 0.5), (1234, 0.63)),
)  # fmt: skip


def through_json(made: RunRecord) -> RunRecord:
    return RunRecord.from_json(json.loads(json.dumps(made.to_json())))


def test_a_run_comes_back_from_json_as_it_was() -> None:
    assert through_json(RECORD) == RECORD


def test_a_failed_run_comes_back_too() -> None:
    failed = replace(SEARCHED, heldout_mean=None, heldout_std=None, search=None)
    assert through_json(replace(RECORD, searched=failed)).searched == failed


def test_a_plan_comes_back_with_its_coefficients() -> None:
    plan = Plan(Stages.equal(2), ((900, 0), (300, 2)), 4, "fitted", ((0.5, 0.5), (0.25, 0.5, 0.125)))
    made = through_json(replace(RECORD, found=plan, rivals={"dense": FEWER}))
    assert made.found == plan and made.rivals == {"dense": FEWER}


OLD = {  # a row of the first version
    "settings": {"steps": 20, "stages": 2}, "versions": {"torch": "2.8"}, "stages": [[0, 500], [500, 1000]],
    "levels": [3, 1], "max_level": 4, "heldout": 0.61, "heldout_std": 0.02, "search": 0.63, "uniform_heldout": 0.51,
    "fewer_steps": 11, "fewer_steps_heldout": 0.41, "nominal_sparsity": 0.5, "macs": 0.55, "uniform_macs": 0.57,
    "evaluations": 9, "denoiser_calls": 1234, "seconds": 5.25, "curve": [[100, 0.5], [1234, 0.63]],
}  # fmt: skip


def test_rows_of_older_versions_lack_the_rivals_details() -> None:
    old = RunRecord.from_json(OLD)
    assert (old.searched, old.found, old.curve) == (SEARCHED, SCHEDULE, RECORD.curve)
    assert old.rivals[record.UNIFORM] == replace(UNIFORM, levels=None, heldout_std=None, nominal_sparsity=0.5)
    assert old.rivals[record.FEWER_STEPS] == replace(FEWER, heldout_std=None)
    with pytest.raises(DiffesError, match=r"line 3 is no record of a search \(KeyError 'heldout'\)"):
        RunRecord.from_json({name: value for name, value in OLD.items() if name != "heldout"}, "line 3")
    with pytest.raises(DiffesError, match="evaluations: it should be a valid integer, got 'many'"):
        RunRecord.from_json(OLD | {"evaluations": "many"})


def test_every_setting_and_every_measurement_has_a_name_of_its_own() -> None:
    row = RECORD.to_row()
    assert {name: row[name] for name in RECORD.settings} == RECORD.settings
    assert (row["heldout"], row["heldout_mean"], row["uniform_heldout_mean"]) == (64, 0.61, 0.51)
    assert (row["stages"], row["stage_ranges"], row["dense_fewer_steps_steps"]) == (10, [[0, 500], [500, 1000]], 11)
    assert (row["cost"], row["cost_found"], row["levels"]) == ("auto", None, [3, 1])


def a_report() -> Report:
    """A report whose numbers are all different."""
    kept = ("model", "method", "metric", "strategy", "seed", "steps", "guidance", "dtype", "heldout")
    run = replace(
        RECORD,
        settings={name: RECORD.settings[name] for name in kept},
        versions={},
        searched=replace(SEARCHED, ms=6.0, cost=None),
        rivals={
            record.UNIFORM: replace(UNIFORM, search=0.52, ms=7.0, cost=None),
            record.FEWER_STEPS: replace(FEWER, nominal_sparsity=0.0, ms=8.0),
        },
        curve=(),
    )
    front = {
        "searched": [Candidate(20, (4, 4), 0.2, None, 0.0, 0.1, 0.25), Candidate(20, (0, 0), None, None, 0.0, 1.0)],
        "dense, fewer steps": [Candidate(5, None, 0.3, None, 0.0, 0.25)],
    }
    return Report(run, Timing(12.0, 16, 5, "cpu", 2), 0.33, 4096, front)


def test_a_report_comes_back_from_json_as_it_was() -> None:
    report = a_report()
    assert Report.from_json(json.loads(json.dumps(report.to_json())), {}) == report


def test_a_report_of_an_older_version_is_read() -> None:
    report = a_report()
    run, facts = report.run, {"steps": 20, "guidance": 2.0, "dtype": "float32", **SCHEDULE.to_json()}

    def scores(candidate: Candidate) -> dict[str, object]:
        return {"heldout_mean": candidate.heldout_mean, "heldout_std": candidate.heldout_std}

    uniform, fewer = run.rivals[record.UNIFORM], run.rivals[record.FEWER_STEPS]
    old = {
        **{name: run.settings[name] for name in ("model", "method", "metric", "strategy", "seed")},
        "levels": list(run.found.levels), "nominal_sparsity": run.searched.nominal_sparsity,
        "macs_fraction": run.searched.macs_fraction, "prunable_fraction": 0.33, "evaluations": run.evaluations,
        "denoiser_calls": run.denoiser_calls, "search_seconds": run.seconds,
        "calibration_calls": run.calibration_calls, "bank_bytes": 4096,
        "fitness": {"search": run.searched.search, **scores(run.searched), "n_heldout": run.settings["heldout"]},
        "baselines": {
            "uniform": {
                "levels": list(uniform.levels or ()), "search": 0.52, "nominal_sparsity": uniform.nominal_sparsity,
                "macs_fraction": uniform.macs_fraction, **scores(uniform),
            },
            "fewer_steps": {"steps": fewer.steps, "macs_fraction": fewer.macs_fraction, **scores(fewer)},
        },
        "latency": {
            "routed_ms": 6.0, "uniform_ms": 7.0, "fewer_steps_ms": 8.0, "dense_ms": 12.0, "batch": 16, "repeats": 5,
            "device": "cpu", "threads": 2,
        },
        "front": {
            "searched": [
                {"levels": [4, 4], "search": 0.25, "macs_fraction": 0.1, "heldout_mean": 0.2},
                {"levels": [0, 0], "search": None, "macs_fraction": 1.0, "heldout_mean": None},
            ],
            "dense, fewer steps": [{"steps": 5, "macs_fraction": 0.25, "heldout_mean": 0.3}],
        },
    }  # fmt: skip
    found = Report.from_json(old, facts)
    assert replace(found.run.searched, cost=None) == report.run.searched
    assert found == report
    with pytest.raises(DiffesError, match="is no report"):
        Report.from_json({name: value for name, value in old.items() if name != "latency"}, facts, "report.json")
    with pytest.raises(DiffesError, match="batch: it should be greater than or equal to 1, got 0"):
        Report.from_json(old | {"latency": old["latency"] | {"batch": 0}}, facts)  # type: ignore[operator]


def test_speedups_are_those_of_the_dense_model_over_each_candidate() -> None:
    report = a_report()
    candidates = [report.run.searched, report.run.rivals[record.UNIFORM], report.run.rivals[record.FEWER_STEPS]]
    assert [report.timing.speedup(each) for each in candidates] == [2.0, 12 / 7, 1.5]


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
    made = replace(RECORD, searched=replace(SEARCHED, cost=0.5), above=above)
    assert through_json(made) == made
