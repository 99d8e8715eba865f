"""A calibrated model, ready to evaluate schedules: what searches, comparisons and notebooks work on."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffes import cost
from diffes.adapters import ModelAdapter, Split, adapter_for, load_pipeline
from diffes.adapters import model_folder as folder_of_model
from diffes.bank import WeightBank
from diffes.config import RunConfig
from diffes.errors import DiffesError, unknown_name
from diffes.evaluation import ScheduleEvaluator
from diffes.metrics import Metric, make_metric
from diffes.pipeline import pick_device
from diffes.progress import Progress, RichProgress
from diffes.pruning import METHODS
from diffes.pruning.calibration import CalibrationSet, load_calibration, sample_calibration
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan
from diffes.search import SearchResult, run_search
from diffes.space import SearchSpace
from diffes.store import EvaluationStore
from diffes.strategy import CROSSOVERS, MUTATIONS, STRATEGIES, Evaluation, StageProfile

HELDOUT_SEED = 1_000_000_007  # of the held-out probes: the same for every run, so that runs can be compared
LATENCY_REPEATS = 5


@dataclass(frozen=True)
class Workbench:
    """A calibrated model, ready to evaluate schedules: what searches of the same model and method share.

    Args:
        config: the settings.
        adapter: the model.
        space: feasible schedules.
        router: the model with its bank of all stages and levels.
        metric: the fitness.
        costs: (S, H + 1) what the budget counts of one call in each stage at each level; None where it counts levels.
    """

    config: RunConfig
    adapter: ModelAdapter
    space: SearchSpace
    router: Router
    metric: Metric
    costs: list[list[float]] | None = None

    @torch.no_grad()
    def profile(self) -> StageProfile:
        """The dense model's loss in each stage, on the calibration data, at timesteps spread over the stage."""
        adapter, config = self.adapter, self.config
        data = _calibration(config, adapter)
        alphas = adapter.pipe.scheduler.alphas_cumprod.float().cpu()
        losses, ratios = [], []
        for stage, (lo, hi) in enumerate(self.space.plan.stages):
            generator = torch.Generator().manual_seed(config.seed * 100_003 + stage)
            timesteps = torch.linspace(lo, hi - 1, len(data)).round().long()
            noise = torch.randn(data.latents.shape, generator=generator)
            errors = []
            for rows in torch.arange(len(data)).split(32):
                clean, drawn, t = data.latents[rows], noise[rows], timesteps[rows]
                noisy = adapter.add_noise(clean.to(adapter.device, adapter.dtype), drawn, t)
                predicted = adapter.denoise_once(noisy, t, [data.conditions[i] for i in rows.tolist()]).float().cpu()
                wanted = _target(adapter, clean, drawn, alphas[t])
                predicted = predicted[:, : wanted.shape[1]]  # models that learn the variance as well have it below
                errors.append((predicted - wanted).square().flatten(1).mean(1))
            losses.append(float(torch.cat(errors).mean()))
            signal = float(alphas[(lo + hi) // 2])
            ratios.append(math.log(signal / (1 - signal)))
        return StageProfile(tuple(losses), tuple(ratios))

    def search(self, strategy: str = "evolution", *, progress: Progress | None = None, **changes: Any) -> SearchResult:
        """A search on this model, in memory.

        Args:
            strategy: name of a strategy, with options after a colon.
            progress: told of every evaluation; bars when left out.
            changes: other settings than the workbench's own: seed, budget, metric, mutation, max_evals and so on.

        Raises:
            DiffesError: a setting is unusable.
        """
        progress = progress or RichProgress()
        return search_on(vary(self, replace(self.config, strategy=strategy, **changes), progress), progress)

    def damage(self) -> list[list[float]]:
        """(S, H + 1) how much fitness each level of each stage costs on its own, on the search's probes.

        Stages that agree with the dense model share its trajectory, so the whole table costs about half of as many
        evaluations as it has cells.
        """
        evaluator = self.evaluator(self.config.probes, self.config.seed)
        space = self.space
        single = {
            (s, k): space.any_schedule([k if i == s else 0 for i in range(space.n_stages)])
            for s in space.visited
            for k in range(space.max_level + 1)
        }
        fitness = {e.schedule: e.fitness for e in evaluator(list(dict.fromkeys(single.values())))}
        dense = fitness[space.any_schedule([0] * space.n_stages)]
        return [
            [dense - fitness[single[s, k]] if (s, k) in single else 0.0 for k in range(space.max_level + 1)]
            for s in range(space.n_stages)
        ]

    def macs_fraction(self, schedule: Schedule) -> float:
        """MACs of a routed sampling run over those of the dense one, of the whole denoiser."""
        return cost.macs_fraction(self.router, schedule, self.space.steps)

    def with_metric(self, name: str) -> Workbench:
        """The same workbench, measuring by another metric."""
        return vary(self, replace(self.config, metric=name), RichProgress())

    def heldout(self) -> HeldOut:
        """What scores schedules on held-out probes, which no search sees."""
        return HeldOut(self)

    def evaluator(self, n_probes: int, seed: int, split: Split = "search") -> ScheduleEvaluator:
        """An evaluator on probes of its own."""
        probes = self.adapter.make_probes(n_probes, seed, split)
        return ScheduleEvaluator(
            self.router,
            self.space.plan,
            probes,
            n_steps=self.config.steps,
            guidance=self.config.guidance,
            metric=self.metric,
        )


class HeldOut:
    """Scores on held-out probes, each measured once."""

    def __init__(self, bench: Workbench) -> None:
        self._kind = bench.router, bench.metric, bench.config.heldout
        self._evaluator = bench.evaluator(bench.config.heldout, HELDOUT_SEED, "heldout")
        self._known: dict[Schedule | int, tuple[float, float]] = {}

    def serves(self, bench: Workbench) -> bool:
        """Whether another workbench would measure the same."""
        return self._kind == (bench.router, bench.metric, bench.config.heldout)

    def __call__(self, candidate: Schedule | int) -> tuple[float, float]:
        """Mean and standard deviation over the probes of a schedule, or of the dense model at a number of steps."""
        if candidate not in self._known:
            measure = self._evaluator
            scores = measure.dense_scores(candidate) if isinstance(candidate, int) else measure.scores(candidate)
            self._known[candidate] = float(scores.mean()), float(scores.std())
        return self._known[candidate]


def prepare(config: RunConfig, progress: Progress, costs: list[list[float]] | None = None) -> Workbench:
    """Loads, checks every setting, then calibrates and prunes: the long part comes last.

    Args:
        config: the settings.
        progress: told of the long part.
        costs: those of an earlier workbench of the same settings; measured anew when left out.

    Raises:
        DiffesError: a name is unknown, the budget infeasible, the model or its calibration data unusable.
    """
    check_strategy(config)
    method = METHODS.make(config.method)
    device = pick_device(config.device)
    pipe = load_pipeline(config.model, device=device, dtype=getattr(torch, config.dtype))
    pipe.set_progress_bar_config(disable=True)
    adapter = adapter_for(pipe)
    if config.prompts is not None:
        adapter.use_prompts(Path(config.prompts))
    plan = StagePlan.equal(config.stages, adapter.n_timesteps)
    steps = plan.count_steps(adapter.timesteps(config.steps))
    space = SearchSpace.mean_sparsity(plan, adapter.max_level(method.kind), config.budget, steps)
    metric = make_metric(config.metric, adapter.device)
    _try_metric(metric, adapter)
    data = None if method.needs == "nothing" else _calibration(config, adapter)
    visited = space.visited
    with progress.task(f"calibrating {config.method}", len(visited)) as advance:
        bank = WeightBank.build(
            adapter,
            method,
            plan,
            data,
            guided=config.guidance > 1,
            seed=config.seed,
            stages=visited,
            progress=lambda stage: advance(f"stage {stage}"),
        )
    return vary(Workbench(config, adapter, space, Router(adapter, bank), metric), config, progress, costs)


def workbench(progress: Progress | None = None, **settings: Any) -> Workbench:
    """A calibrated model to search on, as notebooks want it.

    Args:
        progress: told of the calibration; bars when left out.
        settings: of `diffes.config.RunConfig`, for instance model="fashion-dit", method="obs", stages=10.

    Raises:
        DiffesError: a setting is unusable.
    """
    unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(RunConfig)})
    if unknown:
        raise unknown_name("setting", unknown[0], RunConfig().to_json())
    return prepare(RunConfig(**settings), progress or RichProgress())


