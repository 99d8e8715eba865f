"""Gains of fitted solvers: dense calls and plans with pruned calls, at equal cost, over seeds, on held-out probes.

One calibration a model and seed serves all budgets. At each, in dense calls by multiply-accumulates or by measured
milliseconds: the kinds of `diffes front`. Scores are on 256 held-out probes against the dense model at 200 steps of
DPM-Solver++ 2M: latent MSE (mean, median, bootstrap interval, and of every probe, so that plans are compared in
pairs), MSE and SSIM of images, variance of latents. Whole runs are timed at batches 1 and 16, all kinds of a budget
taking turns. Beside each plan stands how many times its calls, or its milliseconds, `dense` and `dense-planned` need
to be as good, on the lines through their points, which go on beyond the budgets. `--method` takes what reuses as
well. Finished points are lines of `points.jsonl` and are not run again; seed 0 comes first.

    python benchmarks/fronts.py --models fashion-dit --seeds 0 1 2      # an hour and a half on one CPU core
    python benchmarks/fronts.py --models emoji-sdxl --method obs+block_reuse
    python benchmarks/fronts.py --cost latency --batch 1                # for the time of one image
    python benchmarks/fronts.py --time --seeds 0                        # milliseconds again, on an idle machine
    python benchmarks/fronts.py --table                                 # the table of what was measured
    python benchmarks/fronts.py --smoke                                 # tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffes.adapters import shipped_models
from diffes.config import RunConfig
from diffes.figures import charts, plots
from diffes.forms import PlanPoint, TimedOn
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.measure.quality import Quality, squared_errors
from diffes.measure.reference import SOLVER
from diffes.problems.plans import Plans
from diffes.problems.workbench import Workbench, prepare
from diffes.progress import RichProgress
from diffes.results.folder import config_record
from diffes.spaces.schedule import Plan
from diffes.study import front
from diffes.study.front import KINDS

RESULTS = Path(__file__).parent / "results" / "fronts"
BATCHES = (1, 16)  # at which whole runs are timed
REPEATS = 5  # of each, in turns
GUIDANCE = {"fashion-dit": 2.0, "emoji-sdxl": 1.0}  # what each model is sampled at
SETTINGS = ("model", "method", "guidance", "currency", "batch")
BEYOND = {"dense": (12.0, 16.0, 20.0, 24.0, 32.0), "dense-planned": (12.0, 16.0)}  # dense calls, to see what is as good
FOUND = ("dense-fitted", "joint")
WITH_LEVELS = (4.0, 6.0, 8.0)  # budgets at which the paper's search is run, on seed 0
DIGITS = 4  # of the errors of single probes


def jobs(budgets: Sequence[float], seed: int, method: str) -> Iterator[tuple[float, tuple[str, ...]]]:
    """Budgets and kinds of one seed, the points that the README needs first."""
    first = [budget for budget in (4.0, 6.0, 8.0, 3.0) if budget in budgets]
    for budget in (*first, *(budget for budget in budgets if budget not in first)):
        yield budget, tuple(kind for kind in KINDS if kind != "levels")
    for budget in WITH_LEVELS if seed == 0 and method == "obs" else ():  # with as many evaluations as the others
        if budget in budgets:
            yield budget, ("levels",)
    if seed == 0:
        for budget in sorted({*BEYOND["dense"], *BEYOND["dense-planned"]}):
            yield budget, tuple(kind for kind in KINDS[:3] if budget in BEYOND.get(kind, ()))


def points(plans: Plans, quality: Quality, budget: float, kinds: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A row for each kind at one budget."""
    found, rows = front.searched(plans, budget, kinds=kinds), []
    for point in found:
        row, latents = front.row_of(plans, point.kind, budget, point.final, quality)
        errors = squared_errors(latents, plans.heldout.final_reference).tolist()
        rounded = [float(f"{error:.{DIGITS}g}") for error in errors]
        rows.append(row | {"calls_spent": point.calls_spent, "errors": rounded})
    time_rows(plans.bench, rows, [point.plan for point in found], repeats)
    return rows


