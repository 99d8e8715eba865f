"""Measurements as values: a candidate on held-out probes, and a run with its rivals."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter

from diffes.errors import DiffesError
from diffes.forms import AGAIN, Text, parsed
from diffes.results.frames import dataframe
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Plan, Schedule

T = TypeVar("T")
UNIFORM, FEWER_STEPS = "uniform", "dense, fewer steps"  # rivals of schedules


@dataclass(frozen=True)
class Candidate:
    """Schedule, plan, or dense model at a number of steps, and its measurements on held-out probes.

    Args:
        steps: sampling steps.
        levels: (S,) levels of the schedule, or of the calls of a plan; None for the dense model.
        heldout_mean: mean score over the held-out probes; None if a probe failed.
        heldout_std: standard deviation of the score; None if a probe failed.
        nominal_sparsity: removed fraction of the prunable parameters, averaged over steps.
        macs_fraction: MACs of the whole denoiser over the run, as a fraction of the dense model's at all steps.
        search: fitness on the search's own probes; None if it was not measured.
        ms: median milliseconds of a whole run; None if it was not timed.
        cost: cost in the currency of the budget: of a schedule as a fraction of the dense model's, of a plan in dense
            calls; None if it was not recorded.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    steps: Annotated[int, Field(ge=1)]
    levels: tuple[int, ...] | None
    heldout_mean: float | None
    heldout_std: float | None
    nominal_sparsity: float
    macs_fraction: Annotated[float, Field(ge=0)]
    search: float | None = None
    ms: float | None = None
    cost: float | None = None


def _routed(data: Any) -> Any:
    """Return the schedule or plan that `to_json` wrote; anything else as it is."""
    if not isinstance(data, Mapping):
        return data
    try:
        return (Plan if "timesteps" in data else Schedule).from_json(data)
    except DiffesError as error:
        raise ValueError(str(error)) from error


def _plain(value: Any) -> Any:
    """Return the value of a setting, whose text is safe to print."""
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("a setting has no control characters")
    return value


Routed = Annotated[Schedule | Plan, BeforeValidator(_routed), PlainSerializer(lambda routed: routed.to_json())]