def vary(bench: Workbench, config: RunConfig, progress: Progress, costs: list[list[float]] | None = None) -> Workbench:
    """The same calibrated model with other settings of the search: strategy, budget, metric, seed and so on.

    Args:
        bench: a workbench of the same model, method, stages, steps and guidance.
        config: the settings.
        progress: told of what is measured.
        costs: what the budget counts, where it was measured before.

    Raises:
        DiffesError: a name is unknown, or the budget infeasible.
    """
    check_strategy(config)
    router, adapter = bench.router, bench.adapter
    plan, steps, max_level = bench.space.plan, bench.space.steps, bench.space.max_level
    metric = bench.metric
    if config.metric != bench.config.metric:
        metric = make_metric(config.metric, adapter.device)
        _try_metric(metric, adapter)
    if config.cost == "level":
        return Workbench(
            config, adapter, SearchSpace.mean_sparsity(plan, max_level, config.budget, steps), router, metric
        )
    if costs is None and config.cost == bench.config.cost and config.probes == bench.config.probes:
        costs = bench.costs  # milliseconds depend on the batch
    if costs is None:
        with progress.task(f"{config.cost} by level", 1) as advance:
            costs = _measure_costs(config, router, plan, bench.space.visited, max_level)
            advance("")
    space = SearchSpace.dense_fraction(plan, steps, costs, config.budget)
    return Workbench(config, adapter, space, router, metric, costs)


