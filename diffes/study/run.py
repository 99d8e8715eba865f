"""Run from settings to results: search, comparison on held-out probes, run folder."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from diffes import files
from diffes.adapters import Condition, adapter_for
from diffes.config import ALONE, HELDOUT_SEED, RunConfig, WorkerOptions
from diffes.errors import DiffesError
from diffes.figures import charts, plots
from diffes.forms import ScheduleFacts
from diffes.measure.currencies import prunable_fraction
from diffes.measure.quality import finite
from diffes.problems.base import PROBLEMS
from diffes.problems.checks import check_settings
from diffes.problems.heldout import HeldOut, record_of
from diffes.problems.levels import Levels
from diffes.problems.workbench import Workbench, search_on
from diffes.progress import Progress
from diffes.pruning.bank import fingerprint, split_of
from diffes.results import folder
from diffes.results.artifact import BANK, chosen, write_schedule
from diffes.results.lock import held
from diffes.results.record import FEWER_STEPS, UNIFORM, Candidate, Report, Timing
from diffes.results.report import write_report
from diffes.runtime.apply import load
from diffes.spaces.database import ALIKE, check_owner
from diffes.spaces.ledger import OnEvaluation, SearchResult
from diffes.spaces.schedule import Plan, Schedule
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Evaluation
from diffes.study.begin import begun, with_threads

Advance = Callable[..., None]
IMAGES = 6  # per row of the picture that shows all candidates
OF_EACH = {  # settings in which processes that share a study may differ
    "strategy", "mutation", "crossover", "max_evals", "max_calls", "time_limit", "heldout", "bank_memory", "storage",
    "device", "threads",
}  # fmt: skip
FRONT_POINTS = 10  # points of a front that are measured on held-out probes


def complete_run(
    config: RunConfig,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    on_evaluation: OnEvaluation | None = None,
    workers: WorkerOptions = ALONE,
) -> Report:
    """Make a whole run, from settings to a run folder.

    An unfinished run of the same settings in `out` continues, and so does a finished one whose limits are raised.

    Args:
        config: the settings.
        out: the folder, which this process holds until the run is done.
        progress: progress display.
        overwrite: replace what is there.
        on_evaluation: called with each evaluation after it is stored, those of earlier commands included.
        workers: worker settings.

    Raises:
        DiffesError: bad settings, or `out` cannot be used; its content is then untouched.
        OSError: `out` cannot be written to.
    """
    config = config.resolved()
    if PROBLEMS.parse(config.genes)[0] is not Levels:
        raise DiffesError(f"complete_run makes runs of schedules, and --genes is {config.genes}: use complete_front")
    check_settings(config)
    config = with_threads(config, out / files.CONFIG)
    with held(out):
        return _run_in(out, config, progress, overwrite, on_evaluation, workers)


def _run_in(
    out: Path,
    config: RunConfig,
    progress: Progress,
    overwrite: bool,
    on_evaluation: OnEvaluation | None,
    workers: WorkerOptions,
) -> Report:
    """Make the run in a folder that this process holds."""
    if overwrite and config.study is not None:
        raise DiffesError(f"--overwrite would leave what others measured in --study {config.study}: name another study")

    def check(resumes: bool) -> None:
        if config.storage is not None:
            check_settings(config)
            fresh = not resumes and not overwrite and config.study is None
            check_owner(config.storage, *_study_of(config, out), fresh=fresh)

    def forget(resumes: bool) -> None:
        if config.storage is not None and overwrite and not resumes:
            EvaluationStore.forget(config.storage, *_study_of(config, out))

    with begun(out, config, progress, overwrite=overwrite, workers=workers, check=check, on_begin=forget) as bench:
        result = _searched(out, bench, progress, on_evaluation)
    write_result(bench, result.best.schedule, out)
    with progress.task("held-out probes, speed, figures", 3) as advance:
        report = _reported(bench, result, out, advance)
        _draw(bench, result, report, out)
        advance("figures")
    write_report(out, report)
    folder.end_run(out)
    return report


def _searched(out: Path, bench: Workbench, progress: Progress, on_evaluation: OnEvaluation | None) -> SearchResult:
    """Search, beginning with the evaluations that are stored in the folder or in the database."""
    config = bench.config
    store = (
        EvaluationStore(out / folder.JOURNAL, bench.space)
        if config.storage is None
        else EvaluationStore(config.storage, bench.space, *_study_of(config, out), shared=config.study is not None)
    )
    result = search_on(
        bench, progress, store, on_evaluation, seed=None if config.study is None else _own_seed(config, out)
    )
    folder.write_logbook(out, result.logbook)
    return result


def _study_of(config: RunConfig, out: Path) -> tuple[str, str]:
    """Return name and owner of a run's study in a database: its own, or one shared by all with the same settings."""
    if config.study is None:
        return out.resolve().name, str(out.resolve())
    alike = {name: value for name, value in config.to_json().items() if name not in OF_EACH}
    return config.study, f"{ALIKE}{files.checksum(alike)[:16]}"


