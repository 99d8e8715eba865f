"""One run from settings to results: search, compare on held-out probes, write the run folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffes import cost, folder, plots
from diffes.adapters import Condition, adapter_for, shipped_models
from diffes.adapters import model_folder as folder_of_model
from diffes.bank import fingerprint
from diffes.bench import HELDOUT_SEED, LATENCY_REPEATS, Workbench, prepare, search_on
from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.evaluation import ScheduleEvaluator
from diffes.pipeline import load
from diffes.progress import Progress
from diffes.schedule import Schedule
from diffes.search import SearchResult
from diffes.store import EvaluationStore
from diffes.strategy import STRATEGIES, Evaluation

FRONT_POINTS = 10  # of a front, measured on held-out probes


def search(config: RunConfig, out: Path, progress: Progress, *, overwrite: bool = False) -> dict[str, Any]:
    """A whole run. An unfinished run of the same settings in `out` is gone on with; nothing is evaluated twice.

    Returns:
        What `report.json` holds.

    Raises:
        DiffesError: bad settings, or `out` cannot be used; what is there is then untouched.
        OSError: `out` cannot be written to.
    """
    resumes = folder.open_run(out, config, overwrite=overwrite)
    known = folder.read_json(out / folder.COSTS) if resumes and (out / folder.COSTS).exists() else {}
    bench = prepare(config, progress, known.get("costs"))
    if config.storage is not None:
        store = _database_store(config.storage, bench, out, resumes=resumes, overwrite=overwrite)
        folder.begin_run(out, config, resumes=resumes)
    else:
        folder.begin_run(out, config, resumes=resumes)
        store = EvaluationStore(out / folder.JOURNAL, bench.space)
    if bench.costs is not None:
        folder.write_json(out / folder.COSTS, {"cost": config.cost, "costs": bench.costs})
    result = search_on(bench, progress, store)
    macs_fraction = cost.macs_fraction(bench.router, result.best.schedule, bench.space.steps)
    _write_result(bench, result.best.schedule, macs_fraction, out)
    report = _compare(bench, result, macs_fraction, out, progress)
    folder.write_json(out / folder.REPORT, report)
    return report


def _database_store(url: str, bench: Workbench, out: Path, *, resumes: bool, overwrite: bool) -> EvaluationStore:
    """The study of this run in a database; it has the name of the run folder and remembers which folder that was."""
    study, owner = out.resolve().name, str(out.resolve())
    if overwrite and not resumes:
        EvaluationStore.forget(url, study, owner)
    store = EvaluationStore(url, bench.space, study, owner)
    if not resumes and len(store):
        raise DiffesError(
            f"{url} has evaluations of a study {study!r} already; pass --overwrite to replace them, or name another "
            "--out folder"
        )
    return store


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
    front = _thinned(result.front(bench.space)) if STRATEGIES.parse(config.strategy)[0].explores else []
    with progress.task("held-out probes, speed, figures", 5 + len(front)) as advance:
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
        fronts = _front(bench, front, heldout, advance) if front else {}
        if fronts:
            figure = plots.front(
                {
                    name: [(p["macs_fraction"], p["heldout_mean"]) for p in points if p["heldout_mean"] is not None]
                    for name, points in fronts.items()
                },
                "MACs",
                f"held-out {config.metric}",
            )
            folder.write_safely(out / folder.FRONT, functools.partial(plots.save, figure))

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
        "front": fronts,
        "bank_bytes": (out / folder.BANK).stat().st_size,
    }


def _thinned(front: Sequence[Evaluation]) -> list[Evaluation]:
    """At most `FRONT_POINTS` of a front, its ends among them."""
    at = {round(i * (len(front) - 1) / (FRONT_POINTS - 1)) for i in range(FRONT_POINTS)}
    return [front[i] for i in sorted(at)]


def _front(
    bench: Workbench, front: Sequence[Evaluation], heldout: ScheduleEvaluator, advance: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Held-out fitness and MACs along the front that was searched, and of the dense model at fewer steps."""
    steps, router = bench.config.steps, bench.router
    searched: list[dict[str, Any]] = []
    for evaluation in front:
        schedule = evaluation.schedule
        searched.append(
            {
                "levels": list(schedule.levels),
                "macs_fraction": cost.macs_fraction(router, schedule, bench.space.steps),
                "search": evaluation.fitness,
                "heldout_mean": _finite(heldout.scores(schedule).mean()),
            }
        )
        advance("front")
    fewest = max(1, round(steps * min(point["macs_fraction"] for point in searched)))
    counts = sorted({round(float(n)) for n in np.linspace(fewest, steps, min(FRONT_POINTS, steps + 1 - fewest))})
    fewer = [
        {"steps": n, "macs_fraction": n / steps, "heldout_mean": _finite(heldout.dense_scores(n).mean())}
        for n in counts
    ]
    return {"searched": searched, "dense, fewer steps": fewer}


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
    eligible = [e.fitness for e, counts in zip(result.evaluations, result.eligible, strict=True) if counts]
    figures = {
        "schedule.png": plots.schedules({"searched": best, "uniform": uniform}),
        "convergence.png": plots.convergence({config.strategy: eligible}, config.metric),
        "images.png": plots.image_grid(rows, columns),
    }
    for name, figure in figures.items():
        folder.write_safely(out / name, functools.partial(plots.save, figure))


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
