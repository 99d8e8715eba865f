"""Which strategy finds the best schedule for `fashion-dit` with the same number of evaluations?

Every cell is one search (budget x strategy x seed) with probes of its own, scored on held-out probes that no search
sees. All cells share one calibrated bank, so they differ in nothing but the search. Finished cells are lines of the
results file and are not run again.

    python benchmarks/compare_strategies.py            # about 40 minutes on two CPU cores
    python benchmarks/compare_strategies.py --smoke    # one tiny cell per strategy
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

from diffes.config import RunConfig
from diffes.folder import config_record
from diffes.plots import convergence_bands
from diffes.run import HELDOUT_SEED, Workbench, prepare, search_on
from diffes.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
STRATEGIES = ("uniform", "random", "tpe", "evolution")


class OneLine:
    """Progress without bars."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        start = time.perf_counter()
        yield lambda note: None
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)


def with_budget(bench: Workbench, budget: float) -> Workbench:
    """The same calibrated model under another budget."""
    space = bench.space
    return replace(bench, space=SearchSpace.mean_sparsity(space.plan, space.max_level, budget, space.steps))


def run_cell(bench: Workbench, strategy: str, seed: int, max_evals: int, heldout: Any) -> dict[str, Any]:
    """One search and its held-out score."""
    result = search_on(bench, OneLine(), strategy=strategy, seed=seed, max_evals=max_evals)
    scores = heldout.scores(result.best.schedule)
    return {
        "levels": list(result.best.schedule.levels),
        "search": result.best.fitness,
        "heldout_mean": float(scores.mean()),
        "heldout_std": float(scores.std()),
        "evaluations": len(result.evaluations),
        "denoiser_calls": result.denoiser_calls,
        "seconds": round(result.seconds, 1),
        "curve": [round(value, 6) for value in result.curve()],
    }


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """Markdown: mean and standard deviation over seeds, and how often evolution was ahead of each on the same seed."""
    lines = [
        f"| budget | strategy | seeds | held-out {metric}, mean ± std over seeds | best on the search's own probes "
        "| evaluations | denoiser calls | evolution ahead, paired seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for budget in sorted({row["budget"] for row in rows}):
        by_seed = {row["seed"]: row["heldout_mean"] for row in rows
                   if row["budget"] == budget and row["strategy"] == "evolution"}  # fmt: skip
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            cells = [row for row in rows if row["budget"] == budget and row["strategy"] == strategy]
            if not cells:
                continue

            def spread(name: str, cells: list[dict[str, Any]] = cells) -> str:
                values = [cell[name] for cell in cells]
                return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"

            paired = [by_seed[c["seed"]] > c["heldout_mean"] for c in cells if c["seed"] in by_seed]
            ahead = f"{sum(paired)} of {len(paired)}" if strategy != "evolution" else ""
            calls = statistics.mean(cell["denoiser_calls"] for cell in cells)
            lines.append(
                f"| {budget} | {strategy} | {len(cells)} | {spread('heldout_mean')} | {spread('search')} "
                f"| {max(cell['evaluations'] for cell in cells)} | {calls:,.0f} | {ahead} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-evals", type=int, default=120)
    parser.add_argument("--metric", default="ssim")
    parser.add_argument("--probes", type=int, default=RunConfig().probes)
    parser.add_argument("--heldout", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", default="compare_strategies", help="file name of the results without its ending")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(metric=args.metric, probes=args.probes, heldout=args.heldout, max_evals=args.max_evals)
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=16, metric="latent_mse")
        config = replace(config, max_evals=3)
        args.budgets, args.seeds = [0.5], 1
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    cells = [
        replace(config, budget=budget, strategy=strategy, seed=seed)
        for seed in range(args.seeds)
        for budget in args.budgets
        for strategy in args.strategies
    ]
    done = [RunConfig().to_json() | row["settings"] for row in rows]  # settings that came later had their defaults
    cells = [cell for cell in cells if cell.to_json() not in done]
    if cells:
        bench = prepare(config, OneLine())
        heldout = bench.evaluator(config.heldout, HELDOUT_SEED, "heldout")
        for i, cell in enumerate(cells):
            print(f"cell {i + 1} of {len(cells)}: {cell.strategy}, budget {cell.budget}, seed {cell.seed}", flush=True)
            found = run_cell(with_budget(bench, cell.budget), cell.strategy, cell.seed, cell.max_evals, heldout)
            place = {"budget": cell.budget, "strategy": cell.strategy, "seed": cell.seed}
            rows.append(place | found | config_record(cell) | {"threads": torch.get_num_threads()})
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    text = table(rows, config.metric)
    (args.out / f"{args.name}.md").write_text(text)
    for budget in args.budgets:
        curves = {
            strategy: [row["curve"] for row in rows if (row["budget"], row["strategy"]) == (budget, strategy)]
            for strategy in args.strategies
            if strategy != "uniform"
        }
        convergence_bands(curves, config.metric, args.out / f"{args.name}_{budget:g}.png")
    print(text)


if __name__ == "__main__":
    main()
