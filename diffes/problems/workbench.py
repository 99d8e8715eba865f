"""Calibrated model that evaluates schedules, for searches, comparisons and notebooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from deap import base

from diffes.adapters import ModelAdapter, Split, adapter_for, load_pipeline, shipped_models
from diffes.config import HELDOUT_SEED, RunConfig, WorkerOptions, changed, settings_of
from diffes.errors import DiffesError
from diffes.measure.currencies import (
    CURRENCIES,
    LATENCY_REPEATS,
    interleaved_ms,
    macs_by_level,
    macs_fraction,
)
from diffes.measure.evaluator import CACHE_BYTES, RoutedEvaluator, ScheduleEvaluator
from diffes.measure.metrics import Metric, make_metric
from diffes.measure.profile import sensitivity_table, stage_profile
from diffes.problems.base import PROBLEMS, Problem
from diffes.problems.checks import check_settings, operators_of, try_adapter, try_metric
from diffes.problems.heldout import HeldOut
from diffes.problems.levels import heldout_of
from diffes.problems.shared import Shared
from diffes.problems.toolbox import measuring_toolbox
from diffes.progress import Progress, RichProgress
from diffes.pruning import METHODS, make_method, parts_of
from diffes.pruning.allocation import allocation_of
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import gathered
from diffes.pruning.calibrate import Keep, bank_of, calibration_of, uses_data
from diffes.runtime.apply import pick_device
from diffes.runtime.router import Router
from diffes.solvers import SOLVERS
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.ledger import OnEvaluation, SearchResult
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Plan, Schedule, Stages
from diffes.spaces.space import SearchSpace, Table
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Evaluation, Evaluator, StageProfile
from diffes.workers import Pool, pool_of


@dataclass(frozen=True)
class Workbench:
    """Calibrated model, ready to evaluate schedules. Searches of the same model and method share it.

    Args:
        config: the settings.
        adapter: the model.
        levels: the calibrated stages, levels and steps, as the space of all schedules.
        router: the model with its bank of all stages and levels.
        metric: the fitness.
        costs: (S, H + 1) cost of one call in each stage at each level, in the currency of the budget.
        make_evaluator: builds the evaluator of a search; when left out, searches use an evaluator in this process on
            their own probes.
        pool: workers that measure in place of this process.
        shared: evaluators with expensive references, for all workbenches of this calibrated model.
    """

    config: RunConfig
    adapter: ModelAdapter
    levels: SearchSpace
    router: Router
    metric: Metric
    costs: Table
    make_evaluator: Callable[[Workbench], Evaluator] | None = None
    pool: Pool | None = None
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)

    @cached_property
    def problem(self) -> Problem:
        """Problem of the settings: what a search works on."""
        made: Problem = PROBLEMS.make(self.config.genes, self)
        return made

    @property
    def space(self) -> SearchSpace:
        """Space of the genomes that a search chooses from, under the budget of the settings."""
        return self.problem.space

    def profile(self) -> StageProfile:
        """Measure the dense model's loss in each stage, on the calibration data."""
        return stage_profile(
            self.adapter, calibration_of(self.config, self.adapter), self.levels.stages, self.config.seed
        )

    def search(
        self,
        strategy: str | None = None,
        *,
        progress: Progress | None = None,
        on_evaluation: OnEvaluation | None = None,
        workers: int = 1,
        **changes: Any,
    ) -> SearchResult:
        """Run a search on this model, in memory.

        Args:
            strategy: name of a strategy, with options after a colon; the workbench's own when left out.
            progress: progress display; bars when left out.
            on_evaluation: called with each evaluation.
            workers: number of processes that measure in parallel, on Ray; the result does not depend on it, unless the
                search is asynchronous.
            changes: settings that replace the workbench's own: seed, budget, metric, mutation, max_evals and so on.

        Raises:
            DiffesError: a setting is unusable.
        """
        progress = progress or RichProgress()
        wanted = changes if strategy is None else changes | {"strategy": strategy}
        bench = vary(self, changed(self.config, **wanted), progress)
        if bench.config.study is not None:
            raise DiffesError(f"a search in memory has no study to share: leave study {bench.config.study!r} out")
        with bench.on_workers(workers) as many:
            return search_on(many, progress, on_evaluation=on_evaluation)

    @contextmanager
    def on_workers(self, workers: int) -> Iterator[Workbench]:
        """Yield this workbench with processes that measure in parallel, on Ray, until the block ends.

        Its searches and toolboxes find the same as this one's. Workers that are there already stay.

        Args:
            workers: number of processes; 1 is this process alone.
        """
        with pool_of(self.config, WorkerOptions(workers)) if self.pool is None else nullcontext(self.pool) as pool:
            yield replace(self, pool=pool)

    def toolbox(
        self,
        *,
        seed: int | None = None,
        mutation: str | None = None,
        crossover: str | None = None,
        store: EvaluationStore | None = None,
    ) -> base.Toolbox:
        """Build a DEAP toolbox on this model, for DEAP's own algorithms and for yours.

        `individual()` and `population(n=16)` make genomes that meet the budget, `mutate` and `mate` keep them within
        it, and `select` is DEAP's `selBest`. `evaluate(individual)` measures on the real pipeline, each schedule once,
        `map` measures a whole generation together, and `result()` returns the search result so far. Register any other
        operator of DEAP in their place; an individual that leaves the budget raises an error when it is evaluated.

        DEAP's algorithms draw from Python's global `random`: call `random.seed(0)` before an algorithm to repeat it.
        Our operators have their own generator: put `(toolbox.mutate, toolbox.mate)` into the pickle that DEAP's
        documentation makes as a checkpoint, and register them again.

        Args:
            seed: seed of the operators; the workbench's own when left out.
            mutation: name of a mutation, with options after a colon; the workbench's own when left out.
            crossover: name of a crossover, with options after a colon; the workbench's own when left out.
            store: keeps the evaluations; stored ones are not paid for again.

        Raises:
            DiffesError: there is no such operator.
        """
        config = self.config
        return measuring_toolbox(
            self.space,
            self.search_evaluator(),
            seed=config.seed if seed is None else seed,
            mutation=mutation or config.mutation,
            crossover=crossover or config.crossover,
            store=store,
        )

    def sensitivity(self) -> list[list[float]]:
        """Measure the sensitivity (S, H + 1): the fitness that each level of each stage costs on its own.

        It is measured on the search's probes, and is NaN in stages that no step falls into.
        """
        return sensitivity_table(self.evaluator(self.config.probes, self.config.seed), self.levels)

    def macs_fraction(self, routed: Schedule | Plan) -> float:
        """Return the MACs of a sampling run over those of the dense model at all steps, for the whole denoiser."""
        return macs_fraction(self.router, routed, self.levels.steps)

    def cost_fraction(self, schedule: Schedule) -> float:
        """Return the cost of a schedule in the currency of the budget, over that of the dense model."""
        return self.space.cost(schedule.levels) / self.space.cost([0] * self.space.n_stages)

    def fewer_steps(self, schedule: Schedule) -> int:
        """Return the number of steps at which the dense model costs as many MACs as a schedule: its cheapest rival."""
        return max(1, round(self.config.steps * self.macs_fraction(schedule)))

    def uniform(self) -> Schedule:
        """Return the genome of the budget that treats all stages or nodes alike."""
        return self.space.schedule(self.space.uniform())

    def with_metric(self, name: str) -> Workbench:
        """Return the same workbench with another metric."""
        return vary(self, replace(self.config, metric=name), RichProgress())

    def heldout(self) -> HeldOut:
        """Return an evaluator of schedules on held-out probes, which no search sees."""
        return heldout_of(self)

    def evaluator(
        self, n_probes: int, seed: int, split: Split = "search", cache_bytes: int = CACHE_BYTES
    ) -> ScheduleEvaluator:
        """Build an evaluator in this process, with its own probes and a cache of at most `cache_bytes` of states."""
        return ScheduleEvaluator(
            self.router,
            self.levels.stages,
            self.adapter.make_probes(n_probes, seed, split),
            n_steps=self.config.steps,
            guidance=self.config.scale,
            metric=self.metric,
            cache_bytes=cache_bytes,
        )

    def search_evaluator(self) -> Evaluator:
        """Return the evaluator of a search. Its probes are drawn from the seed, like everything else in the search."""
        if self.make_evaluator is not None:
            return self.make_evaluator(self)
        return self.measuring(self.problem.evaluator())

    def measuring(self, evaluator: RoutedEvaluator) -> Evaluator:
        """Return the evaluator spread over the workers, if there are any; else the evaluator itself."""
        return self.pool.evaluator(evaluator) if self.pool is not None else evaluator

    def made_for(self) -> dict[str, Any]:
        """Return the facts about a bank of this workbench, for the JSON beside it: its method and its model."""
        home, shipped = Path(self.config.model), self.config.model in shipped_models()
        kind = self.router.bank.kind
        return {
            "method": self.config.method,
            "allocation": allocation_of(kind, self.config.allocation),
            "kind": kind,
            "model": str(home.resolve()) if home.is_dir() and not shipped else self.config.model,
        }

    def timed_on(self) -> dict[str, Any]:
        """Return the conditions of a timing: device, torch threads, images per run and runs of each candidate."""
        device = self.adapter.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {
            "batch": self.config.probes,
            "repeats": LATENCY_REPEATS,
            "device": name,
            "threads": torch.get_num_threads(),
        }

    def milliseconds(
        self, candidates: Sequence[Schedule | Plan | int], batch: int, repeats: int = LATENCY_REPEATS
    ) -> list[float]:
        """Measure the median milliseconds of whole runs, from noise to pixels.

        Args:
            candidates: schedules, plans and numbers of dense steps. They take turns, so that all see the same machine.
            batch: images per run.
            repeats: runs of each that count.
        """
        probes = self.adapter.make_probes(batch, HELDOUT_SEED, "heldout")

        def images(steps: int | Any) -> object:
            return self.adapter.render(self.adapter.sample(probes, steps, self.config.scale))

        def run(candidate: Schedule | Plan | int) -> object:
            if isinstance(candidate, int):
                return images(candidate)
            steps: int | Any = self.config.steps
            if isinstance(candidate, Plan):
                own = self.adapter.pipe.scheduler
                steps = PlanScheduler.of(own, candidate.timesteps, candidate.rows, self.adapter.device)
            with self.router.routed(candidate):
                return images(steps)

        distinct = list(dict.fromkeys(candidates))  # the same plan takes the same time
        times = interleaved_ms([partial(run, candidate) for candidate in distinct], repeats, self.adapter.device)
        return [times[distinct.index(candidate)] for candidate in candidates]


