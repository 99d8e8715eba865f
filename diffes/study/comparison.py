"""Comparison of many searches for readers: a table with a paired test, CSV, JSON and figures."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import ttest_1samp, wilcoxon

from diffes import files
from diffes.figures import charts, plots
from diffes.results.frames import dataframe
from diffes.results.record import FEWER_STEPS, Candidate, RunRecord
from diffes.spaces.schedule import Plan, Schedule
from diffes.study.equal_cost import at_budget, calls_of, config_of, cost_of, is_off, same

MEASURE = ("model", "metric", "steps", "guidance", "heldout", "dtype")  # settings that held-out fitness depends on
EFFORT = ("max_evals", "max_calls", "probes", "fit_probes", "time_limit")  # settings that say what a search may spend
ALIKE = (*MEASURE, "cost", "budget", "calls")  # settings that compared records share
TIE = 1e-6  # relative: held-out values that differ by less are tied
TABLE, CSV, JSON = "table.md", "results.csv", "results.json"


@dataclass(frozen=True)
class Failure:
    """Cell that failed: its settings, and its error in one line."""

    settings: Mapping[str, Any]
    error: str


@dataclass(frozen=True)
class Comparison:
    """Comparison of finished cells. A notebook shows its table.

    Args:
        varied: names of the settings in which the cells differ, besides the seed.
        records: one record for each cell, from `diffes.study.cell.run_cell`.
        failed: cells that failed, which have no record.
    """

    varied: tuple[str, ...]
    records: tuple[RunRecord, ...]
    failed: tuple[Failure, ...] = ()

    def _label(self, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(hashable(settings.get(name)) for name in self.varied)

    def _alike(self) -> list[dict[tuple[Any, ...], list[RunRecord]]]:
        """Return groups of records that can be compared, each by combination."""
        found: dict[tuple[Any, ...], dict[tuple[Any, ...], list[RunRecord]]] = {}
        for record in self.records:
            alike = found.setdefault(tuple(hashable(record.settings.get(name)) for name in ALIKE), {})
            alike.setdefault(self._label(record.settings), []).append(record)
        return list(found.values())

    def to_interpolate(self) -> list[RunRecord]:
        """Return the records off their budget, in groups of unequal cost, that have no search at a budget above yet."""
        uneven = [alike for alike in self._alike() if not _even(alike)]
        records = [record for alike in uneven for records in alike.values() for record in records]
        return [record for record in records if is_off(record) and record.above is None]

    def measured(self) -> dict[tuple[Any, ...], list[RunRecord]]:
        """Return the records by combination, at the same cost where possible.

        If compared combinations differ in cost, values are interpolated to the budget between two searches.
        """
        found: dict[tuple[Any, ...], list[RunRecord]] = {}
        for alike in self._alike():
            even = _even(alike)
            for label, records in alike.items():
                found[label] = records if even else [at_budget(record) for record in records]
        order = dict.fromkeys(self._label(record.settings) for record in self.records)
        return {label: found[label] for label in order}

    def summary(self) -> list[dict[str, Any]]:
        """Return one line for each combination of the varied settings, over its seeds.

        Each is compared with the first one that was measured in the same way and has the same budget, unless their
        costs differ by more than 0.5 %. `difference` is the mean over seeds of held-out fitness less that of the first
        one, with its 95 % t interval; `p` is the p value of a two-sided Wilcoxon signed-rank test; both are paired by
        seed. `p_holm` is `p` corrected for the number of combinations compared with the first (Holm). Seeds whose
        held-out fitness is None, because a probe failed, are left out of the statistics; if all are, these are None.
        """
        references: dict[tuple[Any, ...], list[RunRecord]] = {}
        families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        lines = []
        for label, records in self.measured().items():
            alike = tuple(hashable(records[0].settings.get(name)) for name in ALIKE)
            line = dict(zip(self.varied, label, strict=True)) | _line(records, references.setdefault(alike, records))
            own = [record for record in self.records if self._label(record.settings) == label]
            line["between"] = _between([r for r, shown in zip(own, records, strict=True) if shown is not r])
            families.setdefault(alike, []).append(line)
            lines.append(line)
        for family in families.values():
            tested = [line for line in family if line["p"] is not None]
            for line, p in zip(tested, holm([line["p"] for line in tested]), strict=True):
                line["p_holm"] = p
        return lines

    def table(self, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
        """Return head and body of the table. A brief one fits a terminal: its numbers have no leading 0, and rivals
        that are the same in all lines are left out (see `same_rivals`)."""
        lines = self.summary()
        rivals = dict.fromkeys(name for record in self.records for name in record.rivals)
        rivals = {name: None for name in rivals if not (brief and name in self.same_rivals())}
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "held-out": lambda line: f"{_number(line['heldout_mean'])} ± {_number(line['heldout_std'])}",
            **{name: functools.partial(_rival, name) for name in rivals},
            **self._cost_columns(),
            "ahead of first": _ahead,
            "difference [95 %]": _difference,
            "p (Holm)": lambda line: "" if line["p_holm"] is None else f"{line['p_holm']:.3f}",
        }
        if not brief:
            columns |= {
                "median held-out": lambda line: _number(line["heldout_median"]),
                "on its own probes": lambda line: _number(line["search_mean"]),
                "denoiser calls a search": lambda line: f"{line['denoiser_calls']:,.0f}" + "*" * line["exhausted"],
                "evaluations": lambda line: f"{line['evaluations']:.0f}",
            }
        body = [[*(str(line[name]) for name in self.varied), *(f(line) for f in columns.values())] for line in lines]
        found = {self._label(record.settings) for record in self.records}
        for label in dict.fromkeys(self._label(each.settings) for each in self.failed):
            if label not in found:
                body.append([*map(str, label), "failed", *[""] * (len(columns) - 1)])
        if brief:
            body = [[re.sub(r"(?<![\d.])0\.(?=\d)", ".", cell) for cell in line] for line in body]
        return [*self.varied, *columns], body

    def same_rivals(self) -> dict[str, str]:
        """Return the rivals that have the same value in all lines of the table, with that value."""
        lines = self.summary()
        names = dict.fromkeys(name for record in self.records for name in record.rivals)
        cells = {name: {_rival(name, line) for line in lines} for name in names}
        return {name: next(iter(found)) for name, found in cells.items() if len(found) == 1 and len(lines) > 1}

    def _cost_columns(self) -> dict[str, Callable[[Mapping[str, Any]], str]]:
        """Return the columns that say what the results cost: MACs of schedules, dense calls of plans."""
        plans = {isinstance(record.found, Plan) for record in self.records}
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {"MACs": _macs} if plans != {True} else {}
        if True in plans:
            columns["cost"] = lambda line: f"{line['cost']:.2f}" if line["is_plan"] else ""
        return columns

    def notes(self) -> list[str]:
        """Return the notes that explain the table, as sentences."""
        lines, notes = self.summary(), []
        if any(line["between"] for line in lines):
            notes.append(
                "Where MACs have two more numbers in brackets, all values are interpolated to the budget, linearly in "
                "cost, between two searches that found schedules of these MACs, each with as many denoiser calls as "
                "the others: the levels cannot express the budget itself."
            )
        if any(line["same_cost"] is False for line in lines):
            notes.append("Combinations that cost something else than the first one are not compared with it.")
        if any(line["difference"] is not None for line in lines):
            notes.append(
                "Difference: mean over seeds of held-out fitness less that of the first one, with its 95 % t interval; "
                "p: Wilcoxon's signed-rank test, corrected by Holm for the number of comparisons; both paired by seed."
            )
        if effort := [name for name in EFFORT if name in self.varied]:
            notes.append(f"Rows that differ in {' and '.join(effort)} were searched with unequal effort.")
        if any(line["exhausted"] for line in lines):
            notes.append("*: the strategy had nothing left to ask before its denoiser calls were spent.")
        for each in self.failed:
            cell = ", ".join(f"{name} {each.settings[name]}" for name in (*self.varied, "seed"))
            notes.append(f"Failed: {cell}: {each.error}")
        return notes

    def markdown(self) -> str:
        """Return the table in Markdown, with the notes below it."""
        head, body = self.table()
        rows = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]]
        return "\n".join([*rows, *(f"\n{note}" for note in self.notes())]) + "\n"

    _repr_markdown_ = markdown

    def figures(self) -> dict[str, Figure]:
        """Draw the figures, by name.

        `convergence`: best so far over denoiser calls; `heldout`: held-out fitness of every seed; both at equal cost as
        in the table. `schedules`: the schedules found, over the seeds of each combination. If metrics differ, the first
        two are drawn for each metric, and their names end with it.
        """
        by_metric: dict[str, dict[str, list[RunRecord]]] = {}
        for label, records in self.measured().items():
            by_metric.setdefault(records[0].settings["metric"], {})[", ".join(map(str, label))] = records
        figures: dict[str, Figure] = {}
        schedules: dict[str, list[Schedule]] = {}
        plans: dict[str, Plan] = {}
        for metric, groups in by_metric.items():
            ending = f"-{metric}" if len(by_metric) > 1 else ""
            curves = {label: [record.curve for record in group] for label, group in groups.items()}
            known = {
                label: values
                for label, group in groups.items()
                if (values := _known(record.searched.heldout_mean for record in group))
            }
            allowed = {calls_of(config_of(record.settings)) for group in groups.values() for record in group}
            spend = allowed.pop() if len(allowed) == 1 else None
            figures[f"convergence{ending}"] = charts.convergence_over_calls(curves, metric, spend)
            figures[f"heldout{ending}"] = charts.spread_by_label(known, f"held-out {metric}")
            for name, group in groups.items():
                at = [(record, record.found) for record in group]
                if kept := [found for _, found in at if isinstance(found, Schedule)]:
                    schedules[name] = kept
                plans |= {_label(name, record): found for record, found in at if isinstance(found, Plan)}
        if schedules:
            figures["schedules"] = plots.schedules(schedules)
        if plans:
            figures["plans"] = plots.plans(plans)
        return figures

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with a row for each cell: every setting and every measurement under its own name.

        Raises:
            DiffesError: pandas is not installed.
        """
        return dataframe([_csv_row(record) for record in self.records])

    def write(self, out: Path) -> None:
        """Write CSV, JSON, the table in Markdown and the figures."""
        files.write_safely(out / CSV, lambda path: _write_csv(self.records, path))
        data = {
            "varied": list(self.varied),
            "summary": self.summary(),
            "cells": [record.to_json() for record in self.records],
            "failed": [asdict(each) for each in self.failed],
        }
        files.write_json(out / JSON, data)
        files.write_safely(out / TABLE, lambda path: path.write_text(self.markdown(), encoding="utf-8"))
        for name, figure in self.figures().items():
            files.write_safely(out / f"{name}.png", functools.partial(plots.save, figure))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p values for their number.

    Source: Holm (1979), step-down: the k-th smallest of n values is multiplied by n - k + 1, and raised to the
    corrected value before it if that is larger; no value exceeds 1.
    """
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def _even(alike: Mapping[tuple[Any, ...], Sequence[RunRecord]]) -> bool:
    """Check whether combinations cost the same, on average over seeds.

    Plans have the same budget here, and no plan costs more.
    """
    costs = [_cost(records) for records in alike.values() if not isinstance(records[0].found, Plan)]
    return not costs or same(costs)


def _cost(records: Sequence[RunRecord]) -> float:
    return statistics.mean(cost_of(record.settings, record.searched) for record in records)


def _between(own: Sequence[RunRecord]) -> list[float] | None:
    """Return the mean MACs of the interpolated records, at the budget and at the one above; None if there are none."""
    if not own:
        return None
    above = [record.above.searched.macs_fraction for record in own if record.above is not None]
    return [statistics.mean(record.searched.macs_fraction for record in own), statistics.mean(above)]


def _line(records: Sequence[RunRecord], reference: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the statistics of one combination over its seeds."""
    heldout = _known(record.searched.heldout_mean for record in records)
    compared = records is not reference
    same_cost = _even({(0,): records, (1,): reference}) if compared else None
    return {
        "seeds": len(records),
        "failed": len(records) - len(heldout),
        "heldout_mean": _mean(heldout),
        "heldout_std": statistics.stdev(heldout) if len(heldout) > 1 else 0.0,
        "heldout_median": statistics.median(heldout) if heldout else None,
        "search_mean": _mean(_known(record.searched.search for record in records)),
        "rivals": {name: _of_rival([record.rivals[name] for record in records]) for name in records[0].rivals},
        "is_plan": isinstance(records[0].found, Plan),
        "macs": _mean([record.searched.macs_fraction for record in records]),
        "cost": _cost(records),
        "same_cost": same_cost,
        "denoiser_calls": _mean([record.denoiser_calls for record in records]),
        "evaluations": _mean([record.evaluations for record in records]),
        "exhausted": all(_searched(record) < calls_of(config_of(record.settings)) for record in records),
    } | _compared(records, reference if same_cost else None)