@dataclass(frozen=True)
class RunRecord:
    """Record of one search: its result beside its rivals at the same cost.

    Args:
        settings: settings of the run, a `RunConfig` as JSON.
        versions: versions of the libraries.
        found: the schedule or plan found.
        searched: measurements of what was found.
        rivals: measurements of what else the same cost buys, by name: for schedules, the uniform schedule of the same
            budget, and the dense model at the number of steps that costs as many MACs; for plans, evenly spaced dense
            calls of DPM-Solver++ 2M and of the best solver of diffusers.
        evaluations: number of distinct evaluations.
        denoiser_calls: denoiser calls of the search, in rows, including those that measured facts for its strategy, and
            those of the final fit.
        seconds: seconds of evaluation.
        curve: (denoiser calls, best fitness) wherever the best so far rose, and at the end.
        calibration_calls: denoiser calls of the calibration, in rows; 0 if they were not recorded.
        above: the same search at a higher budget, if this one found a schedule cheaper than its own.
        calibration_seed: seed of the calibration, which cells of one command share; None in a run of its own, and if it
            was not recorded.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    settings: Mapping[Text, Annotated[Any, AfterValidator(_plain)]]
    versions: Mapping[Text, Text]
    found: Routed
    searched: Candidate
    rivals: Mapping[str, Candidate]
    evaluations: int
    denoiser_calls: int
    seconds: float
    curve: tuple[tuple[int, float], ...] = ()
    calibration_calls: int = 0
    above: RunRecord | None = None
    calibration_seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return nested plain values: a line of `cells.jsonl`."""
        found: dict[str, Any] = _form_of(RunRecord).dump_python(self, mode="json")
        return found

    @classmethod
    def from_json(cls, row: Mapping[str, Any], place: object = "the record") -> RunRecord:
        """Read the record that `to_json` wrote, or one of the flat rows of older versions.

        Args:
            row: the record.
            place: name of its file or line, for messages.

        Raises:
            DiffesError: the row is not a record.
        """
        try:
            row = row if "rivals" in row else _nested(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise DiffesError(f"{place} is no record of a search ({type(error).__name__} {error})") from error
        record: RunRecord = parsed(_form_of(RunRecord), row, place)
        return record

    def named(self, model: str) -> RunRecord:
        """Return the same record of a model that has another name."""
        return replace(self, settings={**self.settings, "model": model})

    def to_row(self) -> dict[str, Any]:
        """Return every setting and every measurement under a name of its own: a line of a table.

        The settings keep their names. Measurements of the result have the names of `Candidate`, those of a rival begin
        with its name; where a setting has the same name, the measurement ends with `_found`.
        """
        row = dict(self.settings)

        def add(name: str, value: Any) -> None:
            row[f"{name}_found" if name in self.settings else name] = value

        for name, value in self.found.to_json().items():
            add({"stages": "stage_ranges"}.get(name, name), value)
        for candidate, prefix in [(self.searched, ""), *((rival, f"{name} ") for name, rival in self.rivals.items())]:
            for name, value in asdict(candidate).items():
                if not (name == "levels" and not prefix):
                    add(f"{prefix}{name}".replace(", ", "_").replace(" ", "_").replace("-", "_"), value)
        for name in ("evaluations", "denoiser_calls", "seconds", "calibration_calls"):
            add(name, getattr(self, name))
        return row


@functools.cache
def _form_of(record: type[T]) -> TypeAdapter[T]:
    """Return the form of a record: pydantic reads it, writes it, and checks types and ranges."""
    return TypeAdapter(record)


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat row of an older version, of a schedule, in today's form.

    Values of the rivals that it lacks are None; a missing sparsity of uniform is that of the schedule found.

    Raises:
        KeyError: the row is not a record.
    """
    steps, fewer = row["settings"]["steps"], row["fewer_steps"]
    searched = {
        "steps": steps, "levels": row["levels"], "heldout_mean": row["heldout"], "heldout_std": row["heldout_std"],
        "nominal_sparsity": row["nominal_sparsity"], "macs_fraction": row["macs"], "search": row["search"],
        "cost": row.get("cost_fraction"),
    }  # fmt: skip
    uniform = {
        "steps": steps, "levels": row.get("uniform_levels") or None, "heldout_mean": row["uniform_heldout"],
        "heldout_std": row.get("uniform_heldout_std"),
        "nominal_sparsity": row.get("uniform_sparsity", row["nominal_sparsity"]),
        "macs_fraction": row["uniform_macs"], "cost": row.get("uniform_cost_fraction"),
    }  # fmt: skip
    dense = {
        "steps": fewer, "levels": None, "heldout_mean": row["fewer_steps_heldout"],
        "heldout_std": row.get("fewer_steps_heldout_std"), "nominal_sparsity": 0.0, "macs_fraction": fewer / steps,
    }  # fmt: skip
    kept = ("settings", "versions", "evaluations", "denoiser_calls", "seconds", "curve")
    return {
        **{name: row[name] for name in kept},
        "found": {name: row[name] for name in ("stages", "levels", "max_level")},
        "searched": searched,
        "rivals": {UNIFORM: uniform, FEWER_STEPS: dense},
        "calibration_calls": row.get("calibration_calls", 0),
        "above": _nested(row["above"]) if row.get("above") else None,
    }


@dataclass(frozen=True)
class Timing:
    """Conditions under which whole runs from noise to pixels were timed, all candidates taking turns.

    Args:
        dense_ms: median milliseconds of the dense model at all steps.
        batch: images per run.
        repeats: runs of each candidate.
        device: name of the device.
        threads: torch threads on the CPU.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    dense_ms: Annotated[float, Field(gt=0)]
    batch: Annotated[int, Field(ge=1)]
    repeats: Annotated[int, Field(ge=1)]
    device: Text
    threads: Annotated[int, Field(ge=1)]

    def speedup(self, candidate: Candidate) -> float:
        """Return the speed-up of a timed candidate over the dense model."""
        assert candidate.ms is not None
        return self.dense_ms / candidate.ms


@dataclass(frozen=True)
class Report:
    """Report of a finished run: the content of `report.json`.

    Args:
        run: record of the search, with its candidates timed.
        timing: conditions of the timing.
        prunable_fraction: share of the denoiser's parameters that the last level removes.
        bank_bytes: size of the bank on disk.
        front: candidates along the front of fitness and cost, by label; empty for strategies that search no front.
        paid_calls: denoiser calls of the search that workers really ran; None unless workers ran all evaluations.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    run: RunRecord
    timing: Timing
    prunable_fraction: float
    bank_bytes: int
    front: Mapping[str, Sequence[Candidate]]
    paid_calls: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return nested plain values: the content of `report.json`."""
        found: dict[str, Any] = _form_of(Report).dump_python(self, mode="json")
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any], facts: Mapping[str, Any], place: object = "the report") -> Report:
        """Read the report that `to_json` wrote, or one of older versions, which named their candidates otherwise.

        Args:
            data: the report.
            facts: content of the `schedule.json` beside it, which completes an old report.
            place: name of its file, for messages.

        Raises:
            DiffesError: the data are not a report.
        """
        try:
            data = data if "run" in data else _older_report(data, facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise DiffesError(f"{place} is no report ({type(error).__name__} {error}); {AGAIN}") from error
        report: Report = parsed(_form_of(Report), data, place)
        return report

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame: a row for the schedule found, its rivals, and each point of the front.

        Raises:
            DiffesError: pandas is not installed.
        """
        named = [("searched", self.run.searched), *self.run.rivals.items()]
        named += [(f"front, {label}", each) for label, candidates in self.front.items() for each in candidates]
        return dataframe([{"name": name, **asdict(candidate)} for name, candidate in named])


def _older_report(data: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report of an older version in today's form. Its run has no curve.

    Raises:
        KeyError: the data are not a report.
    """
    steps, latency, fitness = facts["steps"], data["latency"], data["fitness"]
    settings = {name: data[name] for name in ("model", "method", "metric", "strategy", "seed")}
    settings |= {name: facts[name] for name in ("steps", "guidance", "dtype")} | {"heldout": fitness["n_heldout"]}

    def candidate(row: Mapping[str, Any], ms: str = "", **more: Any) -> dict[str, Any]:
        scores = {"heldout_mean": row["heldout_mean"], "heldout_std": row.get("heldout_std")}
        known = {"steps": row.get("steps", steps), "levels": row.get("levels"), **scores, "search": row.get("search")}
        measured = {name: row.get(name, 0.0) for name in ("nominal_sparsity", "macs_fraction")}
        return {**known, **measured, "ms": latency[ms] if ms else None, **more}

    found = {name: data[name] for name in ("levels", "nominal_sparsity", "macs_fraction")}
    baselines = data["baselines"]
    run = {
        "settings": settings,
        "versions": {},
        "found": {"stages": facts["stages"], "levels": data["levels"], "max_level": facts["max_level"]},
        "searched": candidate({**fitness, **found}, "routed_ms"),
        "rivals": {
            UNIFORM: candidate(baselines["uniform"], "uniform_ms"),
            FEWER_STEPS: candidate(baselines["fewer_steps"], "fewer_steps_ms"),
        },
        **{name: data[name] for name in ("evaluations", "denoiser_calls")},
        "seconds": data["search_seconds"],
        "calibration_calls": data.get("calibration_calls", 0),
    }
    return {
        "run": run,
        "timing": {name: latency[name] for name in ("dense_ms", "batch", "repeats", "device", "threads")},
        "front": {label: [candidate(row) for row in rows] for label, rows in data.get("front", {}).items()},
        "prunable_fraction": data["prunable_fraction"],
        "bank_bytes": data["bank_bytes"],
        "paid_calls": data.get("paid_calls"),
    }


def rises(result: SearchResult) -> tuple[tuple[int, float], ...]:
    """Return (denoiser calls, best fitness so far) wherever the best of a search rose, and at its end."""
    pairs = zip(result.calls(), result.curve(), strict=True)
    curve = [(calls, float(f"{best:.7g}")) for calls, best in pairs if best > -math.inf]
    found = [point for i, point in enumerate(curve) if i == 0 or point[1] > curve[i - 1][1]]
    return tuple([*found, curve[-1]] if curve and found[-1] != curve[-1] else found)