def time_rows(bench: Workbench, rows: Sequence[dict[str, Any]], plans: Sequence[Plan], repeats: int) -> None:
    """Milliseconds of plans, all taking turns, written into their rows."""
    for batch in BATCHES:
        for row, ms in zip(rows, bench.milliseconds(plans, batch, repeats), strict=True):
            row[f"ms_{batch}"] = round(ms, 2)


Curve = Sequence[tuple[float, float]]  # of cost and mean latent MSE


def as_good(mse: float, curve: Curve) -> str:
    """Cost at which a curve reaches an error, on straight lines between its logarithms."""
    costs, errors = (np.log(each) for each in zip(*sorted(curve), strict=True))
    best = np.minimum.accumulate(errors)
    if np.log(mse) < best[-1]:
        return f"> {np.exp(costs[-1]):.4g}"
    if np.log(mse) > best[0]:
        return f"< {np.exp(costs[0]):.4g}"
    return f"{np.exp(np.interp(-np.log(mse), -best, costs)):.4g}"


def times(cost: str, own: float) -> str:
    """A cost that `as_good` found over a plan's own."""
    bound, value = cost[:2].strip("0123456789."), float(cost.strip("<> "))
    return f"{bound}{value / own:.2f}x"


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, two tables: latent MSE of every kind, and what fitted and joint plans gain over their rivals."""
    groups: dict[tuple[Any, ...], dict[float, dict[str, list[dict[str, Any]]]]] = {}
    for each in on_lines(rows):
        at = groups.setdefault(tuple(each[name] for name in SETTINGS), {}).setdefault(each["budget"], {})
        at.setdefault(each["kind"], []).append(each)
    head = [*SETTINGS, "budget", "seeds"]
    lines = [_line([*head, *KINDS]), "|" + "---|" * (len(head) + len(KINDS))]
    columns = [
        "plan", "over dense-planned", "over off-the-shelf", "over dense", "over dense-fitted",
        "calls as good: dense-planned", "dense", "dense-fitted",
        "ms as good, batch 1: dense-planned", "dense", "batch 16: dense-planned", "dense",
        "median", "image MSE", "SSIM", "variance", "ms at 1", "at 16",
    ]  # fmt: skip
    gains = [_line([*head, *columns]), "|" + "---|" * (len(head) + len(columns))]
    for setting, budgets in sorted(groups.items()):

        def curve(kind: str, name: str, budgets: Any = budgets) -> Curve:
            known = [kinds[kind] for kinds in budgets.values() if kind in kinds]
            return [(_mean(points, name), _mean(points, "latent_mse")) for points in known]

        for budget, kinds in sorted(budgets.items()):
            start = [*map(str, setting), f"{budget:g}", str(max(map(len, kinds.values())))]
            lines.append(_line([*start, *(_spread([p["latent_mse"] for p in kinds.get(kind, [])]) for kind in KINDS)]))
            if {"dense", "dense-planned", "dense-fitted"} <= set(kinds):
                gains += [_line([*start, *_gains(kinds, kind, curve)]) for kind in FOUND if kind in kinds]
    return "\n".join(lines) + "\n\n" + "\n".join(gains) + "\n"


def on_lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with less noise in their milliseconds, which are those of seed 0.

    A dense call takes the same time in every plan. So plans of dense calls get the milliseconds of the straight line
    over the number of calls through all of them (least squares of relative errors), and pruned ones their own.
    """
    found = [dict(row) for row in rows]
    for setting in {tuple(row[name] for name in SETTINGS) for row in rows}:
        mine = [row for row in found if tuple(row[name] for name in SETTINGS) == setting]
        dense = [row for row in mine if not any(row["levels"])]
        for name in [f"ms_{batch}" for batch in BATCHES]:
            timed = [(row["n_calls"], row[name]) for row in dense if row["seed"] == 0]
            if len(timed) > 1:
                n, ms = np.array(timed).T
                fixed, each = np.linalg.lstsq(np.stack([1 / ms, n / ms], 1), np.ones(len(n)), rcond=None)[0]
                for row in dense:
                    row[name] = fixed + each * row["n_calls"]
            for row in mine:
                same = [other for other in mine if (other["kind"], other["budget"]) == (row["kind"], row["budget"])]
                row[name] = next((other[name] for other in same if other["seed"] == 0), row[name])
    return found