FACTS: dict[str, Callable[[Workbench], Any]] = {"profile": Workbench.profile}  # facts that a strategy may need, by name


def workbench(progress: Progress | None = None, **settings: Any) -> Workbench:
    """Build a calibrated model to search on, for notebooks.

    Args:
        progress: progress display; bars when left out.
        settings: fields of `diffes.RunConfig`, for instance model="fashion-dit", method="obs", stages=10.

    Raises:
        DiffesError: a setting is unusable.
    """
    return prepare(settings_of(settings), progress or RichProgress())


def prepare(
    config: RunConfig,
    progress: Progress,
    costs: Table | None = None,
    pool: Pool | None = None,
    keep: Keep | None = None,
    adapter: ModelAdapter | None = None,
) -> Workbench:
    """Load the model, check every setting, then calibrate and prune. The long part comes last.

    Args:
        config: the settings.
        progress: progress display.
        costs: costs of an earlier workbench of the same settings; measured when left out.
        pool: workers that calibrate, and measure later.
        keep: stores every stage as soon as it is calibrated.
        adapter: adapter of a pipeline that is loaded already; by the settings when left out.

    Raises:
        DiffesError: a name is unknown, the budget infeasible, the model or its calibration data unusable.
    """
    config = config.resolved()
    check_settings(config)
    kind, method = PROBLEMS.parse(config.genes)[0], make_method(config.method)
    if pool is not None and config.solver is not None and not SOLVERS.is_known_elsewhere(config.solver):
        raise DiffesError(
            f"solver {config.solver!r} is registered in this process only, and workers step with it, too. Offer it by "
            'an entry point in "diffes.solvers", or search with one worker'
        )
    elsewhere = pool if all(METHODS.is_known_elsewhere(part) for part in parts_of(config.method)) else None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if adapter is None:
        pipe = load_pipeline(config.model, device=pick_device(config.device), dtype=getattr(torch, config.dtype))
        pipe.set_progress_bar_config(disable=True)
        adapter = adapter_for(pipe)
    adapter.configure(config.prompts, config.call)
    if kind.prunes and not adapter.batched:
        what = "knows no layers of" if type(adapter) is ModelAdapter else "calibrates no layers of"
        raise DiffesError(
            f"diffes {what} {type(adapter.pipe).__name__} that it could prune or reuse: search plans of dense calls "
            "(--genes steps), or search a text-to-image pipeline around the same denoiser and apply that run here"
        )
    kind.check(config, adapter)
    try_adapter(adapter, config.steps, config.scale)
    adapter.check_sampler()
    stages = Stages.equal(config.stages, adapter.n_timesteps)
    steps = stages.count_steps(adapter.timesteps(config.steps))
    if kind.calls_anywhere:
        steps = tuple(max(n, 1) for n in steps)
    top = method.max_level(adapter) if kind.prunes else 1
    space = SearchSpace(stages, top, steps, (tuple(range(top, -1, -1)),) * len(stages), None)
    if config.cost == "level" and config.budget is not None:
        space = SearchSpace.mean_sparsity(stages, top, config.budget, steps)
        if not STRATEGIES.parse(config.strategy)[0].needs:
            check_settings(config, space)  # it may be too large for the strategy; other costs are not known yet
    metric = make_metric(config.metric, adapter.device)
    try_metric(metric, adapter)
    if not kind.prunes:
        router = Router(adapter, WeightBank({}, "width", max_level=top))
        return _priced(Workbench(config, adapter, space, router, metric, costs or [], pool=pool), progress)
    if any(part.kind == "width" for part in method.parts) and (whole := adapter.whole_attentions()):
        progress.say(
            f"the heads of {len(whole)} attention layers stay, because a norm runs across all of them: {whole[0]} "
            "and those like it. Channels are removed"
        )
    memory, looks = config.bank_bytes, uses_data(config)
    with progress.task(f"calibrating {config.method}", len(space.visited) * len(method.parts)) as advance:
        if looks and (elsewhere is not None or keep is not None):

            def made(only: Sequence[int]) -> Iterator[WeightBank]:
                if elsewhere is not None:
                    yield from elsewhere.banks(stages, only)
                    return
                data = calibration_of(config, adapter, keep)
                for stage in only:
                    yield bank_of(config, adapter, stages, [stage], data)

            found = made(space.visited) if keep is None else keep.stages(adapter, space.visited, made)
            banks = (bank for bank in found if advance(f"stage {min(bank)[0]}", len(method.parts)) is None)
            bank = gathered(adapter, banks, memory, held=keep is None, alike=not method.needs_data)
        else:
            data = calibration_of(config, adapter) if looks else None
            bank = bank_of(config, adapter, stages, space.visited, data, lambda stage: advance(f"stage {stage}"))
    router = Router(adapter, bank, resident=memory)
    if len(method.parts) > 1:  # number the levels of all parts together: the cheaper a call, the higher its level
        macs = np.array(macs_by_level(router, stages, space.visited, space.max_level))[space.visited].mean(0)
        cheaper = sorted(range(1, space.max_level + 1), key=lambda k: -macs[k])
        router = Router(adapter, bank.in_order(cheaper), resident=memory)
    return _priced(Workbench(config, adapter, space, router, metric, costs or [], pool=pool), progress)


