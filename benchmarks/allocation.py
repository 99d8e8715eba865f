"""What does it bring to share a level out over the layers by damage, at equal multiply-accumulates?

Every method on every shipped pipeline, at several budgets in MACs and several seeds of the calibration: levels equal in
all layers (the paper's) and shared out by damage, as a uniform schedule, and for OBS also searched, on held-out probes
beside the dense model at as many MACs by fewer steps. Finished cells are lines of `cells.jsonl` and are not run again.

    python benchmarks/allocation.py            # some hours on two CPU cores; the table is of all cells there are
    python benchmarks/allocation.py --smoke    # tiny
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diffes.adapters import adapter_for, load_pipeline, shipped_models
from diffes.adapters.macs import macs_by_module, macs_per_group
from diffes.config import Allocation, RunConfig
from diffes.progress import RichProgress
from diffes.pruning import METHODS
from diffes.results.record import FEWER_STEPS, RunRecord
from diffes.study.grid import run_cells

RESULTS = Path(__file__).parent / "results" / "allocation"
SEARCHED = "obs"  # the method whose schedules are searched as well
METRICS = ("ssim", "latent_mse")


def cells_of(config: RunConfig, budgets: Sequence[float], evals: int) -> list[RunConfig]:
    """All cells of one calibrated model: uniform schedules by both metrics, searched ones by the first."""
    cells = [replace(config, strategy="uniform", budget=b, metric=m) for m in METRICS for b in budgets]
    if config.method == SEARCHED and evals:
        cells += [replace(config, budget=b, metric=METRICS[0], max_evals=evals) for b in budgets]
    return cells


def least_macs(model: str) -> float:
    """Share of the dense model's multiply-accumulates that is left when everything prunable is gone."""
    adapter = adapter_for(load_pipeline(model))
    macs, sets = macs_by_module(adapter), adapter.group_sets()
    prunable = sum(each * p.n_groups for each, p in zip(macs_per_group(adapter, macs).values(), sets, strict=True))
    return 1 - prunable / macs[""]


def table(records: Sequence[RunRecord]) -> str:
    """Markdown, one line for each model, method, budget and kind of schedule; mean and spread over calibrations."""
    lines = [
        "| model | method | MACs | schedule | equal: SSIM | damage: SSIM | equal: latent MSE | damage: latent MSE "
        "| MACs counted, equal / damage | dense at as many MACs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, float, str], list[RunRecord]] = {}
    for record in records:
        s = record.settings
        groups.setdefault((s["model"], s["method"], -s["budget"], s["strategy"]), []).append(record)
    for (model, method, budget, strategy), found in sorted(groups.items()):

        def cell(metric: str, allocation: str, found: Sequence[RunRecord] = found) -> str:
            scores = [
                abs(r.searched.heldout_mean or 0.0)
                for r in found
                if (r.settings["metric"], r.settings["allocation"]) == (metric, allocation)
            ]
            if not scores:
                return ""
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            return f"{statistics.mean(scores):.4f} ± {spread:.4f}" + ("" if len(scores) > 1 else " (1)")

        macs = [
            [r.searched.macs_fraction for r in found if r.settings["allocation"] == allocation]
            for allocation in ("equal", "sensitivity")
        ]
        fewer = next(r for r in found if r.settings["metric"] == METRICS[0]).rivals[FEWER_STEPS]
        counted = " / ".join(f"{statistics.mean(each):.3f}" if each else "" for each in macs)
        values = (
            model, method, f"{-budget:g}", "uniform" if strategy == "uniform" else "searched",
            *(cell(metric, allocation) for metric in METRICS for allocation in ("equal", "sensitivity")),
            counted, f"{fewer.steps} steps: {fewer.heldout_mean:.4f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def tabled(cells: Sequence[RunConfig], out: Path, table: Callable[[Sequence[RunRecord]], str]) -> str:
    """Runs cells that are not in a folder yet, and writes the table of all that are."""
    run_cells(cells, out, RichProgress(), equal_calls=False)
    lines = (out / "cells.jsonl").read_text().splitlines()
    text = table([RunRecord.from_json(json.loads(line)) for line in lines])
    (out / "table.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS.names() if METHODS.make(m).kind == "width"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration and the search")
    parser.add_argument("--max-evals", type=int, default=40, help="of the searches; 0 leaves them out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(genes="levels", cost="macs")
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8)
        args.models, args.methods, args.budgets, args.seeds, args.max_evals = ["fashion-dit"], ["obs"], [0.65], [0], 2
        args.out = Path("runs/smoke/allocation") if args.out == RESULTS else args.out
    reachable = {m: [b for b in args.budgets if b > least] for m in args.models for least in [least_macs(m)]}
    allocations: tuple[Allocation, ...] = ("equal", "sensitivity")
    for seed, model, method, allocation in itertools.product(args.seeds, args.models, args.methods, allocations):
        settings = replace(config, model=model, method=method, allocation=allocation, seed=seed)
        cells = cells_of(settings, reachable[model], args.max_evals)
        text = tabled(cells, args.out, table)
    print(text)


if __name__ == "__main__":
    main()
