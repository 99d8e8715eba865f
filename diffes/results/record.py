"""Measurements as values: a candidate on held-out probes, and a run with its rivals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Schedule


@dataclass(frozen=True)
class Candidate:
    """Schedule, or dense model at a number of steps, and its measurements on held-out probes.

    Args:
        steps: sampling steps.
        levels: (S,) levels of the schedule; None for the dense model.
        heldout_mean: mean score over the held-out probes; None if a probe failed.
        heldout_std: standard deviation of the score; None if a probe failed.
        nominal_sparsity: removed fraction of the prunable parameters, averaged over steps.
        macs_fraction: MACs of the whole denoiser over the run, as a fraction of the dense model's at all steps.
        search: fitness on the search's own probes; None if it was not measured.
        ms: median milliseconds of a whole run; None if it was not timed.
        cost: cost in the currency of the budget, as a fraction of the dense model's; None if it was not recorded.
    """

    steps: int
    levels: tuple[int, ...] | None
    heldout_mean: float | None
    heldout_std: float | None
    nominal_sparsity: float
    macs_fraction: float
    search: float | None = None
    ms: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """Record of one search: its result beside its rivals at the same cost.

    Args:
        settings: settings of the run, a `RunConfig` as JSON.
        versions: versions of the libraries.
        schedule: the schedule found.
        searched: measurements of the schedule found.
        uniform: measurements of the uniform schedule of the same budget.
        fewer_steps: measurements of the dense model at the number of steps that costs as many MACs as the schedule
            found.
        evaluations: number of distinct evaluations.
        denoiser_calls: denoiser calls of the search, in rows, including those that measured facts for its strategy.
        seconds: seconds of evaluation.
        curve: (denoiser calls, best fitness) wherever the best so far rose, and at the end.
        calibration_calls: denoiser calls of the calibration, in rows; 0 if they were not recorded.
        above: the same search at a higher budget, if this one found a schedule cheaper than its own.
    """

    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    schedule: Schedule
    searched: Candidate
    uniform: Candidate
    fewer_steps: Candidate
    evaluations: int
    denoiser_calls: int
    seconds: float
    curve: tuple[tuple[int, float], ...] = ()
    calibration_calls: int = 0
    above: RunRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a flat object: a line of `cells.jsonl`."""
        return {
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            **self.schedule.to_json(),
            "heldout": self.searched.heldout_mean,
            "heldout_std": self.searched.heldout_std,
            "search": self.searched.search,
            "uniform_levels": list(self.uniform.levels or ()),
            "uniform_heldout": self.uniform.heldout_mean,
            "uniform_heldout_std": self.uniform.heldout_std,
            "uniform_sparsity": self.uniform.nominal_sparsity,
            "fewer_steps": self.fewer_steps.steps,
            "fewer_steps_heldout": self.fewer_steps.heldout_mean,
            "fewer_steps_heldout_std": self.fewer_steps.heldout_std,
            "nominal_sparsity": self.searched.nominal_sparsity,
            "macs": self.searched.macs_fraction,
            "uniform_macs": self.uniform.macs_fraction,
            "cost_fraction": self.searched.cost,
            "uniform_cost_fraction": self.uniform.cost,
            "evaluations": self.evaluations,
            "denoiser_calls": self.denoiser_calls,
            "seconds": round(self.seconds, 2),
            "calibration_calls": self.calibration_calls,
            "curve": [[calls, float(f"{value:.7g}")] for calls, value in self.curve],
            "above": self.above.to_json() if self.above else None,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RunRecord:
        """Build the record from the output of `to_json`.

        Values of the rivals that rows of older versions lack are None; a missing sparsity of uniform is that of the
        schedule found.

        Raises:
            KeyError: the row is not a record.
            DiffesError: the row holds no valid schedule.
        """
        steps, schedule = row["settings"]["steps"], Schedule.from_json(row)
        fewer = row["fewer_steps"]
        return cls(
            settings=row["settings"],
            versions=row["versions"],
            schedule=schedule,
            searched=Candidate(
                steps, schedule.levels, row["heldout"], row["heldout_std"], row["nominal_sparsity"], row["macs"],
                row["search"], cost=row.get("cost_fraction"),
            ),
            uniform=Candidate(
                steps, tuple(row.get("uniform_levels") or ()) or None, row["uniform_heldout"],
                row.get("uniform_heldout_std"), row.get("uniform_sparsity", row["nominal_sparsity"]),
                row["uniform_macs"], cost=row.get("uniform_cost_fraction"),
            ),
            fewer_steps=Candidate(
                fewer, None, row["fewer_steps_heldout"], row.get("fewer_steps_heldout_std"), 0.0, fewer / steps
            ),
            evaluations=row["evaluations"],
            denoiser_calls=row["denoiser_calls"],
            seconds=row["seconds"],
            calibration_calls=row.get("calibration_calls", 0),
            curve=tuple((calls, best) for calls, best in row["curve"]),
            above=cls.from_json(row["above"]) if row.get("above") else None,
        )  # fmt: skip


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

    dense_ms: float
    batch: int
    repeats: int
    device: str
    threads: int

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

    run: RunRecord
    timing: Timing
    prunable_fraction: float
    bank_bytes: int
    front: Mapping[str, Sequence[Candidate]]
    paid_calls: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return nested objects, one for each candidate."""
        run, timing, settings = self.run, self.timing, self.run.settings
        searched, uniform, fewer = run.searched, run.uniform, run.fewer_steps
        return {
            **{name: settings[name] for name in ("model", "method", "metric", "strategy", "seed")},
            "levels": list(run.schedule.levels),
            "nominal_sparsity": searched.nominal_sparsity,
            "prunable_fraction": self.prunable_fraction,
            "macs_fraction": searched.macs_fraction,
            "evaluations": run.evaluations,
            "denoiser_calls": run.denoiser_calls,
            "paid_calls": self.paid_calls,
            "search_seconds": run.seconds,
            "calibration_calls": run.calibration_calls,
            "fitness": {"search": searched.search, **_heldout(searched), "n_heldout": settings["heldout"]},
            "baselines": {
                "uniform": {
                    "levels": list(uniform.levels or ()),
                    "search": uniform.search,
                    **_heldout(uniform),
                    "nominal_sparsity": uniform.nominal_sparsity,
                    "macs_fraction": uniform.macs_fraction,
                    "speedup": timing.speedup(uniform),
                },
                "fewer_steps": {
                    "steps": fewer.steps,
                    **_heldout(fewer),
                    "macs_fraction": fewer.macs_fraction,
                    "speedup": timing.speedup(fewer),
                },
            },
            "latency": {
                "routed_ms": searched.ms,
                "uniform_ms": uniform.ms,
                "fewer_steps_ms": fewer.ms,
                "speedup": timing.speedup(searched),
                **asdict(timing),
            },
            "front": {
                label: [_point(candidate) for candidate in candidates] for label, candidates in self.front.items()
            },
            "bank_bytes": self.bank_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], schedule: Schedule, facts: Mapping[str, Any]) -> Report:
        """Build the report from the output of `to_json` and from the schedule and facts of `schedule.json`.

        Its run has no curve.

        Raises:
            KeyError: the data are not a report.
        """
        steps, latency, searched = facts["steps"], data["latency"], data["fitness"]
        settings = {name: data[name] for name in ("model", "method", "metric", "strategy", "seed")}
        settings |= {name: facts[name] for name in ("steps", "guidance", "dtype")} | {"heldout": searched["n_heldout"]}
        uniform, fewer = data["baselines"]["uniform"], data["baselines"]["fewer_steps"]
        run = RunRecord(
            settings=settings,
            versions={},
            schedule=schedule,
            searched=Candidate(
                steps, schedule.levels, searched["heldout_mean"], searched["heldout_std"], data["nominal_sparsity"],
                data["macs_fraction"], searched["search"], latency["routed_ms"],
            ),
            uniform=Candidate(
                steps, tuple(uniform["levels"]), uniform["heldout_mean"], uniform["heldout_std"],
                uniform["nominal_sparsity"], uniform["macs_fraction"], uniform["search"], latency["uniform_ms"],
            ),
            fewer_steps=Candidate(
                fewer["steps"], None, fewer["heldout_mean"], fewer["heldout_std"], 0.0, fewer["macs_fraction"],
                None, latency["fewer_steps_ms"],
            ),
            evaluations=data["evaluations"],
            denoiser_calls=data["denoiser_calls"],
            seconds=data["search_seconds"],
            calibration_calls=data.get("calibration_calls", 0),
        )  # fmt: skip
        timing = Timing(*(latency[name] for name in ("dense_ms", "batch", "repeats", "device", "threads")))
        front = {
            label: [
                Candidate(
                    point.get("steps", steps), tuple(point["levels"]) if "levels" in point else None,
                    point["heldout_mean"], None, 0.0, point["macs_fraction"], point.get("search"),
                )
                for point in points
            ]
            for label, points in data.get("front", {}).items()
        }  # fmt: skip
        return cls(run, timing, data["prunable_fraction"], data["bank_bytes"], front, data.get("paid_calls"))


def _heldout(candidate: Candidate) -> dict[str, float | None]:
    return {"heldout_mean": candidate.heldout_mean, "heldout_std": candidate.heldout_std}


def _point(candidate: Candidate) -> dict[str, Any]:
    """Return a point of a front as JSON: a schedule, or the dense model at a number of steps."""
    if candidate.levels is None:
        place: dict[str, Any] = {"steps": candidate.steps}
    else:
        place = {"levels": list(candidate.levels), "search": candidate.search}
    return place | {"macs_fraction": candidate.macs_fraction, "heldout_mean": candidate.heldout_mean}


def rises(result: SearchResult) -> tuple[tuple[int, float], ...]:
    """Return (denoiser calls, best fitness so far) wherever the best of a search rose, and at its end."""
    curve = [point for point in zip(result.calls(), result.curve(), strict=True) if point[1] > -math.inf]
    found = [point for i, point in enumerate(curve) if i == 0 or point[1] > curve[i - 1][1]]
    return tuple([*found, curve[-1]] if curve and found[-1] != curve[-1] else found)
