"""How do the strategies do where the optimum is known?

Four kinds of landscapes of 6 stages and 7 levels, small enough for `exhaustive` to find their optimum, drawn anew for
every seed. A measurement costs what it would on a model with 20 steps: what a schedule shares with one measured before
is free. Every strategy gets the same number of denoiser calls. Regret is how much of the way from the optimum to the
uniform schedule is left; what is scored is the true value of the schedule found, not what a noisy measurement said.

    python benchmarks/problems.py            # some minutes on two CPU cores
    python benchmarks/problems.py --smoke    # two seeds of two strategies
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffes.figures.charts import convergence_over_calls
from diffes.figures.plots import save
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, Evaluation
from search_strategies.exhaustive import feasible

RESULTS = Path(__file__).parent / "results"
SPACE = SearchSpace.mean_sparsity(Stages.equal(6), 6, 0.5, (3, 3, 4, 3, 3, 4))
PROBES = 16
COMPARED = (
    "evolution", "evopress", "surrogate", "tpe", "cmaes", "nsga2", "random", "uniform", "optuna:sampler=GPSampler",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A landscape.

    Args:
        damage: of a genome (S,), lower is better.
        noise: standard deviation of one probe's measurement.
        seed: of that noise.
    """

    damage: Callable[[np.ndarray], float]
    noise: float
    seed: int

    def true(self, levels: Sequence[int]) -> float:
        """Fitness without noise."""
        return -self.damage(np.array(levels) / SPACE.max_level)

    def measured(self, levels: Sequence[int], fidelity: float) -> float:
        """Fitness as a mean over the first probes; the same schedule on the same probes gives the same."""
        n = math.ceil(fidelity * PROBES)
        rng = np.random.default_rng([self.seed, zlib.crc32(bytes(levels))])
        return self.true(levels) + self.noise * float(rng.standard_normal(PROBES)[:n].mean())


def separable(rng: np.random.Generator) -> Problem:
    """A sum over stages, whose weights differ tenfold."""
    weights, powers = 10 ** rng.uniform(-1, 0, 6), rng.uniform(1, 3, 6)
    return Problem(lambda x: float((weights * x**powers).sum()), 0.0, 0)


def coupled(rng: np.random.Generator) -> Problem:
    """Errors of neighbouring stages add up along the same direction, or cancel."""
    weights, powers = 10 ** rng.uniform(-1, 0, 6), rng.uniform(1, 3, 6)
    signs = rng.choice([-1.0, 1.0], 6)
    near = np.exp(-np.abs(np.subtract.outer(range(6), range(6))) / 1.5) * np.outer(signs, signs)

    def damage(x: np.ndarray) -> float:
        error = weights * x**powers
        return float(error @ near @ error)

    return Problem(damage, 0.0, 0)


def deceptive(rng: np.random.Generator) -> Problem:
    """A slope that leads away from a narrow valley, in which the optimum lies."""
    slope = separable(rng)
    every = list(feasible(SPACE))
    valley = np.array(every[int(rng.integers(len(every)))]) / SPACE.max_level

    def damage(x: np.ndarray) -> float:
        return slope.damage(x) - 0.6 * float(np.exp(-(((x - valley) ** 2).sum()) / 0.15))

    return Problem(damage, 0.0, 0)


def noisy(rng: np.random.Generator) -> Problem:
    """Separable, measured with an error of its own on every probe."""
    return Problem(separable(rng).damage, 0.15, int(rng.integers(2**31)))


TRUE = "true value of what measured best so far"  # which may fall where measurements are noisy
PROBLEMS = {"separable": separable, "coupled": coupled, "deceptive": deceptive, "noisy": noisy}


class Measure:
    """An evaluator that counts what is not shared with a schedule measured before, as `ScheduleEvaluator` does."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: set[tuple[int, ...]] = set()

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        rows = 2 * math.ceil(fidelity * PROBES)
        for schedule in sorted(schedules, key=lambda schedule: schedule.levels[::-1]):
            calls, path = 0, schedule.levels[::-1]
            for i, steps in enumerate(SPACE.steps[::-1]):
                prefix = (rows, *path[: i + 1])
                calls += 0 if prefix in self._known else steps * rows
                self._known.add(prefix)
            yield Evaluation(schedule, self.problem.measured(schedule.levels, fidelity), calls, 1e-9, fidelity)


def run(kind: str, strategy: str, seed: int, max_calls: int) -> dict[str, Any]:
    """One search."""
    problem = PROBLEMS[kind](np.random.default_rng([seed, list(PROBLEMS).index(kind)]))
    best = max(problem.true(levels) for levels in feasible(SPACE))
    uniform = problem.true(SPACE.uniform())
    result = run_search(STRATEGIES.make(strategy, SPACE, seed=seed), Measure(problem), max_denoiser_calls=max_calls)

    def regret(fitness: float) -> float:
        return (best - fitness) / (best - uniform)

    curve, highest = [], -math.inf
    for calls, evaluation, counts in zip(result.calls(), result.evaluations, result.eligible, strict=True):
        if counts and evaluation.fitness > highest:
            highest = evaluation.fitness
            curve.append([calls, -regret(problem.true(evaluation.schedule.levels))])
    curve.append([result.denoiser_calls, curve[-1][1]])
    levels = result.best.schedule.levels
    return {
        "problem": kind, "strategy": strategy, "seed": seed, "max_calls": max_calls, "levels": list(levels),
        "regret": round(regret(problem.true(levels)), 6), "optimum": best, "uniform": uniform,
        "evaluations": len(result.evaluations), "denoiser_calls": result.denoiser_calls, "curve": curve,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: median and quartiles of the regret, and how often the optimum was found."""
    kinds = list(dict.fromkeys(row["problem"] for row in rows))
    lines = [f"| strategy | {' | '.join(kinds)} | optimum found |", "|---" * (len(kinds) + 2) + "|"]
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        cells, found, n = [], 0, 0
        for kind in kinds:
            values = [r["regret"] for r in rows if (r["problem"], r["strategy"]) == (kind, strategy)]
            low, high = np.percentile(values, [25, 75])
            cells.append(f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})")
            found += sum(value < 1e-9 for value in values)
            n += len(values)
        lines.append(f"| {strategy} | {' | '.join(cells)} | {found} of {n} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(COMPARED))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=40, help="the calls of so many whole evaluations")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.strategies, args.seeds, args.evaluations = ["evolution", "random"], 2, 20
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    max_calls = args.evaluations * sum(SPACE.steps) * 2 * PROBES
    rows = []
    for kind in PROBLEMS:
        for strategy in args.strategies:
            rows += [run(kind, strategy, seed, max_calls) for seed in range(args.seeds)]
            regrets = [row["regret"] for row in rows[-args.seeds :]]
            print(f"{kind}, {strategy}: median regret {statistics.median(regrets):.4f}", flush=True)
    (args.out / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.out / "problems.md").write_text(table(rows))
    for kind in PROBLEMS:
        curves = {
            strategy: [row["curve"] for row in rows if (row["problem"], row["strategy"]) == (kind, strategy)]
            for strategy in args.strategies
            if strategy != "uniform"
        }
        figure = convergence_over_calls(curves, f"{kind}, minus regret", max_calls, TRUE)
        save(figure, args.out / f"problems_{kind}.png")
    print(table(rows))


if __name__ == "__main__":
    main()
