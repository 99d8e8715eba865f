"""What many searches found, for people: a table with a paired test, CSV, JSON and figures."""

from __future__ import annotations

import csv
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from diffes import files
from diffes.study import charts, plots
from diffes.study.record import RunRecord

MEASURE = ("model", "metric", "steps", "guidance", "heldout", "dtype")  # settings that held-out fitness depends on
TABLE, CSV, JSON = "table.md", "results.csv", "results.json"


@dataclass(frozen=True)
class Comparison:
    """Finished cells; a notebook shows the table.

    Args:
        varied: names of the settings in which they differ, besides the seed.
        records: one for each cell, as `diffes.study.grid.run_cell` makes them.
    """

    varied: tuple[str, ...]
    records: tuple[RunRecord, ...]

    def summary(self) -> list[dict[str, Any]]:
        """One line for each combination of what was varied, over its seeds.

        Each is tested against the first one that was measured in the same way. `p` is that of a two-sided Wilcoxon
        signed-rank test of held-out fitness, paired by seed. Seeds whose held-out fitness is None, because a probe
        failed, are left out of the statistics; where all are, they are None.
        """
        groups: dict[tuple[Any, ...], dict[int, RunRecord]] = {}
        for record in self.records:
            key = tuple(record.settings[name] for name in self.varied)
            groups.setdefault(key, {})[record.settings["seed"]] = record
        references: dict[tuple[Any, ...], dict[int, RunRecord]] = {}
        lines = []
        for key, by_seed in groups.items():
            settings = next(iter(by_seed.values())).settings
            reference = references.setdefault(tuple(settings.get(name) for name in MEASURE), by_seed)
            lines.append(dict(zip(self.varied, key, strict=True)) | _line(by_seed, reference))
        return lines

    def table(self, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
        """Head and body of the table; a brief one fits a terminal."""
        lines = self.summary()
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "held-out": lambda line: f"{_number(line['heldout_mean'])} ± {_number(line['heldout_std'])}",
            "uniform": lambda line: _number(line["uniform_heldout"]),
            "dense, fewer steps": lambda line: _number(line["fewer_steps_heldout"]),
            "MACs": lambda line: f"{line['macs']:.1%}",
            "ahead of first": _ahead,
            "p": lambda line: "" if line["p"] is None else f"{line['p']:.3f}",
        }
        if not brief:
            columns |= {
                "median held-out": lambda line: _number(line["heldout_median"]),
                "on its own probes": lambda line: _number(line["search_mean"]),
                "denoiser calls": lambda line: f"{line['denoiser_calls']:,.0f}",
                "evaluations": lambda line: f"{line['evaluations']:.0f}",
            }
        body = [[*(str(line[name]) for name in self.varied), *(f(line) for f in columns.values())] for line in lines]
        return [*self.varied, *columns], body

    def markdown(self) -> str:
        """The table in Markdown."""
        head, body = self.table()
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]) + "\n"

    _repr_markdown_ = markdown

    def figures(self) -> dict[str, Figure]:
        """Figures by name.

        `convergence`: best so far over denoiser calls; `heldout`: held-out fitness of every seed; `schedules`: of each
        combination the schedule that did best on its own probes. Where metrics differ, the first two are drawn for
        each, their names ending with it.
        """
        by_metric: dict[str, dict[str, list[RunRecord]]] = {}
        for record in self.records:
            label = ", ".join(str(record.settings[name]) for name in self.varied)
            by_metric.setdefault(record.settings["metric"], {}).setdefault(label, []).append(record)
        figures, best = {}, {}
        for metric, groups in by_metric.items():
            ending = f"-{metric}" if len(by_metric) > 1 else ""
            curves = {label: [record.curve for record in group] for label, group in groups.items()}
            heldout = {
                label: [mean for record in group if (mean := record.searched.heldout_mean) is not None]
                for label, group in groups.items()
            }
            known = {label: values for label, values in heldout.items() if values}
            figures[f"convergence{ending}"] = charts.convergence_over_calls(curves, metric)
            figures[f"heldout{ending}"] = charts.spread_by_label(known, f"held-out {metric}")
            for label, group in groups.items():
                best[label] = max(group, key=_fitness).schedule
        return figures | {"schedules": plots.schedules(best)}

    def write(self, out: Path) -> None:
        """CSV, JSON, the table in Markdown and the figures."""
        files.write_safely(out / CSV, lambda path: _write_csv(self.records, path))
        cells = [record.to_json() for record in self.records]
        files.write_json(out / JSON, {"varied": list(self.varied), "summary": self.summary(), "cells": cells})
        files.write_safely(out / TABLE, lambda path: path.write_text(self.markdown(), encoding="utf-8"))
        for name, figure in self.figures().items():
            files.write_safely(out / f"{name}.png", functools.partial(plots.save, figure))


def _line(by_seed: Mapping[int, RunRecord], reference: Mapping[int, RunRecord]) -> dict[str, Any]:
    """Statistics of one combination over its seeds."""
    records = list(by_seed.values())
    heldout = _known(record.searched.heldout_mean for record in records)
    theirs = {seed: record.searched.heldout_mean for seed, record in reference.items()}
    pairs = [(record.searched.heldout_mean, theirs.get(seed)) for seed, record in by_seed.items()]
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    compared = by_seed is not reference
    return {
        "seeds": len(records),
        "failed": len(records) - len(heldout),
        "heldout_mean": _mean(heldout),
        "heldout_std": statistics.stdev(heldout) if len(heldout) > 1 else 0.0,
        "heldout_median": statistics.median(heldout) if heldout else None,
        "search_mean": _mean(_known(record.searched.search for record in records)),
        "uniform_heldout": _mean(_known(record.uniform.heldout_mean for record in records)),
        "fewer_steps_heldout": _mean(_known(record.fewer_steps.heldout_mean for record in records)),
        "macs": _mean([record.searched.macs_fraction for record in records]),
        "denoiser_calls": _mean([record.denoiser_calls for record in records]),
        "evaluations": _mean([record.evaluations for record in records]),
        "ahead": sum(d > 0 for d in differences) if compared else None,
        "tied": sum(d == 0 for d in differences) if compared else None,
        "p": float(wilcoxon(differences).pvalue) if len(differences) > 1 and any(differences) else None,
    }


def _fitness(record: RunRecord) -> float:
    return -math.inf if record.searched.search is None else record.searched.search


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _ahead(line: Mapping[str, Any]) -> str:
    """How often ahead of the first combination, ties said to be ties."""
    if line["ahead"] is None:
        return ""
    ties = f", {line['tied']} tied" if line["tied"] else ""
    return f"{line['ahead']} of {line['seeds']}{ties}"


def _write_csv(records: Sequence[RunRecord], path: Path) -> None:
    rows = [record.to_json() for record in records]
    flat = [
        row["settings"] | {k: v for k, v in row.items() if k not in ("settings", "versions", "curve")} for row in rows
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in flat)
