"""How fast is the routed model beside the dense one, and how near is that to its share of the MACs?

Whole runs from noise to pixels (20 steps, guidance 2) of `fashion-dit`, uniform schedules, candidates taking turns in
one process. Beside it: the dense model with the same MACs by fewer steps, which is the limit that routing can reach.

    python benchmarks/speed.py            # a few minutes
    python benchmarks/speed.py --smoke
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffes.config import RunConfig
from diffes.problems.workbench import Workbench, prepare, vary
from diffes.progress import RichProgress
from diffes.results.folder import config_record

RESULTS = Path(__file__).parent / "results"


def measure(bench: Workbench, batch: int, budgets: list[float], repeats: int) -> list[dict[str, Any]]:
    """One row a budget; all candidates of a batch size take turns."""
    steps, progress = bench.config.steps, RichProgress()
    schedules = [vary(bench, replace(bench.config, budget=budget), progress).uniform() for budget in budgets]
    fractions = [bench.macs_fraction(schedule) for schedule in schedules]
    fewer = [bench.fewer_steps(schedule) for schedule in schedules]
    dense_ms, *rest = bench.milliseconds([steps, *schedules, *fewer], batch, repeats)
    return [
        {
            "batch": batch, "budget": budget, "macs_fraction": round(fraction, 4), "dense_ms": round(dense_ms, 1),
            "routed_ms": round(rest[i], 1), "speedup": round(dense_ms / rest[i], 3), "limit": round(1 / fraction, 3),
            "fewer_steps": fewer[i], "fewer_steps_speedup": round(dense_ms / rest[len(budgets) + i], 3),
            "repeats": repeats,
        }
        for i, (budget, fraction) in enumerate(zip(budgets, fractions, strict=True))
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--allocation", choices=("sensitivity", "equal"), default="sensitivity", help="of levels over layers"
    )
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    config = RunConfig(
        genes="levels", metric="latent_mse", method="magnitude", device=args.device, allocation=args.allocation
    )
    if args.smoke:
        config = replace(config, steps=4, stages=2)
        args.batches, args.repeats = [2], 1
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    bench = prepare(config, RichProgress())
    record = {"device": bench.adapter.device.type, "threads": torch.get_num_threads(), **config_record(config)}
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["| batch | mean sparsity | MACs | dense ms | routed ms | speed-up | limit by MACs | dense, fewer steps |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    with (args.out / "speed.jsonl").open("w") as file:
        for batch in args.batches:
            for row in measure(bench, batch, args.budgets, args.repeats):
                file.write(json.dumps(row | record) + "\n")
                lines.append(
                    f"| {batch} | {row['budget']} | {row['macs_fraction']:.1%} | {row['dense_ms']} "
                    f"| {row['routed_ms']} | {row['speedup']:.2f}x | {row['limit']:.2f}x "
                    f"| {row['fewer_steps']} steps: {row['fewer_steps_speedup']:.2f}x |"
                )
    text = "\n".join(lines) + "\n"
    (args.out / "speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
