"""Measurements of a finished run as rows of a table, for the terminal and for the card of an exported folder."""

from __future__ import annotations

from pathlib import Path

from diffes.errors import DiffesError
from diffes.files import read_json, write_json
from diffes.forms import AGAIN
from diffes.results.artifact import SCHEDULE, read_schedule
from diffes.results.folder import REPORT
from diffes.results.record import FEWER_STEPS, UNIFORM, Candidate, Report

COLUMNS = ("", "held-out fitness", "spread", "sparsity", "MACs", "speed-up")


def read_report(run: Path) -> Report:
    """Read the report of a finished run.

    Raises:
        DiffesError: the run is unfinished, or one of its files is damaged.
    """
    schedule, facts = read_schedule(run)
    found = Report.from_json(read_json(run / REPORT), facts.to_json(), run / REPORT)
    if found.run.found != schedule:
        raise DiffesError(f"{run / REPORT} belongs to another schedule than {SCHEDULE}; {AGAIN}")
    return found


def write_report(run: Path, report: Report) -> None:
    """Write `report.json`."""
    write_json(run / REPORT, report.to_json())


def rows(report: Report) -> list[tuple[str, ...]]:
    """Return the rows dense, uniform, searched, and the cheapest rival: fewer steps of the dense model."""
    run, timing = report.run, report.timing
    steps = run.settings["steps"]

    def row(name: str, candidate: Candidate) -> tuple[str, ...]:
        scores = (
            "failed" if each is None else f"{each:.4f}" for each in (candidate.heldout_mean, candidate.heldout_std)
        )
        sparsity, macs = f"{candidate.nominal_sparsity:.2f}", f"{candidate.macs_fraction:.1%}"
        return name, *scores, sparsity, macs, f"{timing.speedup(candidate):.2f}x"

    return [
        ("dense", "reference", "", "0.00", "100.0%", "1.00x"),
        row("uniform", run.rivals[UNIFORM]),
        row("searched", run.searched),
        row(f"dense, {run.rivals[FEWER_STEPS].steps} of {steps} steps", run.rivals[FEWER_STEPS]),
    ]
