"""One run from settings to results: calibrate, search, compare on held-out probes, write the run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from diffes import cost, folder, plots
from diffes.adapters import Condition, ModelAdapter, Split, adapter_for, load_pipeline, shipped_models
from diffes.adapters import model_folder as folder_of_model
from diffes.bank import WeightBank, fingerprint
from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.evaluation import ScheduleEvaluator
from diffes.metrics import Metric, make_metric
from diffes.pipeline import load, pick_device
from diffes.pruning import METHODS, PruningMethod
from diffes.pruning.calibration import CalibrationSet, load_calibration, sample_calibration
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan
from diffes.search import SearchResult, run_search
from diffes.space import SearchSpace
from diffes.store import EvaluationStore
from diffes.strategy import STRATEGIES, Evaluation

HELDOUT_SEED = 1_000_000_007  # of the held-out probes: the same for every run, so that runs can be compared
LATENCY_REPEATS = 5


class Progress(Protocol):
    """What a run tells of its progress; `diffes.cli` draws it."""

    def task(self, title: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """Starts a bar; the function it gives advances by one and shows a note."""


@dataclass(frozen=True)
class Workbench:
    """A calibrated model, ready to evaluate schedules: what searches of the same model and method share.

    Args:
        config: the settings.
        adapter: the model.
        space: feasible schedules.
        router: the model with its bank of all stages and levels.
        metric: the fitness.
    """

    config: RunConfig
    adapter: ModelAdapter
    space: SearchSpace
    router: Router
    metric: Metric

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


def prepare(config: RunConfig, progress: Progress) -> Workbench:
    """Loads, checks every setting, then calibrates and prunes: the long part comes last.

    Raises:
        DiffesError: a name is unknown, the budget infeasible, the model or its calibration data unusable.
    """
    STRATEGIES.get(config.strategy)
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
    data = _calibration(config, adapter, method)
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
    return Workbench(config, adapter, space, Router(adapter, bank), metric)


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


def _calibration(config: RunConfig, adapter: ModelAdapter, method: PruningMethod) -> CalibrationSet | None:
    """Images that were named, those that came with the model, or samples of the dense model."""
    if method.needs == "nothing":
        return None
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


def search_on(
    bench: Workbench,
    progress: Progress,
    *,
    strategy: str,
    seed: int,
    max_evals: int,
    store: EvaluationStore | None = None,
) -> SearchResult:
    """One search on a workbench, its probes drawn from `seed` like everything else in it."""
    config = bench.config
    evaluator = bench.evaluator(config.probes, seed)
    best = -math.inf
    with progress.task(f"searching with {strategy}", max_evals) as advance:

        def on_evaluation(evaluation: Evaluation) -> None:
            nonlocal best
            best = max(best, evaluation.fitness)
            advance(f"best {config.metric} {best:.5g}")

        return run_search(
            STRATEGIES.get(strategy)(bench.space, seed=seed),
            evaluator,
            max_evals=max_evals,
            store=store,
            on_evaluation=on_evaluation,
        )


def search(config: RunConfig, out: Path, progress: Progress, *, overwrite: bool = False) -> dict[str, Any]:
    """A whole run. An unfinished run of the same settings in `out` is gone on with; nothing is evaluated twice.

    Returns:
        What `report.json` holds.

    Raises:
        DiffesError: bad settings, or `out` cannot be used; what is there is then untouched.
        OSError: `out` cannot be written to.
    """
    resumes = folder.open_run(out, config, overwrite=overwrite)
    bench = prepare(config, progress)
    folder.begin_run(out, config, resumes=resumes)
    store = EvaluationStore(out / folder.JOURNAL, bench.space.plan, bench.space.max_level)
    result = search_on(
        bench, progress, strategy=config.strategy, seed=config.seed, max_evals=config.max_evals, store=store
    )
    macs_fraction = cost.macs_fraction(bench.router, result.best.schedule, bench.space.steps)
    _write_result(bench, result.best.schedule, macs_fraction, out)
    report = _compare(bench, result, macs_fraction, out, progress)
    folder.write_json(out / folder.REPORT, report)
    return report


def _write_result(bench: Workbench, schedule: Schedule, macs_fraction: float, out: Path) -> None:
    """The bank of the schedule, then the schedule itself."""
    config = bench.config
    bank = bench.router.bank.for_schedule(schedule)
    home = folder_of_model(config.model)
    pruned = {
        "method": config.method,
        "kind": bank.kind,
        "model": str(home.resolve()) if home and config.model not in shipped_models() else config.model,
    }
    header = {"fingerprint": fingerprint(bench.adapter.denoiser), **pruned, **schedule.to_json()}
    folder.write_safely(out / folder.BANK, lambda partial: bank.save(partial, header))
    facts = {
        **pruned,
        "steps": config.steps,
        "guidance": config.guidance,
        "dtype": config.dtype,
        "nominal_sparsity": schedule.nominal_sparsity(bench.space.steps),
        "macs_fraction": macs_fraction,
    }
    folder.write_schedule(out, schedule, facts)


def _compare(
    bench: Workbench, result: SearchResult, macs_fraction: float, out: Path, progress: Progress
) -> dict[str, Any]:
    """Held-out fitness, MACs and speed of the searched schedule beside uniform and fewer dense steps; figures."""
    config, router, steps = bench.config, bench.router, bench.space.steps
    best = result.best.schedule
    uniform = bench.space.schedule(bench.space.uniform())
    with progress.task("held-out probes, speed, figures", 5) as advance:
        heldout = bench.evaluator(config.heldout, HELDOUT_SEED, "heldout")
        fewer = max(1, round(config.steps * macs_fraction))
        scores = {"searched": heldout.scores(best)}
        advance("searched")
        scores["uniform"] = heldout.scores(uniform)
        advance("uniform")
        scores["fewer_steps"] = heldout.dense_scores(fewer)
        advance("dense with fewer steps")
        latency = measure_latency(bench, best, uniform, fewer)
        advance("speed")
        search_uniform = bench.evaluator(config.probes, config.seed).scores(uniform)
        _draw(bench, result, uniform, fewer, out)
        advance("figures")

    def spread(name: str) -> dict[str, float | None]:
        return {"heldout_mean": _finite(scores[name].mean()), "heldout_std": _finite(scores[name].std())}

    return {
        "model": config.model,
        "method": config.method,
        "metric": config.metric,
        "strategy": config.strategy,
        "seed": config.seed,
        "levels": list(best.levels),
        "nominal_sparsity": best.nominal_sparsity(steps),
        "prunable_fraction": cost.prunable_fraction(bench.adapter, router.bank.kind),
        "macs_fraction": macs_fraction,
        "evaluations": len(result.evaluations),
        "denoiser_calls": result.denoiser_calls,
        "search_seconds": result.seconds,
        "fitness": {"search": result.best.fitness, **spread("searched"), "n_heldout": config.heldout},
        "baselines": {
            "uniform": {
                "levels": list(uniform.levels),
                "search": _finite(search_uniform.mean()),
                **spread("uniform"),
                "nominal_sparsity": uniform.nominal_sparsity(steps),
                "macs_fraction": cost.macs_fraction(router, uniform, steps),
                "speedup": latency["dense_ms"] / latency["uniform_ms"],
            },
            "fewer_steps": {
                "steps": fewer,
                **spread("fewer_steps"),
                "macs_fraction": fewer / config.steps,
                "speedup": latency["dense_ms"] / latency["fewer_steps_ms"],
            },
        },
        "latency": latency,
        "bank_bytes": (out / folder.BANK).stat().st_size,
    }


def _finite(score: torch.Tensor) -> float | None:
    """A number for JSON; None where a probe failed."""
    return float(score) if torch.isfinite(score) else None


def measure_latency(bench: Workbench, best: Schedule, uniform: Schedule, fewer: int) -> dict[str, Any]:
    """Median milliseconds of whole runs (noise to pixels) of the search's probes, the candidates taking turns."""
    config, adapter = bench.config, bench.adapter
    probes = adapter.make_probes(config.probes, HELDOUT_SEED, "heldout")

    def images(n_steps: int) -> torch.Tensor:
        return adapter.decode(adapter.sample(probes, n_steps, config.guidance))

    def routed(schedule: Schedule) -> torch.Tensor:
        with bench.router.routed(schedule):
            return images(config.steps)

    dense_ms, routed_ms, uniform_ms, fewer_ms = cost.interleaved_ms(
        [lambda: images(config.steps), lambda: routed(best), lambda: routed(uniform), lambda: images(fewer)],
        LATENCY_REPEATS,
        adapter.device,
    )
    return {
        "dense_ms": dense_ms,
        "routed_ms": routed_ms,
        "uniform_ms": uniform_ms,
        "fewer_steps_ms": fewer_ms,
        "speedup": dense_ms / routed_ms,
        "batch": config.probes,
        "repeats": LATENCY_REPEATS,
        "device": torch.cuda.get_device_name(adapter.device) if adapter.device.type == "cuda" else adapter.device.type,
        "threads": torch.get_num_threads(),
    }


