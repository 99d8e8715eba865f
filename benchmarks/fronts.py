"""Dense calls at chosen timesteps against plans that choose timesteps and levels together, at equal cost.

One calibration and one table of local errors a model and seed serve all budgets. For every budget, in dense calls by
multiply-accumulates: `dense`, evenly spaced calls; `dense-planned`, timesteps of the table and then of a search;
`joint`, timesteps and levels, likewise, whose search also begins with the best of `dense-planned` and so never ends
behind it on the search's probes. Both searches have as many evaluations. Scores are latent MSE on held-out probes
against the dense model at 200 steps. Finished points are lines of `points.jsonl` and are not run again.

    python benchmarks/fronts.py --models fashion-dit --budgets 4 6 8    # about half an hour on two CPU cores
    python benchmarks/fronts.py --smoke                                 # tiny
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

from diffes.adapters import shipped_models
from diffes.measure.error_table import MeasuredTable
from diffes.progress import RichProgress
from diffes.search.schedule import Schedule
from diffes.study.config import RunConfig
from diffes.study.folder import config_record
from diffes.study.plans import Plans
from diffes.study.workbench import prepare

RESULTS = Path(__file__).parent / "results" / "fronts"


def points(plans: Plans, table: MeasuredTable, calls: float, evals: int) -> list[dict[str, Any]]:
    """A row for each kind at one budget, and for the plans that the table alone makes."""
    dense = plans.space(calls, "steps")
    rows = [row("dense", plans, dense.schedule(dense.uniform()), 0)]
    before: tuple[int, ...] | None = None
    for kind, genes in (("dense-planned", "steps"), ("joint", "joint")):
        starts = plans.starts(table, calls, genes)  # type: ignore[arg-type]
        rows.append(row(f"{kind}, table alone", plans, dense.any_schedule(starts[0]), table.calls))
        starts += [before] if before is not None else []
        found = plans.search(calls, genes, starts=starts, max_evals=evals)  # type: ignore[arg-type]
        rows.append(row(kind, plans, found.best.schedule, table.calls + found.denoiser_calls))
        before = found.best.schedule.levels
    return rows


def row(kind: str, plans: Plans, genome: Schedule, spent: int) -> dict[str, Any]:
    """One plan on held-out probes."""
    scores = -plans.heldout.scores(genome)
    plan = plans.heldout.plan(genome)
    return {
        "kind": kind, "cost": round(plans.cost(genome), 4), "n_calls": len(plan.calls),
        "latent_mse": float(scores.mean()), "std": float(scores.std()), "timesteps": list(plan.timesteps),
        "levels": list(plan.levels), "calls_spent": spent,
    }  # fmt: skip


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean over seeds, a line for each model, guidance and budget."""
    kinds = ("dense", "dense-planned, table alone", "dense-planned", "joint, table alone", "joint")
    lines = [f"| model | guidance | dense calls | seeds | {' | '.join(kinds)} | gain over dense-planned |"]
    lines.append("|" + "---|" * (len(kinds) + 5))
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for each in rows:
        groups.setdefault((each["model"], each["guidance"], each["budget"]), []).append(each)
    for (model, guidance, budget), found in sorted(groups.items()):
        by_kind = {kind: [each["latent_mse"] for each in found if each["kind"] == kind] for kind in kinds}
        means = {kind: statistics.mean(values) for kind, values in by_kind.items()}
        cells = [f"{means[kind]:.5f}" for kind in kinds]
        gain = means["dense-planned"] / means["joint"]
        start = f"| {model} | {guidance:g} | {budget:g} | {len(by_kind['joint'])} "
        lines.append(f"{start}| {' | '.join(cells)} | {gain:.2f}x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--budgets", type=float, nargs="+", default=[3, 4, 5, 6, 8, 10, 12], help="in dense calls")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration and search probes")
    parser.add_argument("--solver", default="dpmsolver++")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--max-evals", type=int, default=160, help="of each search")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(cost="macs", budget=1.0, metric="latent_mse", guidance=args.guidance)
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8)
        args.models, args.budgets, args.seeds, args.nodes, args.max_evals = ["fashion-dit"], [3], [0], 8, 12
        args.out = Path("runs/smoke/fronts") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "points.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for model in args.models:
        for seed in args.seeds:
            settings = {"model": model, "guidance": args.guidance, "seed": seed, "solver": args.solver}
            done = {each["budget"] for each in rows if all(each[name] == value for name, value in settings.items())}
            left = [budget for budget in args.budgets if budget not in done]
            if not left:
                continue
            bench = prepare(replace(config, model=model, seed=seed), RichProgress())
            plans = Plans(bench, args.solver, args.nodes, 20 if args.smoke else 200)
            table = plans.table()
            for budget in left:
                start = time.perf_counter()
                made = points(plans, table, budget, args.max_evals)
                facts = settings | {"budget": budget, "evals": args.max_evals, "nodes": args.nodes}
                facts |= {"seconds": round(time.perf_counter() - start, 1), **config_record(bench.config)}
                rows += [each | facts for each in made]
                with path.open("a") as file:
                    file.writelines(json.dumps(each | facts) + "\n" for each in made)
                (args.out / "table.md").write_text(table_of(rows))
    print(table_of(rows))


if __name__ == "__main__":
    main()