def _gains(kinds: dict[str, list[dict[str, Any]]], kind: str, curve: Callable[[str, str], Curve]) -> list[str]:
    """Cells of what fitted or joint plans gain."""
    found, mse = kinds[kind], _mean(kinds[kind], "latent_mse")
    rivals = ("dense-planned", "off-the-shelf", "dense", "dense-fitted")
    over = [_paired(kinds[rival], found) if rival in kinds and rival != kind else "" for rival in rivals]
    same = all(a["coefficients"] == b["coefficients"] for a, b in zip(found, kinds["dense-fitted"], strict=False))
    if kind == "joint" and same:
        over[-1] = "the same plans"
    budget = found[0]["budget"]
    calls = [times(as_good(mse, curve(rival, "budget")), budget) for rival in ("dense-planned", "dense")]
    calls.append(times(as_good(mse, curve("dense-fitted", "budget")), budget) if kind == "joint" else "")
    ms = [
        times(as_good(mse, curve(rival, f"ms_{batch}")), _mean(found, f"ms_{batch}"))
        for batch in BATCHES
        for rival in ("dense-planned", "dense")
    ]
    named = {"latent_median": 5, "image_mse": 5, "ssim": 4, "variance": 3, **{f"ms_{batch}": 0 for batch in BATCHES}}
    return [kind, *over, *calls, *ms, *(f"{_mean(found, name):.{digits}f}" for name, digits in named.items())]


