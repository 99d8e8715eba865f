"""Dense calls at chosen timesteps against plans that choose timesteps and levels together, at equal cost.

One calibration and one table of local errors a model and seed serve all budgets. At each, in dense calls by
multiply-accumulates or by measured milliseconds: the four kinds of `diffes front`, the search of plans with no more
denoiser calls than that of dense ones, and the plans that the table alone makes. Scores are latent MSE and SSIM on
held-out probes against the dense model at 200 steps; whole runs are timed at batches 1 and 16, all kinds of a budget
taking turns. Beside each plan stands how many dense calls are as good, on the lines through the points of `dense`,
which go on beyond the budgets, and of `dense-planned`. `--method` takes what reuses as well. Finished points are lines
of `points.jsonl` and are not run again.

    python benchmarks/fronts.py --models fashion-dit --budgets 4 6 8 --seeds 0 1 2    # an hour on two CPU cores
    python benchmarks/fronts.py --cost latency --batch 1                              # for the time of one image
    python benchmarks/fronts.py --models emoji-sdxl --guidance 1 --method obs+deep_reuse
    python benchmarks/fronts.py --smoke                                               # tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffes.adapters import shipped_models
from diffes.measure.error_table import MeasuredTable
from diffes.measure.metrics import make_metric
from diffes.progress import RichProgress
from diffes.search.schedule import Schedule
from diffes.study import front
from diffes.study.config import RunConfig
from diffes.study.folder import config_record
from diffes.study.plans import Plans
from diffes.study.settings import PLANNED
from diffes.study.workbench import prepare

RESULTS = Path(__file__).parent / "results" / "fronts"
BATCHES = (1, 16)  # at which whole runs are timed
ALONE = {"dense-planned, table alone": "steps", "joint, table alone": "joint"}
KINDS = ("dense", "dense-planned, table alone", "dense-planned", "levels", "joint, table alone", "joint")
SETTINGS = ("model", "method", "guidance", "solver", "currency", "batch", "probes", "strategy")
BEYOND = (14.0, 16.0, 20.0, 24.0)  # dense calls, to see how many are as good as a plan


def points(plans: Plans, table: MeasuredTable, budget: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each kind at one budget, and for the plans that the table alone makes."""
    found = front.searched(plans, table, budget)
    for kind, genes in ALONE.items():
        space = plans.space(budget, genes)  # type: ignore[arg-type]
        start = plans.starts(table, budget, genes)[0]  # type: ignore[arg-type]
        found.append(front.Point(kind, budget, space.any_schedule(start), table.calls))
    rows = [row(plans, point.kind, point.genome, point.calls_spent) for point in found]
    routed = [plans.heldout.plan(point.genome) for point in found]
    for batch in BATCHES:
        for each, ms in zip(rows, plans.bench.milliseconds(routed, batch, repeats), strict=True):
            each[f"ms_{batch}"] = round(ms, 2)
    return rows


def beyond(plans: Plans) -> list[dict[str, Any]]:
    """Rows of evenly spaced dense calls at more than any budget."""
    return [row(plans, "dense", plans.dense(calls)[0], 0) | {"budget": calls} for calls in BEYOND]


def row(plans: Plans, kind: str, genome: Schedule, spent: int) -> dict[str, Any]:
    """One plan on held-out probes."""
    heldout, decode = plans.heldout, plans.bench.adapter.decode
    latents = heldout.latents(genome)
    scores = -heldout.scored(latents)
    ssim = make_metric("ssim", plans.bench.adapter.device)(decode(latents), decode(heldout.final_reference))
    plan = heldout.plan(genome)
    return {
        "kind": kind, "dense_calls": round(plans.cost(genome), 4), "n_calls": len(plan.calls),
        "latent_mse": float(scores.mean()), "std": float(scores.std()), "ssim": float(ssim.mean()),
        "timesteps": list(plan.timesteps), "levels": list(plan.levels), "calls_spent": spent,
    }  # fmt: skip


