"""How good is each pruning method, on each shipped pipeline, uniform and searched?

Every cell is one search (model x method x budget x seed) with probes of its own, scored on held-out probes that no
search sees, beside the uniform schedule of the same budget and the dense model at the number of steps that costs the
same MACs. Finished cells are lines of the results file and are not run again.

    python benchmarks/compare_methods.py            # about an hour on two CPU cores
    python benchmarks/compare_methods.py --smoke    # tiny, one seed of each
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffes import cost
from diffes.adapters import shipped_models
from diffes.bench import HELDOUT_SEED, Workbench, prepare, search_on, vary
from diffes.config import RunConfig
from diffes.evaluation import ScheduleEvaluator
from diffes.folder import config_record
from diffes.pruning import METHODS

NAME = "compare_methods"
RESULTS = Path(__file__).parent / "results"


class OneLine:
    """Progress without bars."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        start = time.perf_counter()
        yield lambda note, amount=1: None
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)


def baselines(bench: Workbench, heldout: ScheduleEvaluator) -> dict[str, Any]:
    """The uniform schedule of the budget, and the dense model at as many MACs."""
    uniform = bench.space.schedule(bench.space.uniform())
    scores = heldout.scores(uniform)
    macs = cost.macs_fraction(bench.router, uniform, bench.space.steps)
    fewer = max(1, round(bench.config.steps * macs))
    return {
        "uniform_levels": list(uniform.levels),
        "uniform_mean": float(scores.mean()),
        "uniform_std": float(scores.std()),
        "uniform_macs": macs,
        "fewer_steps": fewer,
        "fewer_steps_mean": float(heldout.dense_scores(fewer).mean()),
        "bank_bytes_in_search": bench.router.bank.nbytes,
    }


def run_method(config: RunConfig, cells: list[RunConfig]) -> Iterator[dict[str, Any]]:
    """All cells of one model and method, which share a calibrated bank."""
    bench = prepare(config, OneLine())
    heldout = bench.evaluator(config.heldout, HELDOUT_SEED, "heldout")
    known: dict[float, dict[str, Any]] = {}
    for cell in cells:
        print(f"{cell.model}, {cell.method}, budget {cell.budget}, seed {cell.seed}", flush=True)
        here = vary(bench, cell, OneLine())
        if cell.budget not in known:
            known[cell.budget] = baselines(here, heldout)
        result = search_on(here, OneLine())
        schedule = result.best.schedule
        scores = heldout.scores(schedule)
        found: dict[str, Any] = {
            "levels": list(schedule.levels),
            "search": result.best.fitness,
            "heldout_mean": float(scores.mean()),
            "heldout_std": float(scores.std()),
            "evaluations": len(result.evaluations),
            "denoiser_calls": result.denoiser_calls,
            "seconds": round(result.seconds, 1),
            "curve": [round(value, 6) for value in result.curve()],
        }
        found["macs"] = cost.macs_fraction(here.router, schedule, here.space.steps)
        place = {"model": cell.model, "method": cell.method, "budget": cell.budget, "seed": cell.seed}
        yield place | known[cell.budget] | found | config_record(cell) | {"threads": torch.get_num_threads()}


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """Markdown, one line for each model, budget and method."""
    lines = [
        f"| model | budget | method | uniform, held-out {metric} | searched, mean ± std over seeds | seeds | searched "
        "ahead | MACs, uniform | MACs, searched | dense at as many MACs as uniform |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, budget, method in sorted({(row["model"], row["budget"], row["method"]) for row in rows}):
        cells = [row for row in rows if (row["model"], row["budget"], row["method"]) == (model, budget, method)]
        found = [cell["heldout_mean"] for cell in cells]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        ahead = sum(score > cells[0]["uniform_mean"] for score in found)
        macs = statistics.mean(cell["macs"] for cell in cells)
        first = cells[0]
        values = (
            model, budget, method, f"{first['uniform_mean']:.4f}", f"{statistics.mean(found):.4f} ± {spread:.4f}",
            len(found), f"{ahead} of {len(found)}", f"{first['uniform_macs']:.1%}", f"{macs:.1%}",
            f"{first['fewer_steps']} steps: {first['fewer_steps_mean']:.4f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--methods", nargs="+", default=METHODS.names(), help="specs, as of `diffes search --method`")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-evals", type=int, default=40)
    parser.add_argument("--strategy", default=RunConfig().strategy)
    parser.add_argument("--metric", default="ssim")
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(metric=args.metric, heldout=args.heldout, max_evals=args.max_evals, strategy=args.strategy)
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, metric="latent_mse")
        config = replace(config, max_evals=2)
        args.budgets, args.seeds = [0.5], 1
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{NAME}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = [RunConfig().to_json() | row["settings"] for row in rows]  # settings that came later had their defaults
    for model in args.models:
        for method in args.methods:
            base = replace(config, model=model, method=method)
            cells = [replace(base, budget=b, seed=seed) for seed in range(args.seeds) for b in args.budgets]
            cells = [cell for cell in cells if cell.to_json() not in done]
            for row in run_method(base, cells) if cells else ():
                rows.append(row)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    text = table(rows, config.metric)
    (args.out / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