def _draw(bench: Workbench, result: SearchResult, uniform: Schedule, fewer: int, out: Path) -> None:
    config, adapter = bench.config, bench.adapter
    best = result.best.schedule
    evaluator = bench.evaluator(10, HELDOUT_SEED, "heldout")
    columns = [adapter.label(c) for c in adapter.make_probes(10, HELDOUT_SEED, "heldout").conditions]
    rows = {
        f"dense, {config.steps} steps": adapter.decode(evaluator.dense_latents(config.steps)),
        "uniform": adapter.decode(evaluator.latents(uniform)),
        "searched": adapter.decode(evaluator.latents(best)),
        f"dense, {fewer} steps": adapter.decode(evaluator.dense_latents(fewer)),
    }
    figures = {
        "schedule.png": lambda path: plots.schedules({"searched": best, "uniform": uniform}, path),
        "convergence.png": lambda path: plots.convergence(
            {config.strategy: [e.fitness for e in result.evaluations]}, config.metric, path
        ),
        "images.png": lambda path: plots.image_grid(rows, path, columns),
    }
    for name, draw in figures.items():
        folder.write_safely(out / name, draw)


def sample_images(run: Path, conditions: Sequence[Condition] | None, *, seed: int, steps: int | None,
                  guidance: float | None, device: str) -> tuple[torch.Tensor, list[str]]:  # fmt: skip
    """Images of a run's or exported folder's pipeline, routed.

    Args:
        run: the folder.
        conditions: class ids or prompts, one image each; the model's first eight when left out.
        seed: of the noise.
        steps: sampling steps; as in the search when left out.
        guidance: guidance scale; as in the search when left out.
        device: where to run.

    Returns:
        Images (n, channels, h, w) in [0, 1] and a label for each.

    Raises:
        DiffesError: the folder or its model is damaged or missing, or a condition is not the model's.
    """
    _, facts = folder.read_schedule(run)
    adapter = adapter_for(load(run, device=device))
    chosen = list(conditions) if conditions is not None else list(adapter.choices("heldout")[:8])
    n_steps = facts["steps"] if steps is None else steps
    adapter.timesteps(n_steps)  # refuses numbers of steps that the scheduler cannot take
    adapter.pipe.set_progress_bar_config(disable=True)
    images = adapter.generate(
        chosen,
        n_steps=n_steps,
        guidance=facts["guidance"] if guidance is None else guidance,
        generator=torch.Generator(adapter.device).manual_seed(seed),
    )
    return images, [adapter.label(condition) for condition in chosen]
