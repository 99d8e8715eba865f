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
        """One line for each combination of what was varied, over its seeds; others are tested against the first one.

        `p` is that of a two-sided Wilcoxon signed-rank test of held-out fitness, paired by seed.
        """
        groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
        for row in self.rows:
            key = tuple(row["settings"][name] for name in self.varied)
            groups.setdefault(key, {})[row["settings"]["seed"]] = row
        reference = next(iter(groups.values()))
        return [dict(zip(self.varied, key, strict=True)) | _line(by_seed, reference) for key, by_seed in groups.items()]

    def table(self, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
        """Head and body of the table; a brief one fits a terminal."""
        lines = self.summary()
        columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "held-out": lambda line: f"{line['heldout_mean']:.4f} ± {line['heldout_std']:.4f}",
            "uniform": lambda line: f"{line['uniform_heldout']:.4f}",
            "dense, fewer steps": lambda line: f"{line['fewer_steps_heldout']:.4f}",
            "MACs": lambda line: f"{line['macs']:.1%}",
            "ahead of first": lambda line: "" if line["ahead"] is None else f"{line['ahead']} of {line['seeds']}",
            "p": lambda line: "" if line["p"] is None else f"{line['p']:.3f}",
        }
        if not brief:
            columns |= {
                "median held-out": lambda line: f"{line['heldout_median']:.4f}",
                "on its own probes": lambda line: f"{line['search_mean']:.4f}",
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
        combination the schedule that did best on its own probes.
        """
        by_label: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.rows:
            label = ", ".join(str(row["settings"][name]) for name in self.varied)
            by_label.setdefault(label, []).append(row)
        metrics = {row["settings"]["metric"] for row in self.rows}
        metric = metrics.pop() if len(metrics) == 1 else "fitness"
        curves = {label: [row["curve"] for row in group] for label, group in by_label.items()}
        heldout = {label: [row["heldout"] for row in group] for label, group in by_label.items()}
        best = {label: max(group, key=lambda row: row["search"]) for label, group in by_label.items()}
        return {
            "convergence": plots.convergence_over_calls(curves, metric),
            "heldout": plots.spread_by_label(heldout, f"held-out {metric}"),
            "schedules": plots.schedules({label: Schedule.from_json(row) for label, row in best.items()}),
        }

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
    heldout = [row["heldout"] for row in by_seed.values()]
    differences = [by_seed[s]["heldout"] - reference[s]["heldout"] for s in by_seed if s in reference]
    tested = len(differences) > 1 and any(differences)

    def mean(name: str) -> float:
        return statistics.mean(row[name] for row in by_seed.values())

    return {
        "seeds": len(heldout),
        "heldout_mean": statistics.mean(heldout),
        "heldout_std": statistics.stdev(heldout) if len(heldout) > 1 else 0.0,
        "heldout_median": statistics.median(heldout),
        "search_mean": mean("search"),
        "uniform_heldout": mean("uniform_heldout"),
        "fewer_steps_heldout": mean("fewer_steps_heldout"),
        "macs": mean("macs"),
        "denoiser_calls": mean("denoiser_calls"),
        "evaluations": mean("evaluations"),
        "ahead": sum(d > 0 for d in differences) if by_seed is not reference else None,
        "p": float(wilcoxon(differences).pvalue) if tested else None,
    }


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    flat = [
        row["settings"] | {k: v for k, v in row.items() if k not in ("settings", "versions", "curve")} for row in rows
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in flat)