def _compared(records: Sequence[RunRecord], reference: Sequence[RunRecord] | None) -> dict[str, Any]:
    """Compare with another combination, paired by seed. Values are None if there is no other combination."""
    theirs = {record.settings["seed"]: record.searched.heldout_mean for record in reference or ()}
    pairs = [(record.searched.heldout_mean, theirs.get(record.settings["seed"])) for record in records]
    differences = [
        0.0 if math.isclose(mine, other, rel_tol=TIE) else mine - other
        for mine, other in pairs
        if mine is not None and other is not None
    ]
    low, high = _interval(differences) if len(differences) > 1 else (None, None)
    return {
        "pairs": len(differences),
        "ahead": None if reference is None else sum(d > 0 for d in differences),
        "tied": None if reference is None else sum(d == 0 for d in differences),
        "difference": _mean(differences),
        "difference_low": low,
        "difference_high": high,
        "p": float(wilcoxon(differences).pvalue) if len(differences) > 1 and any(differences) else None,
        "p_holm": None,
    }


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of a mean."""
    if len(set(values)) == 1:
        return values[0], values[0]
    interval = ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _of_rival(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return the means of a rival over the seeds of a combination."""
    return {
        "heldout_mean": _mean(_known(each.heldout_mean for each in candidates)),
        "macs": _mean([each.macs_fraction for each in candidates]),
    }


