"""What many searches found, for people: a table with a paired test, CSV, JSON and figures."""

from __future__ import annotations

import csv
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from diffes import folder, plots
from diffes.schedule import Schedule

MEASURE = ("model", "metric", "steps", "guidance", "heldout", "dtype")  # settings that held-out fitness depends on
TABLE, CSV, JSON = "table.md", "results.csv", "results.json"


@dataclass(frozen=True)
class Comparison:
    """Finished cells; a notebook shows the table.

    Args:
        varied: names of the settings in which they differ, besides the seed.
        rows: one for each cell, as `diffes.experiment.run_cell` makes them.
    """

    varied: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]

    def summary(self) -> list[dict[str, Any]]:
        """One line for each combination of what was varied, over its seeds.

        Each is tested against the first one that was measured in the same way. `p` is that of a two-sided Wilcoxon
        signed-rank test of held-out fitness, paired by seed. Seeds whose held-out fitness is None, because a probe
        failed, are left out of the statistics; where all are, they are None.
        """
        groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
        for row in self.rows:
            key = tuple(row["settings"][name] for name in self.varied)
            groups.setdefault(key, {})[row["settings"]["seed"]] = row
        references: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
        lines = []
        for key, by_seed in groups.items():
            settings = next(iter(by_seed.values()))["settings"]
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
            "ahead of first": lambda line: "" if line["ahead"] is None else f"{line['ahead']} of {line['seeds']}",
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
        by_metric: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
        for row in self.rows:
            label = ", ".join(str(row["settings"][name]) for name in self.varied)
            by_metric.setdefault(row["settings"]["metric"], {}).setdefault(label, []).append(row)
        figures, best = {}, {}
        for metric, groups in by_metric.items():
            ending = f"-{metric}" if len(by_metric) > 1 else ""
            curves = {label: [row["curve"] for row in group] for label, group in groups.items()}
            heldout = {
                label: [row["heldout"] for row in group if row["heldout"] is not None]
                for label, group in groups.items()
            }
            known = {label: values for label, values in heldout.items() if values}
            figures[f"convergence{ending}"] = plots.convergence_over_calls(curves, metric)
            figures[f"heldout{ending}"] = plots.spread_by_label(known, f"held-out {metric}")
            for label, group in groups.items():
                best[label] = Schedule.from_json(max(group, key=lambda row: row["search"]))
        return figures | {"schedules": plots.schedules(best)}

    def write(self, out: Path) -> None:
        """CSV, JSON, the table in Markdown and the figures."""
        folder.write_safely(out / CSV, lambda path: _write_csv(self.rows, path))
        cells = [dict(row) for row in self.rows]
        folder.write_json(out / JSON, {"varied": list(self.varied), "summary": self.summary(), "cells": cells})
        folder.write_safely(out / TABLE, lambda path: path.write_text(self.markdown(), encoding="utf-8"))
        for name, figure in self.figures().items():
            folder.write_safely(out / f"{name}.png", functools.partial(plots.save, figure))


def _line(by_seed: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of one combination over its seeds."""
    heldout = [row["heldout"] for row in by_seed.values() if row["heldout"] is not None]
    pairs = [(row["heldout"], reference[s]["heldout"]) for s, row in by_seed.items() if s in reference]
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    tested = len(differences) > 1 and any(differences)

    def mean(name: str) -> float | None:
        values = [row[name] for row in by_seed.values() if row[name] is not None]
        return statistics.mean(values) if values else None

    return {
        "seeds": len(by_seed),
        "failed": len(by_seed) - len(heldout),
        "heldout_mean": mean("heldout"),
        "heldout_std": statistics.stdev(heldout) if len(heldout) > 1 else 0.0,
        "heldout_median": statistics.median(heldout) if heldout else None,
        "search_mean": mean("search"),
        "uniform_heldout": mean("uniform_heldout"),
        "fewer_steps_heldout": mean("fewer_steps_heldout"),
        "macs": mean("macs"),
        "denoiser_calls": mean("denoiser_calls"),
        "evaluations": mean("evaluations"),
        "ahead": sum(d > 0 for d in differences) if by_seed is not reference else None,
        "p": float(wilcoxon(differences).pvalue) if tested else None,
    }


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    flat = [
        row["settings"] | {k: v for k, v in row.items() if k not in ("settings", "versions", "curve")} for row in rows
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in flat)
