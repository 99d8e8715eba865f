"""Does DEAP's own `eaMuPlusLambda` find as good a schedule as `evolution`, at equal evaluations?

For every seed `deap.algorithms.eaMuPlusLambda` runs on `bench.toolbox()` as DEAP's documentation shows it, then
`evolution` of the same mu and lambda on the same probes, for as many distinct evaluations as DEAP's took (its `varOr`
may repeat a schedule, which is paid for once). What they found is scored on held-out probes that neither saw.

    python benchmarks/plain_deap.py            # some minutes on two CPU cores
    python benchmarks/plain_deap.py --smoke    # tiny, two seeds
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from deap import algorithms, tools

from diffes.config import RunConfig
from diffes.problems.heldout import record_of
from diffes.problems.workbench import Workbench, prepare, search_on, vary
from diffes.progress import RichProgress
from diffes.results.folder import config_record
from diffes.results.record import UNIFORM
from diffes.spaces.ledger import SearchResult

RESULTS = Path(__file__).parent / "results"
MU, LAMBDA, FIRST = 4, 8, 16


def with_deap(bench: Workbench, seed: int, generations: int) -> tuple[SearchResult, tools.Logbook]:
    """DEAP's algorithm, with its statistics and hall of fame."""
    toolbox = bench.toolbox(seed=seed)
    stats = tools.Statistics(lambda genome: genome.fitness.values)
    stats.register("mean", np.mean)
    stats.register("max", np.max)
    fame = tools.HallOfFame(1)
    random.seed(seed)  # what DEAP's own varOr draws from
    _, logbook = algorithms.eaMuPlusLambda(
        toolbox.population(FIRST), toolbox, mu=MU, lambda_=LAMBDA, cxpb=0.3, mutpb=0.7, ngen=generations, stats=stats,
        halloffame=fame, verbose=False,
    )  # fmt: skip
    result = toolbox.result()
    assert tuple(fame[0]) == result.best.schedule.levels or fame[0].fitness.values == (result.best.fitness,)
    return result, logbook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--generations", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--allocation", choices=("sensitivity", "equal"), default="sensitivity", help="of levels over layers"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(
        genes="levels",
        model=args.model,
        allocation=args.allocation,
        steps=10,
        guidance=1.0,
        probes=8,
        strategy=f"evolution:mu={MU},lam={LAMBDA}",
    )
    if args.smoke:
        config = replace(config, stages=4, steps=4, probes=2, heldout=4, calibration_samples=8, metric="latent_mse")
        args.seeds, args.generations = 2, 2
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    progress = RichProgress()
    bench = prepare(config, progress)
    rows = []
    for seed in range(args.seeds):
        here = vary(bench, replace(config, seed=seed), progress)
        found, logbook = with_deap(here, seed, args.generations)
        deap = record_of(here, found)
        here = vary(here, replace(here.config, max_evals=deap.evaluations), progress)
        ours = record_of(here, search_on(here, progress))
        row: dict[str, Any] = {"seed": seed, "generations": len(logbook) - 1}
        for name, record in (("deap", deap), ("evolution", ours)):
            row[name] = {
                "heldout": record.searched.heldout_mean, "search": record.searched.search,
                "levels": list(record.found.levels), "evaluations": record.evaluations,
                "denoiser_calls": record.denoiser_calls,
            }  # fmt: skip
        rows.append(row | {"uniform_heldout": deap.rivals[UNIFORM].heldout_mean} | config_record(here.config))
    (args.out / "plain_deap.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = table(rows)
    (args.out / "plain_deap.md").write_text(text)
    print(text)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a seed and the mean."""
    lines = [
        "| seed | evaluations | eaMuPlusLambda, held out | evolution, held out | calls, eaMuPlusLambda "
        "| calls, evolution |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        deap, ours = row["deap"], row["evolution"]
        lines.append(
            f"| {row['seed']} | {deap['evaluations']} | {deap['heldout']:.4f} | {ours['heldout']:.4f} "
            f"| {deap['denoiser_calls']:,} | {ours['denoiser_calls']:,} |"
        )
    spread = [
        f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        for values in ([row[name]["heldout"] for row in rows] for name in ("deap", "evolution"))
    ]
    return "\n".join([*lines, f"| mean | | {spread[0]} | {spread[1]} | | |"]) + "\n"


if __name__ == "__main__":
    main()