def _paired(rival: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    """Return how many times less error a plan has than a rival, with the 95 % interval over their common probes."""
    by_seed = {each["seed"]: each["errors"] for each in rival}
    pairs = [(by_seed[each["seed"]], each["errors"]) for each in found if each["seed"] in by_seed]
    theirs, ours = (np.mean([pair[i] for pair in pairs], axis=0) for i in (0, 1))
    picks = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    low, high = np.quantile(theirs[picks].mean(1) / ours[picks].mean(1), (0.025, 0.975))
    return f"{theirs.mean() / ours.mean():.2f}x ({low:.2f}-{high:.2f})"


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] if row[name] is not None else float("nan") for row in rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    return " ± ".join([f"{statistics.mean(values):.5f}", *([f"{statistics.stdev(values):.5f}"] if values[1:] else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--budgets", type=float, nargs="+", default=[2, 3, 4, 5, 6, 8, 10], help="in dense calls")
    parser.add_argument("--method", default="obs", help="what levels do: a pruning method, one that reuses, or a sum")
    parser.add_argument("--guidance", type=float, help="left out: what each model is sampled at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration and search probes")
    parser.add_argument("--cost", choices=("macs", "latency"), default="macs")
    parser.add_argument("--batch", type=int, default=16, help="at which calls are timed")
    parser.add_argument("--probes", type=int, default=32, help="of the searches")
    parser.add_argument("--fit-probes", type=int, default=128, help="of the final fit")
    parser.add_argument("--heldout", type=int, default=256)
    parser.add_argument("--strategy", default="evopress", help="of the searches")
    parser.add_argument("--max-evals", type=int, default=80, help="of each search")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--time", action="store_true", help="measure only the milliseconds of points that are there")
    parser.add_argument("--table", action="store_true", help="only make the table of what was measured")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = RunConfig(
        cost=args.cost, metric="latent_mse", max_evals=args.max_evals, method=args.method,
        probes=args.probes, heldout=args.heldout, strategy=args.strategy,
    )  # fmt: skip
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=8)
        args.models, args.budgets, args.seeds, args.fit_probes = ["fashion-dit"], [3], [0], 4
        args.out = Path("runs/smoke/fronts") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    for model in () if args.table else args.models:
        run(args, replace(config, model=model, guidance=args.guidance or GUIDANCE.get(model, 1.0)))
    rows = [row for path in sorted(args.out.glob("points*.jsonl")) for row in read(path)]
    (args.out / "table.md").write_text(table_of(rows))
    for model in sorted({row["model"] for row in rows}):
        draw(args.out / f"{model}.png", [row for row in rows if row["model"] == model])
    print(table_of(rows))


def time_again(bench: Workbench, rows: Sequence[dict[str, Any]]) -> None:
    """New milliseconds for rows of one model and seed, the plans of all budgets taking turns."""
    space = bench.levels
    facts = {"stages": space.stages.ranges, "max_level": space.max_level, "solver": SOLVER}
    time_rows(bench, rows, [Plan.from_json(facts | row) for row in rows], REPEATS)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The front of seed 0 in multiply-accumulates, and its milliseconds at batch 16."""
    shown = [PlanPoint(**row, ms=row["ms_16"]) for row in rows if row["seed"] == 0 and row["currency"] == "macs"]
    if shown:
        timing = TimedOn(batch=16, repeats=REPEATS, device="cpu", threads=rows[0]["threads"])
        plots.save(charts.error_over_cost(shown, "macs", timing), path)


def read(path: Path) -> list[dict[str, Any]]:
    """Finished points."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(
    row: dict[str, Any], rows: list[dict[str, Any]], path: Path, table: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Add a row, print it, and write all rows with their table beside them."""
    rows.append(row)
    print(json.dumps(row), flush=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    path.with_suffix(".md").write_text(table(rows))


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """All points of a model that are not there yet; the held-out reference is sampled once."""
    heldout: PlanEvaluator | None = None
    path = args.out / f"points-{config.model}.jsonl"
    for seed in args.seeds:
        settings = {"model": config.model, "method": args.method, "guidance": config.guidance, "seed": seed}
        settings |= {"currency": args.cost, "batch": args.batch, "probes": config.probes}
        rows = read(path)
        same = [row for row in rows if all(row[name] == value for name, value in settings.items())]
        if args.time:
            time_again(prepare(replace(config, seed=seed), RichProgress()), same)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            continue
        done = {(row["budget"], row["kind"]) for row in same}
        left = [
            (budget, kinds) for budget, kinds in jobs(args.budgets, seed, args.method)
            if not (args.smoke and budget not in args.budgets) and not {(budget, kind) for kind in kinds[:3]} <= done
        ]  # fmt: skip
        if not left:
            continue
        bench = prepare(replace(config, seed=seed), RichProgress())
        steps, nodes = (20, 8) if args.smoke else (200, 64)
        plans = Plans(bench, nodes=nodes, reference_steps=steps, timed_at=args.batch, fit_probes=args.fit_probes)
        if heldout is not None:
            plans.__dict__["heldout"] = heldout.detached().attached(bench.router, bench.metric)
        heldout = plans.heldout
        quality = Quality(bench.adapter, heldout.final_reference)
        leaves = np.array(plans.call_costs)[bench.levels.visited].mean(0)
        settings |= {"leaves": [round(float(share), 4) for share in leaves / leaves[0]]}
        for budget, kinds in left:
            start = time.perf_counter()
            made = points(plans, quality, budget, kinds, 1 if args.smoke else REPEATS)
            facts = settings | {
                "budget": budget,
                "evals": config.max_evals,
                "nodes": nodes,
                "strategy": config.strategy,
            }
            facts |= {"fit_probes": args.fit_probes, "threads": args.threads, "reference": steps}
            versions = {"versions": config_record(bench.config)["versions"]}
            facts |= {"seconds": round(time.perf_counter() - start, 1), "reference_calls": plans.reference_calls}
            with path.open("a") as file:
                file.writelines(json.dumps(row | facts | versions) + "\n" for row in made)


if __name__ == "__main__":
    main()