def vary(bench: Workbench, config: RunConfig, progress: Progress, costs: Table | None = None) -> Workbench:
    """Return the same calibrated model with other settings of the search: strategy, budget, metric, seed and so on.

    Args:
        bench: a workbench of the same model, method, stages, steps and guidance.
        config: the settings.
        progress: progress display.
        costs: (S, H + 1) cost of one call in each stage at each level, if it was measured before.

    Raises:
        DiffesError: a name is unknown, or the budget infeasible.
    """
    config = config.resolved()
    check_settings(config)
    PROBLEMS.parse(config.genes)[0].check(config, bench.adapter)
    if PROBLEMS.parse(config.genes)[0].prunes and not len(bench.router.bank):
        raise DiffesError(
            f"this workbench was made for --genes {bench.config.genes}, which prunes nothing, so it has no pruned "
            f"weights for {config.genes}: make one for that"
        )
    metric = bench.metric
    if config.metric != bench.config.metric:
        metric = make_metric(config.metric, bench.adapter.device)
        try_metric(metric, bench.adapter)
    timed = CURRENCIES.get(config.cost).timed
    alike = PROBLEMS.parse(config.genes)[0] is PROBLEMS.parse(bench.config.genes)[0]
    same = config.cost == bench.config.cost and ((alike and config.probes == bench.config.probes) or not timed)
    known = costs or (bench.costs if same else [])
    return _priced(replace(bench, config=config, metric=metric, costs=known), progress)


