"""What others do to call less of a denoiser, at equal cost: plain alternation, thresholds, published caches.

At each budget, in dense calls by multiply-accumulates, every rival is tuned on the 16 probes of a search, with at most
as many evaluations as a search has, and scored on 64 held-out probes: latent MSE to the dense model at 200 steps of
DPM-Solver++ 2M. Every rival has a fitted solver, as our plans have: its coefficients are fitted along its run, with the
cache in place, on the search's probes for each setting and on those of the final fit for the best. All take as many
calls as the budget pays, evenly spaced: each setting is tried with the spacing that is best for dense calls, the best
few settings with all four. `alternation` computes every m-th call and is at one reusing level in between; `smoothcache`
reuses an attention or FFN until its changes between neighbouring calls, measured on calibration probes, add up to a
threshold, the least that meets the budget. Costs are counted by torch over the whole held-out run; runs at batch 16 are
timed, the rivals of a budget taking turns. What `benchmarks/fronts.py` found stands beside them. Finished rivals are
lines of `rows.jsonl` and are not run again.

    python benchmarks/reuse_rivals.py                                      # some hours on two CPU cores
    python benchmarks/reuse_rivals.py --models fashion-dit --budgets 6
    python benchmarks/reuse_rivals.py --smoke                              # tiny
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fronts import read as points_of
from published_caches import PUBLISHED, Published, cached
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffes.adapters.macs import ATTENTION_ON_CPU, macs_by_module
from diffes.config import HELDOUT_SEED, RunConfig
from diffes.measure.currencies import interleaved_ms
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.problems.plans import Plans
from diffes.problems.workbench import prepare
from diffes.progress import RichProgress
from diffes.pruning.bank import WeightBank
from diffes.pruning.base import GroupWeights
from diffes.results.folder import config_record
from diffes.runtime.router import Router
from diffes.solvers.offtheshelf import SPACINGS, spaced
from diffes.spaces.schedule import Plan, Stages
from diffes.spaces.strategy import Rows
from diffes.study import front

RESULTS = Path(__file__).parent / "results" / "reuse_rivals"
FRONTS = Path(__file__).parent / "results" / "fronts"
SEARCHED = "dense-fitted"  # the rival without a cache
MODELS = {"emoji-sdxl": (1.0, "deep_reuse+block_reuse"), "fashion-dit": (2.0, "block_reuse")}  # guidance and method
INTERVALS = (2, 3, 4)  # every so many calls everything is computed
LONGEST = 4  # times the budget, calls of a run
LENGTHS = 8  # of runs that smoothcache is tried with
THRESHOLDS = np.geomspace(1e-3, 30, 300)
CALIBRATION = 4  # probes on which changes are measured
BEST = 3  # settings that are tried with all spacings
FITTING = 3  # runs to find how many calls of a published cache a budget pays
BATCH = 16  # at which runs are timed


@dataclass(frozen=True)
class Candidate:
    """A way to sample.

    Args:
        knob: its setting, for the table.
        timesteps: of the calls, the noisiest first.
        entered: puts it in place for one run by a scheduler.
        cost: in dense calls, where it is known before a run.
        coefficients: of the solver; None before they are fitted.
    """

    knob: str
    timesteps: tuple[int, ...]
    entered: Callable[[Any], AbstractContextManager[None]]
    cost: float | None = None
    coefficients: Rows | None = None


Tried = tuple[float, Candidate]  # fitness on the search's probes, higher is better
Tries = Callable[[Any, str], Iterable[Tried]]  # candidates within the budget, of a setting and a spacing


@dataclass
class Rivals:
    """The rivals of one model at one budget.

    Args:
        plans: model, solver, probes and reference.
        budget: in dense calls.
        max_evals: of each rival.

    Attributes:
        spent: evaluations of the present rival.
        reason: why its last setting did not run.
        spacing: of dense calls, the best.
        solver: of all rivals.
    """

    plans: Plans
    budget: float
    max_evals: int
    spent: int = 0
    reason: str = ""
    spacing: str = "trailing"
    solver: str = "fitted"

    def __post_init__(self) -> None:
        self.bench, self.adapter = self.plans.bench, self.plans.bench.adapter
        self.guidance = self.bench.config.scale
        self.macs = macs_by_module(self.adapter)
        self.probes = self.adapter.make_probes(CALIBRATION, self.bench.config.seed, "calibration")

    def timesteps(self, n: int, spacing: str) -> tuple[int, ...]:
        """At most `n`, evenly spaced, the noisiest first."""
        return tuple(spaced(self.adapter.pipe.scheduler, n, spacing))

    def plan(self, candidate: Candidate) -> Plan:
        """The timesteps and the solver of a candidate."""
        return replace(self.plans.of_dense(candidate.timesteps, self.solver), coefficients=candidate.coefficients)

    def measured(
        self, candidate: Candidate, evaluator: PlanEvaluator, count: bool
    ) -> tuple[Tensor, float, Rows | None]:
        """Scores (n,) on an evaluator's probes, cost in dense calls where it is counted, else 0, and coefficients.

        Where the candidate has none, the solver is fitted as for a plan: along the run, with the cache in place.
        """
        finals, macs, rows, fitted = [], 0.0, 0, candidate.coefficients
        parts = evaluator.parts(n=len(evaluator.probes) if fitted is None else None)  # a fit is over all probes
        for part in parts:
            probes, scheduler = evaluator.probes[part], evaluator.scheduler(self.plan(candidate))
            counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) if count else None
            with torch.no_grad(), candidate.entered(scheduler), counter or nullcontext():
                state = self.adapter.start(probes, scheduler, self.guidance)
                for _ in candidate.timesteps:
                    (state,) = evaluator.stepped((state,), [part])
                finals.append(self.adapter.finish(state))
            fitted = tuple(state.scheduler.coefficients)
            rows += evaluator.rows(probes)
            if counter is not None:
                macs += sum(counter.get_flop_counts()[type(self.adapter.denoiser).__name__].values()) / 2
        return evaluator.scored(torch.cat(finals)), macs / rows / self.macs[""], fitted

    def tried(self, candidate: Candidate) -> tuple[float, float]:
        """Fitness on the search's probes, and cost where it is counted."""
        self.spent += 1
        scores, cost, _ = self.measured(candidate, self.plans.searched, candidate.cost is None)
        return float(scores.mean()), cost

    def known(self, candidate: Candidate | None) -> list[Tried]:
        """A candidate whose cost is known, if there is one and an evaluation is left."""
        if candidate is None or self.spent >= self.max_evals:
            return []
        return [(self.tried(candidate)[0], candidate)]

    def best(self, settings: Sequence[Any], tries: Tries) -> Candidate | None:
        """The best of all settings with one spacing and of the best few with all; None where none runs."""
        self.spent, self.reason = 0, ""
        found = [(*each, i) for i, setting in enumerate(settings) for each in tries(setting, self.spacing)]
        found.sort(key=lambda each: -each[0])
        few = list(dict.fromkeys(i for _, _, i in found))[:BEST]
        for spacing in SPACINGS:
            if spacing != self.spacing:
                found += [(*each, i) for i in few for each in tries(settings[i], spacing)]
        return max(found, key=lambda each: each[0])[1] if found else None

    def dense(self) -> Candidate:
        """Evenly spaced dense calls; their spacing is the first that the settings of other rivals are tried with."""
        options = {name: self.timesteps(int(self.budget + 1e-9), name) for name in SPACINGS}
        tried = {name: self.routed(name, self.plans.of_dense(each, self.solver)) for name, each in options.items()}
        self.spacing = max(tried, key=lambda name: self.tried(tried[name])[0])
        self.spent = len(SPACINGS)
        return tried[self.spacing]

    def searched(self) -> Candidate:
        """Dense calls at searched timesteps: the rival of all that reuse or prune."""
        kind = "dense-fitted" if self.plans.fits else "dense-planned"
        point = front.searched(self.plans, self.budget, "steps", kinds=(kind,))[0]
        self.spent = len(point.found.evaluations) if point.found else 0
        return self.routed("", point.plan)

    def routed(self, knob: str, plan: Plan) -> Candidate:
        """A plan of the workbench's own levels."""
        cost = self.plans.cost(plan)
        return Candidate(knob, plan.timesteps, lambda _: self.bench.router.routed(plan), cost, plan.coefficients)

    def alternation(self, method: str) -> Candidate | None:
        """Everything in every m-th call, and one level of a method that reuses in the others."""
        bank, space = self.bench.router.bank, self.bench.levels
        sets = {"deep_reuse": "up_layers", "block_reuse": "branches"}
        levels = [k for k in range(1, space.max_level + 1) if sets[method] in bank[space.visited[0], k]]

        def tries(setting: tuple[int, int], spacing: str) -> list[Tried]:
            interval, level = setting
            fitting = None
            for n in range(int(self.budget), int(LONGEST * self.budget) + 1):
                calls = [(t, level if i % interval else 0) for i, t in enumerate(self.timesteps(n, spacing))]
                plan = Plan(space.stages, tuple(calls), space.max_level, self.solver)
                candidate = self.routed(
                    f"1 in {interval}, level {levels.index(level) + 1} of {len(levels)}, {spacing}", plan
                )
                assert candidate.cost is not None
                fitting = candidate if candidate.cost <= self.budget + 1e-9 else fitting
            return self.known(fitting)

        return self.best(list(itertools.product(INTERVALS, levels)), tries)

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Module paths of attentions and FFNs."""
        return self.adapter.branches().sources

    @torch.no_grad()
    def changes(self, timesteps: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(n - 1, branches) relative L1 change of each branch's output from call to call of a dense run."""
        seen: dict[str, list[Tensor]] = {path: [] for path in self.branches}
        modules = [(path, self.adapter.denoiser.get_submodule(path)) for path in self.branches]
        hooks = [m.register_forward_hook(lambda _m, _a, out, path=p: seen[path].append(out)) for p, m in modules]
        try:
            steps = self.plans.searched.scheduler(self.plans.of_dense(timesteps, "dpmsolver++"))
            self.adapter.sample(self.probes, steps, self.guidance)
        finally:
            for hook in hooks:
                hook.remove()
        pairs = [list(itertools.pairwise(seen[path])) for path in self.branches]
        found = [[float((b - a).abs().mean() / a.abs().mean()) for a, b in each] for each in pairs]
        return np.array(found).T

    def smoothcache(self) -> Candidate | None:
        """A branch is reused until its changes since it was computed would add up to more than a threshold."""
        share = np.array([self.macs[path] for path in self.branches]) / self.macs[""]

        def tries(n: int, spacing: str) -> list[Tried]:
            timesteps = self.timesteps(n, spacing)
            changes = self.changes(timesteps)
            for threshold in THRESHOLDS:
                reused = reuses(changes, threshold)
                cost = len(timesteps) - float((reused @ share).sum())
                if cost <= self.budget + 1e-9:
                    knob = f"alpha {threshold:.3g}, {spacing}"
                    return self.known(self.by_branch(knob, timesteps, reused, cost))
            return []

        most = min(self.budget / (1 - share.sum()), LONGEST * self.budget)
        lengths = np.unique(np.linspace(self.budget + 1, max(most, self.budget + 1), LENGTHS).astype(int))
        return self.best([int(n) for n in lengths], tries)

    def by_branch(self, knob: str, timesteps: tuple[int, ...], reused: Any, cost: float) -> Candidate:
        """The branches that each call reuses (n, branches), as a bank with a stage for each call."""
        edges = [0, *(t + 1 for t in reversed(timesteps[1:])), self.adapter.n_timesteps]
        stages, n = Stages(tuple(itertools.pairwise(edges))), len(timesteps)
        entries, calls = {}, []
        for i, timestep in enumerate(timesteps):
            kept = torch.from_numpy(np.flatnonzero(~reused[i])).to(torch.int32)
            calls.append((timestep, int(reused[i].any())))
            if reused[i].any():
                entries[n - 1 - i, 1] = {"branches": GroupWeights(kept)}
        router = Router(self.adapter, WeightBank(entries, "reuse", max_level=1))
        plan = Plan(stages, tuple(calls), 1, self.solver)
        return Candidate(knob, timesteps, lambda _: router.routed(plan), cost)

    def published(self, cache: Published) -> Candidate | None:
        """A published cache, its own settings tuned; what fails is told in `reason`."""

        def tries(knob: Any, spacing: str) -> list[Tried]:
            found: list[Tried] = []
            n, seen = int(self.budget), set[int]()
            while n not in seen and len(seen) < FITTING and self.spent < self.max_evals:
                seen.add(n)
                text = ", ".join(f"{k} {v}" for k, v in [*knob.items(), ("spacing", spacing)])
                candidate = Candidate(
                    text, self.timesteps(n, spacing),
                    lambda scheduler: cached(cache, knob, self.adapter, scheduler, self.probes, self.guidance),
                )  # fmt: skip
                try:
                    fitness, cost = self.tried(candidate)
                except ImportError as error:
                    self.reason = f"not installed ({error.name})"
                    break
                except Exception as error:  # each package fails in its own way
                    self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
                    break
                reusing = cost < len(candidate.timesteps) - 1e-6
                if reusing and cost <= self.budget + 1e-6:
                    found.append((fitness, candidate))
                elif not reusing and n > self.budget:
                    self.reason = self.reason or "it computes everything in every call"
                    break
                longer = int(n * self.budget / cost + 1e-6)
                n = min(max(longer, n + (len(seen) == 1)), int(LONGEST * self.budget))
                if cost > self.budget + 1e-6:
                    n = longer
            return found

        return self.best(cache.knobs, tries)

    def rows(self, caches: Sequence[Published], done: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
        """A row for each rival that is not done, scored on held-out probes, then their times, taking turns."""
        rivals: dict[str, Callable[[], Candidate | None]] = {"dense": self.dense}
        for method in self.bench.config.method.split("+"):
            rivals[f"alternation {method}"] = functools.partial(self.alternation, method)
        rivals["smoothcache"] = self.smoothcache
        rivals |= {cache.name: functools.partial(self.published, cache) for cache in caches}
        rivals[SEARCHED] = self.searched
        running = {}
        for kind, tune in rivals.items():
            if kind in done and kind != "dense":
                continue
            self.reason = ""
            candidate = tune()
            if candidate is None:
                reason = self.reason or "no setting meets the budget"
                yield {"kind": kind, "evals": self.spent, "latent_mse": None, "reason": reason}
                continue
            if candidate.coefficients is None:  # on more probes, for as many as the plans are fitted on
                candidate = replace(candidate, coefficients=self.measured(candidate, self.plans.refitted, False)[2])
            running[kind] = candidate
            scores, cost, _ = self.measured(candidate, self.plans.heldout, True)
            assert candidate.cost is None or abs(cost - candidate.cost) < 1e-3
            yield {
                "kind": kind, "evals": self.spent, "knob": candidate.knob, "dense_calls": round(cost, 4),
                "n_calls": len(candidate.timesteps), "latent_mse": -float(scores.mean()), "std": float(scores.std()),
                "timesteps": list(candidate.timesteps),
            }  # fmt: skip
        taken = self.milliseconds(list(running.values()), repeats)
        for kind, ms in zip(running, taken, strict=True):
            yield {"kind": kind, f"ms_{BATCH}": round(ms, 1)}

    def milliseconds(self, candidates: Sequence[Candidate], repeats: int) -> list[float]:
        """Median milliseconds of whole runs, noise to pixels, taking turns; putting a cache in place is not timed."""
        probes = self.adapter.make_probes(min(BATCH, len(self.plans.heldout.probes)), HELDOUT_SEED, "heldout")

        def scheduler(candidate: Candidate) -> Any:
            return self.plans.searched.scheduler(self.plan(candidate))

        with ExitStack() as stack:

            def enter(candidate: Candidate) -> None:
                stack.close()
                stack.enter_context(candidate.entered(scheduler(candidate)))

            def run(candidate: Candidate) -> Tensor:
                steps = scheduler(candidate)
                return self.adapter.decode(self.adapter.sample(probes, steps, self.guidance))

            before = [functools.partial(enter, each) for each in candidates]
            runs = [functools.partial(run, each) for each in candidates]
            return interleaved_ms(runs, repeats, self.adapter.device, before)


def reuses(changes: np.ndarray[Any, np.dtype[np.float64]], threshold: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n, branches) what each call reuses, for the changes (n - 1, branches) from call to call."""
    summed, found = np.zeros(changes.shape[1]), [np.zeros(changes.shape[1], dtype=bool)]
    for change in changes:
        summed = summed + change
        found.append(summed <= threshold)
        summed = np.where(found[-1], summed, 0.0)
    return np.stack(found)


def joint(model: str, guidance: float, budget: float) -> dict[str, float]:
    """Latent MSE of the plans of `benchmarks/fronts.py` at a budget, mean over seeds: of pruning, of reuse, of both."""
    by_method: dict[str, list[float]] = {}
    wanted = {"guidance": guidance, "budget": budget, "kind": "joint", "currency": "macs"}
    for row in points_of(FRONTS / f"points-{model}.jsonl"):
        if all(row[name] == value for name, value in wanted.items()):
            by_method.setdefault(row["method"], []).append(row["latent_mse"])
    found: dict[str, float] = {}
    for method, errors in by_method.items():
        name = "sum" if "obs" in method and "reuse" in method else "reuse" if "reuse" in method else method
        found[name] = min(found.get(name, float("inf")), statistics.mean(errors))
    return found


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each rival, and how many times the error of each searched plan it has."""
    beside = ("obs", "reuse", "sum")
    columns = ["model", "guidance", "budget", "rival", "setting", "dense calls", "calls", "evaluations", "latent MSE"]
    columns += [f"ms, batch {BATCH}", *(f"over joint {name}" for name in beside)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in sorted(rows, key=lambda row: (row["model"], row["budget"])):
        cells = [row["model"], f"{row['guidance']:g}", f"{row['budget']:g}", row["kind"]]
        if row["latent_mse"] is None:
            cells += [f"does not run: {row['reason']}", *[""] * (len(columns) - 5)]
        else:
            plans = joint(row["model"], row["guidance"], row["budget"])
            over = [f"{row['latent_mse'] / plans[name]:.2f}x" if name in plans else "" for name in beside]
            cells += [row["knob"], f"{row['dense_calls']:.2f}", str(row["n_calls"]), str(row["evals"])]
            cells += [f"{row['latent_mse']:.5f}", f"{row[f'ms_{BATCH}']:.0f}" if f"ms_{BATCH}" in row else "", *over]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[4, 6, 8], help="in dense calls")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and search probes")
    parser.add_argument("--max-evals", type=int, default=160, help="of each rival")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each rival")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # published caches talk about each run
    config = RunConfig(cost="macs", metric="latent_mse", max_evals=args.max_evals, seed=args.seed, strategy="evolution")
    caches: Sequence[Published] = PUBLISHED
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=4)
        args.models = ["fashion-dit"] if args.models == list(MODELS) else args.models
        args.budgets, args.repeats = [3.0], 1
        args.out = Path("runs/smoke/reuse_rivals") if args.out == RESULTS else args.out
        caches = [replace(cache, knobs=cache.knobs[:1]) for cache in PUBLISHED]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rows.jsonl"
    rows = read(path)
    for model in args.models:
        guidance, method = MODELS[model]
        timed = {
            row["budget"]
            for row in rows
            if is_of(row, model, args.seed) and row["kind"] == SEARCHED and f"ms_{BATCH}" in row
        }
        left = [budget for budget in args.budgets if budget not in timed]
        if not left:
            continue
        config = replace(config, model=model, guidance=guidance, method=method)
        bench = prepare(config, RichProgress())
        plans = Plans(bench, nodes=8 if args.smoke else 64, reference_steps=20 if args.smoke else 200)
        for budget in left:
            done = [row["kind"] for row in rows if is_of(row, model, args.seed) and row["budget"] == budget]
            facts = {"model": model, "guidance": guidance, "budget": budget, "seed": args.seed, "solver": plans.solver}
            facts |= config_record(bench.config)
            start = time.perf_counter()
            for row in Rivals(plans, budget, config.max_evals, solver=plans.solver).rows(caches, done, args.repeats):
                row["seconds"] = round(time.perf_counter() - start, 1)
                with path.open("a") as file:
                    file.write(json.dumps(facts | row) + "\n")
                rows = read(path)
                (args.out / "table.md").write_text(table_of(rows))
    (args.out / "table.md").write_text(table_of(rows))
    print(table_of(rows))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a later line of the same rival adds to the earlier one, or takes its place."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        merged.setdefault(tuple(line[name] for name in ("model", "seed", "budget", "kind")), {}).update(line)
    return list(merged.values())


def is_of(row: dict[str, Any], model: str, seed: int) -> bool:
    """Whether a row is of a model and seed."""
    return (row["model"], row["seed"]) == (model, seed)


if __name__ == "__main__":
    main()
