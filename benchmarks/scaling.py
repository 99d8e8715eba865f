"""How a search scales with devices, simulated from measured times: generations and the asynchronous mode.

A real search says how long evaluations take, by the denoiser calls that each really paid. Simulated devices then take
such times, drawn again, with the rules of `diffes.workers`: neighbours go to one device, one that has nothing
left takes from the longest row, and each shares the first calls only of what it measured itself. `straggling` makes one
evaluation in fifty take five times as long. Said for each number of devices and size of a generation: the speed-up over
one device, the share of device time that generations leave idle, the calls paid over those counted, and what either
mode has found when the generations end, on the landscapes of `problems.py` (regret: 1 is the uniform schedule, 0 the
optimum) and on a real model.

    python benchmarks/scaling.py                 # half an hour on two CPU cores
    python benchmarks/scaling.py --smoke         # tiny, into runs/smoke
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import problems

from diffes.config import RunConfig
from diffes.figures.plots import save
from diffes.measure.evaluator import in_trie_order
from diffes.problems.workbench import Workbench, prepare
from diffes.progress import RichProgress
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Schedule
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, Evaluation
from search_strategies.exhaustive import feasible

RESULTS = Path(__file__).parent / "results"
DEVICES: tuple[int, ...] = (1, 2, 8, 16, 32, 64, 128, 256, 512)
SPEEDS = 2  # seeds of one landscape on which speed is measured
COMPARED = (8, 64)  # devices at which what is found is compared
LAMBDAS = (16, 64, 256)  # schedules of a generation
STRAGGLERS, SLOWER = 0.02, 5.0
MOST = 10**6  # evaluations of the asynchronous mode, which ends when the generations do
SETTINGS: dict[str, Any] = {
    "genes": "levels",
    "model": "fashion-dit", "method": "magnitude", "stages": 10, "steps": 10, "probes": 8, "metric": "latent_mse",
    "heldout": 8, "calibration_samples": 64, "threads": 1,
}  # fmt: skip


class Devices:
    """So many simulated devices; an evaluator for both modes.

    Args:
        n: how many.
        space: says how many calls each stage has.
        score: fitness of a schedule.
        rows: of a denoiser call.
        ratios: measured times over what the calls of an evaluation take on average; drawn again for each.
        seed: of what is drawn.
        straggling: whether some evaluations take much longer.
        until: on the clock, when `steady` ends.

    Attributes:
        clock: simulated seconds; one call of one row takes 1.
        busy: seconds of all devices together.
        paid: denoiser calls that they ran.
    """

    def __init__(
        self,
        n: int,
        space: SearchSpace,
        score: Callable[[Schedule], float],
        *,
        rows: int,
        ratios: Sequence[float],
        seed: int,
        straggling: bool,
        until: float = math.inf,
    ) -> None:
        self.n, self.space, self.score, self.rows, self.ratios = n, space, score, rows, ratios
        self.straggling, self.until = straggling, until
        self.rng = np.random.default_rng(seed)
        self.clock, self.busy, self.paid = 0.0, 0.0, 0
        self._alone: set[tuple[int, ...]] = set()
        self._known: list[set[tuple[int, ...]]] = [set() for _ in range(n)]

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        """A generation: the clock goes on to the end of its last evaluation."""
        ordered = in_trie_order(schedules)
        counted = {schedule: self._calls(self._alone, schedule) for schedule in ordered}
        queues = [ordered[i * len(ordered) // self.n : (i + 1) * len(ordered) // self.n] for i in range(self.n)]
        free = [(self.clock, i) for i in range(self.n)]
        done: list[tuple[float, int, Schedule, float]] = []
        while any(queues):
            now, i = heapq.heappop(free)
            queue = queues[i] or max(queues, key=len)
            schedule = queue.pop(0 if queue is queues[i] else -1)
            seconds = self._seconds(i, schedule)
            done.append((now + seconds, len(done), schedule, seconds))
            heapq.heappush(free, (now + seconds, i))
        for self.clock, _, schedule, seconds in sorted(done, key=lambda each: each[:2]):
            yield Evaluation(schedule, self.score(schedule), counted[schedule], seconds)

    def steady(self, more: Callable[[], Sequence[Schedule]]) -> Iterator[Evaluation]:
        """A device that is free asks for more at once."""
        queues: list[list[Schedule]] = [[] for _ in range(self.n)]
        running: list[tuple[float, int, Schedule, float]] = []
        free, dry = set(range(self.n)), False
        while True:
            for i in sorted(free):
                if not dry and not any(queues):
                    queues[i] = in_trie_order(more())
                    dry = not queues[i]
                if queue := queues[i] or max(queues, key=len):
                    schedule = queue.pop(0 if queue is queues[i] else -1)
                    seconds = self._seconds(i, schedule)
                    heapq.heappush(running, (self.clock + seconds, i, schedule, seconds))
                    free.remove(i)
            if not running or running[0][0] > self.until:
                return
            self.clock, i, schedule, seconds = heapq.heappop(running)
            free.add(i)
            yield Evaluation(schedule, self.score(schedule), self._calls(self._alone, schedule), seconds)
            dry = False

    def _calls(self, known: set[tuple[int, ...]], schedule: Schedule) -> int:
        """Rows of the calls that are not known yet, which they are then."""
        path, calls = [schedule.levels[s] for s in self.space.visited[::-1]], 0
        for i, stage in enumerate(self.space.visited[::-1]):
            if (prefix := tuple(path[: i + 1])) not in known:
                known.add(prefix)
                calls += self.space.steps[stage] * self.rows
        return calls

    def _seconds(self, device: int, schedule: Schedule) -> float:
        calls = self._calls(self._known[device], schedule)
        seconds = calls * float(self.rng.choice(self.ratios))
        seconds *= SLOWER if self.straggling and self.rng.random() < STRAGGLERS else 1.0
        self.paid, self.busy = self.paid + calls, self.busy + seconds
        return seconds


def measured_ratios(bench: Workbench, evaluations: int) -> list[float]:
    """Times of a real search's evaluations over what their calls would take on average."""
    found = bench.search("evolution:mu=8,lam=16", max_evals=evaluations, progress=RichProgress()).evaluations
    pairs = [(e.denoiser_calls, e.seconds) for e in found[1:] if e.denoiser_calls]
    each = sum(seconds for _, seconds in pairs) / sum(calls for calls, _ in pairs)
    return [round(seconds / (calls * each), 4) for calls, seconds in pairs]