def _priced(bench: Workbench, progress: Progress) -> Workbench:
    """Return the workbench with its costs, measured if they are not known. Check that the budget is feasible."""
    levels, costs = bench.levels, bench.costs
    if costs and [len(row) for row in costs] != [levels.max_level + 1] * levels.n_stages:
        raise DiffesError(f"the known costs are no table of {levels.n_stages} stages by {levels.max_level + 1} levels")
    if not costs:
        bench = replace(bench, costs=bench.problem.call_costs(progress))
    _ = bench.space
    return bench


def search_on(
    bench: Workbench,
    progress: Progress,
    store: EvaluationStore | None = None,
    on_evaluation: OnEvaluation | None = None,
    seed: int | None = None,
) -> SearchResult:
    """Run one search on a workbench. Everything in it is drawn from its seed.

    Denoiser calls that measure facts for its strategy count as calls of the search.

    Args:
        bench: the workbench.
        progress: progress display.
        store: keeps the evaluations; stored ones are not paid for again.
        on_evaluation: called with each evaluation.
        seed: seed of the strategy; the workbench's own when left out.
    """
    config = bench.config
    facts = {name: FACTS[name](bench) for name in STRATEGIES.parse(config.strategy)[0].needs}
    title = f"searching with {config.strategy}"
    return run_strategy(
        bench, bench.space, bench.search_evaluator(), progress, title, facts=facts, store=store,
        on_evaluation=on_evaluation, seed=seed,
    )  # fmt: skip