def _own_seed(config: RunConfig, out: Path) -> int:
    """Return the seed of a strategy that shares a study: one per folder, so that each asks for other schedules."""
    return int.from_bytes(hashlib.sha256(f"{config.seed} {platform.node()} {out.resolve()}".encode()).digest()[:3])


def write_result(bench: Workbench, schedule: Schedule, out: Path) -> None:
    """Write the bank of the schedule, then the schedule itself."""
    config = bench.config
    bank = bench.router.bank.for_schedule(schedule)
    pruned = {**bench.made_for(), "split": split_of(bank, bench.adapter.prunable(bank.kind))}
    header = {"fingerprint": fingerprint(bench.adapter.denoiser), **pruned, **schedule.to_json()}
    files.write_safely(out / BANK, lambda partial: bank.save(partial, header))
    facts = {
        **pruned,
        "steps": config.steps,
        "guidance": config.scale,
        "dtype": config.dtype,
        "nominal_sparsity": schedule.nominal_sparsity(bench.levels.steps),
        "macs_fraction": bench.macs_fraction(schedule),
    }
    write_schedule(out, schedule, facts)


def _reported(bench: Workbench, result: SearchResult, out: Path, advance: Advance) -> Report:
    """Measure the schedule found beside its rivals: held-out fitness, MACs and speed."""
    record = record_of(bench, result)
    advance("held-out probes")
    best, uniform, fewer = result.best.schedule, bench.uniform(), record.rivals[FEWER_STEPS].steps
    dense_ms, *ms = bench.milliseconds([bench.config.steps, best, uniform, fewer], bench.config.probes)
    advance("speed")
    fitness = float(bench.evaluator(bench.config.probes, bench.config.seed).scores(uniform).mean())
    record = replace(
        record,
        searched=replace(record.searched, ms=ms[0]),
        rivals={
            UNIFORM: replace(record.rivals[UNIFORM], ms=ms[1], search=finite(fitness)),
            FEWER_STEPS: replace(record.rivals[FEWER_STEPS], ms=ms[2]),
        },
    )
    explores = STRATEGIES.parse(bench.config.strategy)[0].explores
    return Report(
        run=record,
        timing=Timing(dense_ms, **bench.timed_on()),
        prunable_fraction=prunable_fraction(bench.adapter, bench.router.bank.kind),
        bank_bytes=(out / BANK).stat().st_size,
        front=_front(bench, result.front(bench.space), bench.heldout()) if explores else {},
        paid_calls=result.paid_calls,
    )


def _front(bench: Workbench, front: Sequence[Evaluation], heldout: HeldOut) -> dict[str, list[Candidate]]:
    """Measure at most `FRONT_POINTS` along the searched front, with its ends, and of the dense model at fewer steps."""
    at = sorted({round(i * (len(front) - 1) / (FRONT_POINTS - 1)) for i in range(FRONT_POINTS)})
    searched = [heldout(front[i].schedule, front[i].fitness) for i in at]
    steps = bench.config.steps
    fewest = max(1, round(steps * min(candidate.macs_fraction for candidate in searched)))
    counts = sorted({round(float(n)) for n in np.linspace(fewest, steps, min(FRONT_POINTS, steps + 1 - fewest))})
    return {"searched": searched, "dense, fewer steps": [heldout(n) for n in counts]}