def curve(
    strategy: str, devices: Devices, seed: int, evaluations: int, asynchronous: bool
) -> list[tuple[float, Evaluation]]:
    """(clock, best so far) after each evaluation of a search."""
    found: list[tuple[float, Evaluation]] = []

    def note(evaluation: Evaluation) -> None:
        best = found[-1][1] if found and found[-1][1].fitness >= evaluation.fitness else evaluation
        found.append((devices.clock, best))

    made = STRATEGIES.make(strategy, devices.space, seed=seed)
    run_search(made, devices, max_evals=evaluations, on_evaluation=note, asynchronous=asynchronous)
    return found


def simulated(
    space: SearchSpace,
    score: Callable[[Schedule], float],
    n: int,
    lam: int,
    seed: int,
    ratios: Sequence[float],
    *,
    generations: int,
    straggling: bool,
    speed: bool,
    quality: bool,
    worth: Callable[[Schedule], float],
) -> dict[str, Any]:
    """Both modes on so many devices: speed, what they share, and what is found when the generations end."""
    options: dict[str, Any] = {"rows": 16, "ratios": ratios, "seed": seed, "straggling": straggling}
    strategy = f"evolution:mu={max(lam // 8, 2)},lam={lam},initial={lam}"
    row: dict[str, Any] = {"devices": n, "lam": lam, "seed": seed, "straggling": straggling}
    evaluations, end = lam * generations, math.inf
    for mode in ("generations", "asynchronous"):
        asynchronous = mode == "asynchronous"
        devices, one = (Devices(each, space, score, **options) for each in (n, 1))
        row[mode] = {}
        if speed or not asynchronous:
            found = curve(strategy, devices, seed, evaluations, asynchronous)
            end = end if asynchronous else devices.clock
        if speed:
            curve(strategy, one, seed, evaluations, asynchronous)
            row[mode] |= {
                "idle": 1 - devices.busy / (n * devices.clock), "speedup": one.clock / devices.clock,
                "paid over counted": devices.paid / one.paid,
            }  # fmt: skip
        if quality:
            if asynchronous:
                found = curve(strategy, Devices(n, space, score, **options, until=end), seed, MOST, True)
            row[mode] |= {"best": worth(found[-1][1].schedule), "evaluations": len(found)}
    return row