def _rival(name: str, line: Mapping[str, Any]) -> str:
    """Return the cell of a rival; that of fewer dense steps also says what they cost."""
    if name not in line["rivals"]:
        return ""
    rival = line["rivals"][name]
    return _number(rival["heldout_mean"]) + (f" ({rival['macs']:.1%})" if name == FEWER_STEPS else "")


def _label(group: str, record: RunRecord) -> str:
    """Return the label of a plan in the figure of plans."""
    return f"{group}, seed {record.settings['seed']}, {record.searched.cost or 0.0:.3g}"


def _searched(record: RunRecord) -> int:
    """Return the denoiser calls of a search without its final fit."""
    return record.curve[-1][0] if record.curve else record.denoiser_calls


def hashable(value: Any) -> Any:
    """Return a setting as a key; a range of guidance is a list."""
    return tuple(value) if isinstance(value, list) else value


def _number(value: float | None) -> str:
    """Format a fitness; small ones, as of latent errors, have a digit more."""
    return "failed" if value is None else f"{value:.{_digits(value)}f}"


def _digits(fitness: float) -> int:
    """Return the number of decimals that a fitness is shown with."""
    return 4 if abs(fitness) >= 0.1 else 5


def _macs(line: Mapping[str, Any]) -> str:
    between = f" ({line['between'][0]:.1%}, {line['between'][1]:.1%})" if line["between"] else ""
    return f"{line['macs']:.1%}{between}"


