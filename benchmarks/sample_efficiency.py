"""How many denoiser calls does `surrogate` need to be where the reference evolution ends?

For every seed the paper's evolution (mu = 4, lambda = 16, 50 generations) runs first, then `surrogate` on the same
probes with a share of the denoiser calls that it took. What they found is scored on held-out probes that neither saw.
What is finished is in the results file and is not run again; a search that was interrupted goes on from its journal.

    python benchmarks/sample_efficiency.py --models fashion-dit --share 0.2         # about an hour on one CPU core
    python benchmarks/sample_efficiency.py --models emoji-sdxl --evaluations 400    # likewise, half of the generations
    python benchmarks/sample_efficiency.py --smoke                                  # tiny, two seeds
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
from diffes.bench import HeldOut, Workbench, prepare, search_on, vary
from diffes.config import RunConfig
from diffes.folder import config_record
from diffes.progress import RichProgress
from diffes.store import EvaluationStore

RESULTS = Path(__file__).parent / "results"
REFERENCE = "evolution:mu=4,lam=16"


def run(bench: Workbench, heldout: HeldOut, journal: Path) -> dict[str, Any]:
    """One search, its result on held-out probes, and the points at which its best rose."""
    config = bench.config
    result = search_on(bench, RichProgress(), EvaluationStore(journal, bench.space))
    best, curve = result.best.schedule, list(zip(result.calls(), result.curve(), strict=True))
    rises = [point for i, point in enumerate(curve) if i == 0 or point[1] > curve[i - 1][1]]
    return {
        "model": config.model, "strategy": config.strategy, "seed": config.seed, "levels": list(best.levels),
        "search": result.best.fitness, "heldout": heldout(best)[0],
        "uniform_heldout": heldout(bench.space.schedule(bench.space.uniform()))[0],
        "evaluations": len(result.evaluations), "denoiser_calls": result.denoiser_calls,
        "seconds": round(result.seconds, 1), "curve": rises, **config_record(config),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line for each model: medians over seeds, and what share of the calls was enough."""
    lines = [
        "| model | seeds | uniform, held out | reference, held out | surrogate, held out | at least the reference "
        "| calls, reference | calls, surrogate | share of the calls at which it passes the reference on the search's "
        "probes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        reference = {r["seed"]: r for r in rows if (r["model"], r["strategy"]) == (model, REFERENCE)}
        ours = {r["seed"]: r for r in rows if r["model"] == model and r["strategy"] == "surrogate"}
        seeds = sorted(reference.keys() & ours.keys())
        ahead = sum(ours[s]["heldout"] >= reference[s]["heldout"] for s in seeds)
        passed = [
            min((c for c, best in ours[s]["curve"] if best >= reference[s]["search"]), default=float("inf"))
            / reference[s]["denoiser_calls"]
            for s in seeds
        ]
        never = sum(share == float("inf") for share in passed)

        def median(group: dict[int, dict[str, Any]], key: str, seeds: Sequence[int] = seeds) -> float:
            return statistics.median(group[s][key] for s in seeds)

        share = statistics.median(passed)
        cells = (
            model, len(seeds), f"{median(ours, 'uniform_heldout'):.4f}", f"{median(reference, 'heldout'):.4f}",
            f"{median(ours, 'heldout'):.4f}", f"{ahead} of {len(seeds)}", f"{median(reference, 'denoiser_calls'):,.0f}",
            f"{median(ours, 'denoiser_calls'):,.0f}",
            f"{f'{share:.0%}' if share < 1 else 'not within its share'} (median; not at all: {never})",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=816, help="of the reference")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the reference's calls, for surrogate")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(steps=10, guidance=1.0, probes=8)
    if args.smoke:
        config = replace(config, stages=4, steps=4, probes=2, heldout=4, calibration_samples=8)
        args.seeds, args.evaluations = 2, 40
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        path = args.out / f"sample_efficiency_{model}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        done = {(row["strategy"], row["seed"]): row for row in rows}
        bench: Workbench | None = None
        for strategy in (REFERENCE, "surrogate"):
            for seed in range(args.seeds):
                if (strategy, seed) in done:
                    continue
                if bench is None:
                    bench = prepare(replace(config, model=model), RichProgress())
                    heldout = HeldOut(bench)
                cell = replace(bench.config, strategy=strategy, seed=seed, max_evals=args.evaluations)
                if strategy != REFERENCE:
                    cell = replace(cell, max_calls=round(args.share * done[REFERENCE, seed]["denoiser_calls"]))
                journal = Path("runs/sample_efficiency") / f"{model}-{strategy.partition(':')[0]}-{seed}.journal"
                row = run(vary(bench, cell, RichProgress()), heldout, journal)
                done[strategy, seed] = row
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [
        json.loads(line)
        for path in sorted(args.out.glob("sample_efficiency_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    (args.out / "sample_efficiency.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
