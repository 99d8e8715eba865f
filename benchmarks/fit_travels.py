"""Does a fit travel? Coefficients made at one guidance, on one kind of prompts and in fp32, used at others.

Takes the dense-fitted plan of `fronts.py`, seed 0, and measures it on held-out probes against references of their own:
at other guidances; in fp16 and bf16, against the reference in the same dtype; with other numbers of images a call; and,
for text to image, on prompts of another kind than those of the model. Beside it stand DPM-Solver++ 2M at the same
timesteps, and the plan fitted again where it is used. Finished rows are lines of `fit_travels.jsonl`.

    python benchmarks/fit_travels.py            # half an hour on one CPU core
    python benchmarks/fit_travels.py --smoke    # a few probes
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fronts import GUIDANCE, keep, read
from fronts import RESULTS as FRONTS

from diffes.adapters import adapter_for, load_pipeline
from diffes.adapters.prompts import default_prompts
from diffes.config import HELDOUT_SEED
from diffes.measure.metrics import make_metric
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.measure.polish import polished
from diffes.problems.plans import FIT_SEED
from diffes.pruning.bank import WeightBank
from diffes.runtime.router import Router
from diffes.spaces.schedule import Plan, Stages

RESULTS = Path(__file__).parent / "results"
MEASURED = ("2M", "as made", "fitted there")
LEVELS = 8  # of the shipped models


def settings(model: str) -> Iterator[dict[str, Any]]:
    """Yield the settings that a plan is used at: those in which they differ from where it was made."""
    own = GUIDANCE[model]
    yield {"guidance": own}
    for guidance in (1.5, 2.0, 3.0, 4.0):
        if guidance != own:
            yield {"guidance": guidance}
    for batch in (1, 8):
        yield {"guidance": own, "batch": batch}
    for dtype in ("bfloat16", "float16"):
        yield {"guidance": own, "dtype": dtype}
    if model == "emoji-sdxl":
        yield {"guidance": own, "prompts": "other"}


def measure(model: str, plan: Plan, where: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Latent MSE of a plan, of 2M at its timesteps, and of the plan fitted there."""
    pipe = load_pipeline(model, dtype=getattr(torch, where.get("dtype", "float32")))
    adapter = adapter_for(pipe)
    if where.get("prompts") == "other":
        adapter.prompts = default_prompts()  # type: ignore[attr-defined]
    router = Router(adapter, WeightBank({}, "width", max_level=LEVELS))

    def evaluator(n: int, seed: int, split: Any, fits: bool) -> PlanEvaluator:
        return PlanEvaluator(
            router, plan.stages, "fitted", adapter.make_probes(n, seed, split), guidance=where["guidance"],
            metric=make_metric("latent_mse", adapter.device), reference_steps=args.steps, fits=fits,
            batch=where.get("batch", 32),
        )  # fmt: skip

    heldout = evaluator(args.probes, HELDOUT_SEED, "heldout", False)
    fits = evaluator(args.probes, FIT_SEED, "search", True)
    again = polished(fits, fits.fitted(plan))  # as `diffes fit` does
    found = {"as made": plan, "2M": replace(plan, coefficients=None, solver="dpmsolver++"), "fitted there": again}
    return {name: -float(heldout.scores(each).mean()) for name, each in found.items()}


def plan_at(model: str, budget: float, folder: Path) -> Plan:
    """The dense-fitted plan of a budget, seed 0."""
    wanted = {"kind": "dense-fitted", "budget": budget, "seed": 0, "currency": "macs", "method": "obs"}
    rows = read(folder / f"points-{model}.jsonl")
    row = next(row for row in rows if all(row[name] == value for name, value in wanted.items()))
    facts = {"stages": Stages.equal(1).ranges, "max_level": LEVELS}
    return Plan.from_json({**facts, **{name: row[name] for name in ("timesteps", "levels", "solver", "coefficients")}})


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each place of use."""
    head = ["model", "calls", "guidance", "images a call", "dtype", "prompts", "2M", "fitted, as made", "fitted there"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], f"{row['calls']:g}", f"{row['guidance']:g}", str(row.get("batch", 32))]
        cells += [row.get("dtype", "float32"), row.get("prompts", "own")]
        cells += [f"{row[name]:.5f}" for name in MEASURED]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GUIDANCE))
    parser.add_argument("--calls", type=float, default=6.0, help="budget of the plan, in dense calls")
    parser.add_argument("--points", type=Path, default=FRONTS, help="folder that `fronts.py` wrote")
    parser.add_argument("--probes", type=int, default=64, help="of the fit, and held out")
    parser.add_argument("--steps", type=int, default=200, help="of the reference")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.probes, args.steps, args.out = 2, 10, Path("runs/smoke")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "fit_travels.jsonl"
    rows = read(path) if not args.smoke else []
    for model in args.models:
        plan = plan_at(model, args.calls, args.points)
        for where in settings(model):
            facts = {"model": model, "calls": args.calls, "probes": args.probes, **where}
            if facts in [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]:
                continue
            keep(facts | measure(model, plan, where, args), rows, path, table_of)
    print(table_of(rows))


if __name__ == "__main__":
    main()