def landscapes(ratios: Sequence[float], devices: Sequence[int], seeds: int, generations: int) -> list[dict[str, Any]]:
    """Rows of all landscapes, seeds and sizes of a generation; fitness as regret."""
    rows = []
    for kind, make in problems.PROBLEMS.items():
        for seed in range(seeds):
            problem = make(np.random.default_rng([seed, list(problems.PROBLEMS).index(kind)]))
            best = max(problem.true(levels) for levels in feasible(problems.SPACE))
            scale = best - problem.true(problems.SPACE.uniform())

            def score(schedule: Schedule, problem: problems.Problem = problem) -> float:
                return problem.measured(schedule.levels, 1.0)

            def worth(
                schedule: Schedule, problem: problems.Problem = problem, best: float = best, scale: float = scale
            ) -> float:
                return (best - problem.true(schedule.levels)) / scale

            for lam in LAMBDAS:
                for n in devices if kind == "separable" and seed < SPEEDS else COMPARED:
                    for straggling in (False, True):
                        speed = kind == "separable" and seed < SPEEDS
                        quality = straggling and n in COMPARED and n <= lam
                        if speed or quality:
                            row = simulated(
                                problems.SPACE, score, n, lam, seed, ratios, generations=generations,
                                straggling=straggling, speed=speed, quality=quality, worth=worth,
                            )  # fmt: skip
                            rows.append({"problem": kind, **row})
    return rows