def _measure_costs(
    config: RunConfig, router: Router, plan: StagePlan, visited: Sequence[int], max_level: int
) -> list[list[float]]:
    if config.cost == "macs":
        return cost.macs_by_level(router, plan, visited, max_level)
    probes = router.adapter.make_probes(config.probes, HELDOUT_SEED, "heldout")
    return cost.ms_by_level(router, plan, visited, max_level, probes, LATENCY_REPEATS)


def check_strategy(config: RunConfig) -> dict[str, str]:
    """The operators that the settings give to the strategy.

    Raises:
        DiffesError: there is no such strategy or operator, or the strategy takes none.
    """
    strategy, _ = STRATEGIES.parse(config.strategy)
    operators = {name: spec for name in ("mutation", "crossover") if (spec := getattr(config, name)) is not None}
    for name, spec in operators.items():
        if name not in inspect.signature(strategy).parameters:
            raise DiffesError(f"strategy {config.strategy!r} takes no {name}; leave --{name} {spec} out")
        {"mutation": MUTATIONS, "crossover": CROSSOVERS}[name].parse(spec)
    given: dict[str, Any] = dict(operators)
    if "profile" in inspect.signature(strategy).parameters:
        given["profile"] = StageProfile((1.0, 0.5), (0.0, 1.0))
    STRATEGIES.make(config.strategy, SearchSpace.mean_sparsity(StagePlan.equal(2), 2, 0.5), seed=0, **given)
    return operators


def _try_metric(metric: Metric, adapter: ModelAdapter) -> None:
    """Scores two images once, so that a metric that cannot work here says so before the long part.

    Raises:
        DiffesError: it does not score single images of this size.
    """
    latents = adapter.make_probes(2, 0).noise.to(adapter.device, adapter.dtype)
    images = latents if metric.space == "latent" else adapter.decode(latents)
    try:
        metric(images, images)
    except Exception as error:  # each metric fails in its own way
        reason = " ".join(str(error).split())[:300]
        raise DiffesError(
            f"metric {metric.name!r} cannot score images of shape {tuple(images.shape[1:])} one by one "
            f"({type(error).__name__}: {reason}); choose another, for instance ssim, psnr or latent_mse"
        ) from error


def _target(adapter: ModelAdapter, clean: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    """What the denoiser is trained to predict (n, C, h, w); `signal` (n,) is alpha-bar."""
    kind = adapter.pipe.scheduler.config.prediction_type
    if kind == "sample":
        return clean
    root = signal.view(-1, 1, 1, 1)
    return noise if kind == "epsilon" else root.sqrt() * noise - (1 - root).sqrt() * clean


def _calibration(config: RunConfig, adapter: ModelAdapter) -> CalibrationSet:
    """Images that were named, those that came with the model, or samples of the dense model."""
    if config.calibration_data is not None:
        path: Path | None = Path(config.calibration_data)
    else:
        home = folder_of_model(config.model)
        path = home / "calibration.npz" if home and (home / "calibration.npz").is_file() else None
    if path is not None:
        return load_calibration(adapter, path, config.calibration_samples)
    return sample_calibration(
        adapter, config.calibration_samples, n_steps=config.steps, guidance=config.guidance, seed=HELDOUT_SEED + 1
    )


def search_on(bench: Workbench, progress: Progress, store: EvaluationStore | None = None) -> SearchResult:
    """One search on a workbench, its probes drawn from the seed like everything else in it."""
    config, space = bench.config, bench.space
    given: dict[str, Any] = dict(check_strategy(config))
    if "profile" in inspect.signature(STRATEGIES.parse(config.strategy)[0]).parameters:
        given["profile"] = bench.profile()
    strategy = STRATEGIES.make(config.strategy, space, seed=config.seed, **given)
    best = -math.inf
    with progress.task(f"searching with {config.strategy}", config.max_evals) as advance:

        def on_evaluation(evaluation: Evaluation) -> None:
            nonlocal best
            if space.counts(evaluation.schedule, evaluation.fidelity):
                best = max(best, evaluation.fitness)
            advance(f"best {config.metric} {best:.5g}", evaluation.fidelity)

        return run_search(
            strategy,
            bench.evaluator(config.probes, config.seed),
            max_evals=config.max_evals,
            max_denoiser_calls=config.max_calls,
            store=store,
            on_evaluation=on_evaluation,
        )
