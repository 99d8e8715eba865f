"""What would plans save where thin calls take as little time as their MACs say? On the times of DiT-XL/2-256's shape.

First the milliseconds of one guided call of DiT-XL/2-256 (random weights: time does not depend on them) at every second
level, the change of weights included, levels taking turns. Then plans of `fashion-dit` for that table of times
in place of its own: what a plan gains at equal time on a transformer of full size, as far as its errors are alike.

    python benchmarks/plan_times.py            # needs 10 GB of memory, half an hour on two CPU cores
    python benchmarks/plan_times.py --smoke    # two blocks, tiny searches
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from published_models import adapter_of, dit

from diffes.config import RunConfig
from diffes.measure.currencies import Calls, macs_by_level, ms_by_level
from diffes.problems.plans import Plans
from diffes.problems.workbench import prepare
from diffes.progress import RichProgress
from diffes.pruning import METHODS
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.results.folder import config_record
from diffes.runtime.router import Router
from diffes.spaces.schedule import Stages
from diffes.study import front

RESULTS = Path(__file__).parent / "results"


def times(repeats: int, batch: int, **changes: int) -> dict[str, list[float]]:
    """Shares of a dense call, by level: milliseconds with and without the change of weights, and MACs."""
    adapter, stages = adapter_of(dit(**changes)), Stages.equal(1)
    every = build_bank(adapter, METHODS.make("magnitude"), stages, None, guidance=1.0, seed=0, allocation="equal")
    top = adapter.max_level("width") // 2  # every second level, as many as `fashion-dit` has
    bank = WeightBank({(0, k): every[0, 2 * k] for k in range(1, top + 1)}, every.kind, max_level=top)
    router = Router(adapter, bank, resident="all")
    probes = adapter.make_probes(batch, 0)
    macs = macs_by_level(router, stages, [0], top)[0]
    found = {"macs": [m / macs[0] for m in macs]}
    for name, changing in (("ms, one level", False), ("ms, changing", True)):
        row = ms_by_level(Calls(router, stages, [0], top, probes, changing), repeats)[0]
        found[name] = [ms / row[0] for ms in row]
        found[f"{name}, dense"] = [row[0]]
    return found


def table_of(data: dict[str, object]) -> str:
    """Markdown: the times, then the plans."""
    shares: dict[str, list[float]] = data["times"]  # type: ignore[assignment]
    names = [name for name in shares if not name.endswith("dense")]
    lines = [f"| level | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {k} | {' | '.join(f'{shares[name][k]:.3f}' for name in names)} |" for k in range(len(shares["macs"]))]
    lines += ["", "| dense calls, by that time | kind | calls | held-out latent MSE |", "|---|---|---|---|"]
    for point in data["points"]:  # type: ignore[attr-defined]
        lines.append(f"| {point['budget']:g} | {point['kind']} | {point['n_calls']} | {point['latent_mse']:.5f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4, 6, 8], help="in dense calls, by time")
    parser.add_argument("--max-evals", type=int, default=80, help="of each search")
    parser.add_argument("--batch", type=int, default=2, help="images a call, as with guidance")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(cost="macs", metric="latent_mse", probes=32, max_evals=args.max_evals, strategy="evolution")
    nodes, reference = 64, 200
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=4)
        nodes, reference, args.budgets = 8, 20, [3]
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        shares = times(1 if args.smoke else 3, args.batch, **({"num_layers": 2} if args.smoke else {}))
    bench = prepare(config, RichProgress())
    costs = [shares["ms, changing"]] * len(bench.levels.stages)
    plans = Plans(replace(bench, costs=costs), nodes=nodes, reference_steps=reference)
    points = []
    for budget in args.budgets:
        for point in front.searched(plans, budget):
            plan, mse = point.plan, -float(plans.heldout.scores(point.plan).mean())
            points.append(
                {"budget": budget, "kind": point.kind, "n_calls": len(plan.calls), "latent_mse": mse}
                | {"timesteps": list(plan.timesteps), "levels": list(plan.levels)}
            )
    data = {"times": shares, "points": points, "threads": torch.get_num_threads(), **config_record(config)}
    (args.out / "plan_times.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / "plan_times.md").write_text(table_of(data))
    print(table_of(data))


if __name__ == "__main__":
    main()