def on_a_model(bench: Workbench, ratios: Sequence[float], n: int, seeds: int, generations: int) -> list[dict[str, Any]]:
    """Rows of a real model, whose schedules are measured once for all modes."""
    evaluator, known = bench.evaluator(bench.config.probes, bench.config.seed), dict[Schedule, float]()

    def score(schedule: Schedule) -> float:
        if schedule not in known:
            known[schedule] = float(evaluator.scores(schedule).mean())
        return known[schedule]

    rows = []
    for seed in range(seeds):
        rows.append(
            {"problem": Path(bench.config.model).name}
            | simulated(
                bench.space,
                score,
                n,
                n,
                seed,
                ratios,
                generations=generations,
                straggling=True,
                speed=False,
                quality=True,
                worth=score,
            )
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> str:
    """Markdown: speed over all landscapes and seeds, then quality at equal time."""
    lines = [
        "| schedules a generation | devices | speed-up: generations | asynchronous | idle: generations | asynchronous "
        "| calls paid / counted | idle with stragglers: generations | asynchronous |",
        "|" + "---|" * 9,
    ]

    def mean(part: Sequence[dict[str, Any]], mode: str, what: str) -> float:
        return statistics.mean(row[mode][what] for row in part)

    for lam in LAMBDAS:
        for n in sorted({row["devices"] for row in rows if row["problem"] == "separable"}):
            part = [
                row for row in rows
                if (row["lam"], row["devices"], row["problem"]) == (lam, n, "separable") and row["seed"] < SPEEDS
            ]  # fmt: skip
            even, late = ([row for row in part if row["straggling"] is s] for s in (False, True))
            cells = [mean(even, mode, "speedup") for mode in ("generations", "asynchronous")]
            idle = [mean(p, mode, "idle") for p in (even, late) for mode in ("generations", "asynchronous")]
            paid = mean(even, "generations", "paid over counted")
            lines.append(
                f"| {lam} | {n} | {cells[0]:.1f} | {cells[1]:.1f} | {idle[0]:.0%} | {idle[1]:.0%} | {paid:.2f} | "
                f"{idle[2]:.0%} | {idle[3]:.0%} |"
            )
    lines += [
        "", "At equal time, with stragglers; of the landscapes the regret, of the model the fitness:", "",
        "| problem | schedules a generation | devices | evaluations: generations | asynchronous | found: generations "
        "| asynchronous | asynchronous better in |",
        "|" + "---|" * 8,
    ]  # fmt: skip
    for kind in dict.fromkeys(row["problem"] for row in [*rows, *models]):
        for lam, n in sorted({(r["lam"], r["devices"]) for r in [*rows, *models] if r["problem"] == kind}):
            part = [
                r for r in [*rows, *models]
                if (r["problem"], r["lam"], r["devices"], r["straggling"]) == (kind, lam, n, True)
            ]  # fmt: skip
            if not part or "best" not in part[0]["generations"]:
                continue
            counts, found = (
                [mean(part, m, what) for m in ("generations", "asynchronous")] for what in ("evaluations", "best")
            )
            sign = -1 if kind in problems.PROBLEMS else 1  # of regret less is better
            gains = [sign * (r["asynchronous"]["best"] - r["generations"]["best"]) for r in part]
            ahead, behind = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
            lines.append(
                f"| {kind} | {lam} | {n} | {counts[0]:.0f} | {counts[1]:.0f} | {found[0]:.4g} | {found[1]:.4g} | "
                f"{ahead} of {len(part)}, worse in {behind} |"
            )
    return "\n".join(lines) + "\n"


def drawn(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over devices, a line for each size of a generation and mode."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    devices = sorted({row["devices"] for row in rows if row["problem"] == "separable"})
    for colour, lam in zip(("C0", "C1", "C2"), LAMBDAS, strict=True):
        for mode, style in (("generations", "-"), ("asynchronous", "--")):
            speed = [
                statistics.mean(
                    row[mode]["speedup"]
                    for row in rows
                    if (row["lam"], row["devices"], row["problem"], row["straggling"]) == (lam, n, "separable", True)
                    and row["seed"] < SPEEDS
                )
                for n in devices
            ]
            axes.plot(devices, speed, style, color=colour, marker="o", label=f"{lam} a generation, {mode}")
    axes.plot(devices, devices, ":", color="grey", label="as many times as devices")
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="speed-up over one device, with stragglers")
    axes.set_xticks(devices, [str(n) for n in devices])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="of each landscape")
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--model-seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    devices, n, timed = DEVICES, 64, 160
    if args.smoke:
        args.seeds, args.generations, args.model_seeds, args.out = 1, 2, 1, Path("runs/smoke")
        devices, n, timed = (1, 8), 4, 8
        SETTINGS.update(steps=4, probes=2, stages=4, calibration_samples=8)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = prepare(RunConfig(**SETTINGS), RichProgress())
    ratios = measured_ratios(bench, timed)
    rows = landscapes(ratios, devices, args.seeds, args.generations)
    models = on_a_model(bench, ratios, n, args.model_seeds, args.generations)
    data = {"seconds over the mean of as many calls": ratios, "landscapes": rows, "model": models}
    (args.out / "scaling.json").write_text(json.dumps(data) + "\n")
    text = table_of(rows, models)
    (args.out / "scaling.md").write_text(text)
    drawn(rows, args.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