def _difference(line: Mapping[str, Any]) -> str:
    if line["difference"] is None:
        return "other cost" if line["same_cost"] is False else ""
    digits = _digits(line["heldout_mean"])
    if line["difference_low"] is None:
        return f"{line['difference']:+.{digits}f}"
    low, high = (f"{line[name]:+.{digits}f}" for name in ("difference_low", "difference_high"))
    return f"{line['difference']:+.{digits}f} [{low}, {high}]"


def _ahead(line: Mapping[str, Any]) -> str:
    """Return in words how often a combination is ahead of the first, and how often tied."""
    if line["ahead"] is None:
        return ""
    ties = f", {line['tied']} tied" if line["tied"] else ""
    return f"{line['ahead']} of {line['pairs']}{ties}"


def _write_csv(records: Sequence[RunRecord], path: Path) -> None:
    """Write a line for each cell as it was measured, with its value at the budget if it was searched above."""
    lines = [_csv_row(record) for record in records]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(lines)


def _csv_row(record: RunRecord) -> dict[str, Any]:
    above = record.above
    line = record.to_row() | {
        "above_heldout": above.searched.heldout_mean if above else None,
        "above_macs": above.searched.macs_fraction if above else None,
        "heldout_at_budget": at_budget(record).searched.heldout_mean if above else None,
    }
    return {key: json.dumps(value) if isinstance(value, list | tuple) else value for key, value in line.items()}
