"""Where should a search of plans begin? The table's plans, or what the paper begins with, at equal denoiser calls.

For every model, budget and seed: the plan that the table alone makes; a search that begins with the table's plans; and
one that begins with even and random plans, as the paper's does with even and random schedules, and has in addition the
denoiser calls that the table took. Scores are latent MSE on held-out probes against the dense model at 200 steps.
Finished rows are lines of `starts.jsonl` and are not run again.

    python benchmarks/plan_starts.py --models fashion-dit                # an hour on two CPU cores
    python benchmarks/plan_starts.py --models emoji-sdxl --guidance 1
    python benchmarks/plan_starts.py --smoke                              # tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffes.adapters import shipped_models
from diffes.measure.error_table import MeasuredTable
from diffes.progress import RichProgress
from diffes.study.config import RunConfig
from diffes.study.folder import config_record
from diffes.study.plans import Plans
from diffes.study.settings import PLANNED
from diffes.study.workbench import prepare

RESULTS = Path(__file__).parent / "results" / "plan_starts"
STARTS = ("table alone", "table, searched", "even and random, searched")


def rows_of(plans: Plans, table: MeasuredTable, budget: float) -> list[dict[str, Any]]:
    """A row for each way to begin, at one budget."""
    starts = plans.starts(table, budget)
    begun = plans.search(budget, starts=starts, table=table)
    spent = table.calls + begun.denoiser_calls
    config = replace(plans.bench.config, max_calls=spent, max_evals=10 * plans.bench.config.max_evals)
    plain = replace(plans, bench=replace(plans.bench, config=config)).search(budget)
    genomes = (plans.space(budget).schedule(starts[0]), begun.best.schedule, plain.best.schedule)
    scores = [-plans.heldout.scores(genome) for genome in genomes]
    calls = (table.calls, spent, plain.denoiser_calls)
    return [
        {"start": name, "latent_mse": float(s.mean()), "std": float(s.std()), "calls": n, "levels": list(g.levels)}
        for name, s, n, g in zip(STARTS, scores, calls, genomes, strict=True)
    ]


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = [f"| model | guidance | dense calls | seeds | {' | '.join(STARTS)} | denoiser calls |", "|" + "---|" * 8]
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["guidance"], row["budget"]), []).append(row)
    for (model, guidance, budget), found in sorted(groups.items()):
        by_start = [[row["latent_mse"] for row in found if row["start"] == name] for name in STARTS]
        spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in by_start]
        cells = [f"{statistics.mean(each):.5f} ± {s:.5f}" for each, s in zip(by_start, spread, strict=True)]
        calls = statistics.mean(row["calls"] for row in found if row["start"] == STARTS[1])
        lines.append(
            f"| {model} | {guidance:g} | {budget:g} | {len(by_start[0])} | {' | '.join(cells)} | {calls:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--budgets", type=float, nargs="+", default=[4, 6], help="in dense calls")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--probes", type=int, default=32, help="of the table and the searches")
    parser.add_argument("--max-evals", type=int, default=80, help="of each search")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(
        cost="macs", budget=1.0, metric="latent_mse", guidance=args.guidance, probes=args.probes,
        max_evals=args.max_evals,
    )  # fmt: skip
    nodes, reference = 64, 200
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=4)
        args.models, args.budgets, args.seeds, nodes, reference = ["fashion-dit"], [3], 1, 8, 20
        args.out = Path("runs/smoke/plan_starts") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "starts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for model in args.models:
        for seed in range(args.seeds):
            setting = {"model": model, "guidance": args.guidance, "probes": config.probes, "seed": seed}
            done = {row["budget"] for row in rows if all(row[name] == value for name, value in setting.items())}
            if not (left := [budget for budget in args.budgets if budget not in done]):
                continue
            bench = prepare(replace(config, model=model, seed=seed), RichProgress(), example=PLANNED)
            plans = Plans(bench, nodes=nodes, reference_steps=reference)
            table = plans.table()
            for budget in left:
                facts = setting | {"budget": budget, **config_record(bench.config)}
                made = [row | facts for row in rows_of(plans, table, budget)]
                rows += made
                with path.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in made)
                (args.out / "table.md").write_text(table_of(rows))
    print(table_of(rows))


if __name__ == "__main__":
    main()