def as_good(mse: float, curve: Sequence[tuple[float, float]]) -> str:
    """Cost at which a curve of (cost, mean latent MSE) reaches an error, on straight lines between its logarithms."""
    costs, errors = (np.log(each) for each in zip(*sorted(curve), strict=True))
    best = np.minimum.accumulate(errors)
    if np.log(mse) < best[-1]:
        return f"> {np.exp(costs[-1]):.3g}"
    if np.log(mse) > best[0]:
        return f"< {np.exp(costs[0]):.3g}"
    return f"{np.exp(np.interp(-np.log(mse), -best, costs)):.2f}"


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds, a line for each setting and budget."""
    columns = [*SETTINGS, "budget", "seeds", *KINDS, "over dense", "over dense-planned", "as good: dense"]
    columns += ["as good: dense-planned", "ms at 1 and 16: dense-planned", "joint"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    groups: dict[tuple[Any, ...], dict[float, dict[str, list[dict[str, Any]]]]] = {}
    for each in rows:
        at = groups.setdefault(tuple(each[name] for name in SETTINGS), {}).setdefault(each["budget"], {})
        at.setdefault(each["kind"], []).append(each)
    for setting, budgets in sorted(groups.items()):
        curves: dict[str, list[tuple[float, float]]] = {}
        for budget, kinds in budgets.items():
            for kind, points in kinds.items():
                curves.setdefault(kind, []).append((budget, statistics.mean(p["latent_mse"] for p in points)))
        for budget, kinds in sorted(budgets.items()):
            if "joint" not in kinds:
                continue
            mean = {kind: dict(curve)[budget] for kind, curve in curves.items() if kind in kinds}
            cells = [_spread([p["latent_mse"] for p in kinds.get(kind, [])]) for kind in KINDS]
            gains = [f"{mean[rival] / mean['joint']:.2f}x" for rival in ("dense", "dense-planned")]
            good = [as_good(mean["joint"], curves[rival]) for rival in ("dense", "dense-planned")]
            ms = [
                " and ".join(f"{statistics.mean(p[f'ms_{b}'] for p in kinds[kind]):.0f}" for b in BATCHES)
                for kind in ("dense-planned", "joint")
            ]
            start = [*map(str, setting), f"{budget:g}", str(len(kinds["joint"]))]
            lines.append(f"| {' | '.join([*start, *cells, *gains, *good, *ms])} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    return " ± ".join([f"{statistics.mean(values):.5f}", *([f"{statistics.stdev(values):.5f}"] if values[1:] else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--budgets", type=float, nargs="+", default=[3, 4, 5, 6, 8, 10, 12], help="in dense calls")
    parser.add_argument("--method", default="obs", help="what levels do: a pruning method, one that reuses, or a sum")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration and search probes")
    parser.add_argument("--solver", default="dpmsolver++")
    parser.add_argument("--strategy", default="evolution", help="of the searches of plans")
    parser.add_argument("--cost", choices=("macs", "latency"), default="macs")
    parser.add_argument("--batch", type=int, default=16, help="at which calls are timed")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--probes", type=int, default=32, help="of the table and the searches")
    parser.add_argument("--max-evals", type=int, default=80, help="of each search")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(
        cost=args.cost, budget=1.0, metric="latent_mse", guidance=args.guidance, max_evals=args.max_evals,
        method=args.method, probes=args.probes, strategy=args.strategy,
    )  # fmt: skip
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=8)
        args.models, args.budgets, args.seeds, args.nodes = ["fashion-dit"], [3], [0], 8
        args.out = Path("runs/smoke/fronts") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "points.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for model in args.models:
        for seed in args.seeds:
            settings = {"model": model, "method": args.method, "guidance": args.guidance, "seed": seed}
            settings |= {"solver": args.solver, "currency": args.cost, "batch": args.batch}
            settings |= {"probes": config.probes, "strategy": config.strategy}
            same = [each for each in rows if all(each[name] == value for name, value in settings.items())]
            done = {each["budget"] for each in same}
            left = [budget for budget in args.budgets if budget not in done]
            if not left:
                continue
            bench = prepare(replace(config, model=model, seed=seed), RichProgress(), example=PLANNED)
            plans = Plans(bench, args.solver, args.nodes, 20 if args.smoke else 200, timed_at=args.batch)
            table = plans.table()
            leaves = np.array(plans.call_costs)[bench.space.visited].mean(0)
            settings |= {"leaves": [round(float(share), 4) for share in leaves / leaves[0]]}
            if not (args.smoke or done & set(BEYOND)):
                rows += (made := [each | settings for each in beyond(plans)])
                with path.open("a") as file:
                    file.writelines(json.dumps(each) + "\n" for each in made)
            for budget in left:
                start = time.perf_counter()
                made = points(plans, table, budget, 1 if args.smoke else 5)
                facts = settings | {"budget": budget, "evals": config.max_evals, "nodes": args.nodes}
                facts |= {"seconds": round(time.perf_counter() - start, 1), **config_record(bench.config)}
                rows += [each | facts for each in made]
                with path.open("a") as file:
                    file.writelines(json.dumps(each | facts) + "\n" for each in made)
                (args.out / "table.md").write_text(table_of(rows))
    print(table_of(rows))


if __name__ == "__main__":
    main()