def run_strategy(
    bench: Workbench,
    space: SearchSpace,
    evaluate: Evaluator,
    progress: Progress,
    title: str,
    *,
    facts: Mapping[str, Any] = MappingProxyType({}),
    store: EvaluationStore | None = None,
    on_evaluation: OnEvaluation | None = None,
    seed: int | None = None,
) -> SearchResult:
    """Run the strategy of a workbench's settings, with its operators and limits, on a space.

    Args:
        bench: the workbench.
        space: the genomes within the budget.
        evaluate: measures them.
        progress: progress display.
        title: title of the bar.
        facts: facts about the model that the strategy needs, by name.
        store: keeps the evaluations; stored ones are not paid for again.
        on_evaluation: called with each evaluation.
        seed: seed of the strategy; the workbench's own when left out.
    """
    config, spent = bench.config, sum(fact.calls for fact in facts.values())
    strategy = STRATEGIES.make(
        config.strategy, space, seed=config.seed if seed is None else seed, **operators_of(config), **facts
    )
    with progress.task(title, config.max_evals) as advance:
        calls = config.max_calls
        return run_search(
            strategy,
            evaluate,
            max_evals=config.max_evals,
            max_denoiser_calls=calls if calls is None else max(1, calls - spent),  # at least one evaluation
            calls_before=spent,
            max_seconds=config.time_limit,
            store=store,
            on_evaluation=shown(space, config.metric, advance, on_evaluation, bench.pool),
            asynchronous=config.asynchronous,
        )


def shown(
    space: SearchSpace,
    metric: str,
    advance: Callable[..., None],
    also: OnEvaluation | None = None,
    pool: Pool | None = None,
) -> OnEvaluation:
    """Return a callback that shows the best fitness of a search so far, and the state of its workers.

    Args:
        space: decides which evaluations count.
        metric: name of the metric.
        advance: advances the bar.
        also: a further function that is called with each evaluation.
        pool: the workers.
    """
    best = -math.inf

    def on_evaluation(evaluation: Evaluation) -> None:
        nonlocal best
        if space.counts(evaluation.schedule, evaluation.fidelity):
            best = max(best, evaluation.fitness)
        advance(f"best {metric} {best:.5g}{'' if pool is None else f', {pool}'}", evaluation.fidelity)
        if also is not None:
            also(evaluation)

    return on_evaluation