def _draw(bench: Workbench, result: SearchResult, report: Report, out: Path) -> None:
    """Draw the figures of a run folder. Its images are of held-out probes."""
    config, adapter, best, uniform = bench.config, bench.adapter, result.best.schedule, bench.uniform()
    fewer = report.run.rivals[FEWER_STEPS].steps
    evaluator = bench.evaluator(IMAGES, HELDOUT_SEED, "heldout")
    rows = {
        f"dense, {config.steps} steps": evaluator.dense_latents(config.steps),
        "uniform": evaluator.latents(uniform),
        "searched": evaluator.latents(best),
        f"dense, {fewer} steps": evaluator.dense_latents(fewer),
    }
    captions = [adapter.label(condition) for condition in evaluator.probes.conditions]
    images = {name: adapter.decode(latents) for name, latents in rows.items()}
    prunable = adapter.prunable(bench.router.bank.kind)
    kept = [bench.router.bank.kept(key, prunable) for key in enumerate(best.levels)]
    figures = {
        "split.png": plots.layer_split(prunable, kept, best),
        "schedule.png": plots.schedules({"searched": best, "uniform": uniform}),
        "convergence.png": charts.convergence({config.strategy: result}, config.metric),
        "images.png": plots.image_grid(images, captions, differences=True),
    }
    if report.front:
        figures[folder.FRONT] = _front_figure(bench, report)
    for name, figure in figures.items():
        files.write_safely(out / name, functools.partial(plots.save, figure))


def _front_figure(bench: Workbench, report: Report) -> Figure:
    """Draw the searched front and the dense model at fewer steps, with the budget and the chosen schedule."""
    config, run = bench.config, report.run

    def over(candidate: Candidate) -> bool:
        return candidate.levels is not None and not bench.space.fits(candidate.levels)

    points = {
        label: [(c.macs_fraction, c.heldout_mean, over(c)) for c in candidates if c.heldout_mean is not None]
        for label, candidates in report.front.items()
    }
    marked = {
        name: (candidate.macs_fraction, candidate.heldout_mean)
        for name, candidate in (("chosen", run.searched), (UNIFORM, run.rivals[UNIFORM]))
        if candidate.heldout_mean is not None
    }
    assert config.budget is not None
    if config.cost == "macs":
        budget = config.budget, "budget"
    else:
        budget = run.rivals[UNIFORM].macs_fraction, f"budget in {config.cost}, {config.budget:g}: MACs of uniform"
    return charts.fitness_over_macs(points, f"held-out {config.metric}", budget, marked)


def sample_images(
    run: Path,
    conditions: Sequence[Condition] | None,
    *,
    seed: int,
    steps: int | None,
    guidance: float | None,
    device: str,
    calls: float | None = None,
    resident: str = "auto",
) -> tuple[torch.Tensor, list[str]]:
    """Sample images with the schedule or plan of a run, of a front or of an exported folder.

    Args:
        run: the folder.
        conditions: class ids or prompts, one image each; the model's first eight when left out.
        seed: seed of the noise.
        steps: sampling steps; as in the search when left out.
        guidance: guidance scale; as in the search when left out.
        device: where to run.
        calls: for a front, the most that the plan may cost, in dense calls.
        resident: which pruned layers stay ready on the device (see `apply`).

    Returns:
        Images (n, channels, h, w) in [0, 1] and a label for each.

    Raises:
        DiffesError: the folder or its model is damaged or missing, or a condition or the number of steps is not the
            model's or the plan's.
    """
    routed, facts = chosen(run, calls)
    own_steps = facts.steps if isinstance(facts, ScheduleFacts) else len(facts.points[0].timesteps)
    adapter = adapter_for(load(run, device=device, calls=calls, resident=resident))
    if (run / files.CONFIG).is_file():  # a run, not an export: its images are made by the call that it was searched for
        settings = files.read_json(run / files.CONFIG).get("settings")
        adapter.configure(None, settings.get("call") if isinstance(settings, dict) else None)
    wanted = list(conditions) if conditions is not None else list(adapter.choices("heldout")[:8])
    n_steps = own_steps if steps is None else steps
    if isinstance(routed, Plan) and n_steps != own_steps:
        raise DiffesError(f"the plan of {run} makes {own_steps} denoiser calls, got steps {n_steps}: leave it out")
    if not isinstance(routed, Plan):
        adapter.timesteps(n_steps)  # raises if the scheduler cannot take this number of steps
    adapter.pipe.set_progress_bar_config(disable=True)
    images = adapter.generate(
        wanted,
        n_steps=n_steps,
        guidance=facts.guidance if guidance is None else guidance,
        generator=torch.Generator(adapter.device).manual_seed(seed),
    )
    return images, [adapter.label(condition) for condition in wanted]
