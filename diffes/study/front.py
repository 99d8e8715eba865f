"""Plans at many budgets from one calibration: `diffes front`, and the folder that it writes."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffes import files
from diffes.adapters import ModelAdapter
from diffes.config import ALONE, MOST_CALLS, RunConfig, WorkerOptions
from diffes.errors import DiffesError
from diffes.figures import charts, plots
from diffes.forms import FrontRecord, PlanPoint
from diffes.measure.quality import Quality, finite, latent_quality
from diffes.measure.reference import SOLVER, SPACING
from diffes.problems.base import PROBLEMS
from diffes.problems.checks import check_settings
from diffes.problems.plans import OFF_THE_SHELF, Finalist, Genes, PlanProblem, Plans, whole_calls
from diffes.progress import Progress
from diffes.pruning.bank import fingerprint, split_of
from diffes.results import folder
from diffes.results.artifact import BANK, FRONT, read_front, write_front
from diffes.results.lock import held
from diffes.solvers import SOLVERS
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.ledger import OnEvaluation, SearchResult
from diffes.spaces.plan import trailing
from diffes.spaces.schedule import Plan
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.study.begin import begun, with_threads

KINDS = ("dense", "off-the-shelf", "dense-planned", "dense-fitted", "levels", "joint")
WITHOUT = {  # by kind of a search, the simpler kinds that it begins with and must not fall behind
    "dense-planned": ("dense",), "dense-fitted": ("dense", "dense-planned"), "levels": (),
    "joint": ("dense-planned", "dense-fitted"),
}  # fmt: skip
IMAGES = 6  # per row of the picture that shows all kinds
PAPERS = "evolution"  # the strategy of "levels"


@dataclass(frozen=True)
class Point:
    """Plan of a front.

    Args:
        kind: "dense", evenly spaced dense calls by DPM-Solver++ 2M, the best of four spacings; "off-the-shelf", the
            same by the best of diffusers' multistep solvers; "dense-planned", 2M at timesteps that were searched for
            it; "dense-fitted", dense calls searched with the solver fitted in each evaluation; "levels", the paper's
            search, a level for each stage at evenly spaced timesteps, by 2M; "joint", timesteps and levels.
        budget: budget in dense calls.
        final: the plan, and its fitness on the probes of the final fit.
        calls_spent: denoiser calls, in rows, of its search and final fit, without those of the references.
        found: result of its search.
    """

    kind: str
    budget: float
    final: Finalist
    calls_spent: int
    found: SearchResult | None = None

    @property
    def plan(self) -> Plan:
        """Plan of the point: its calls and its solver."""
        return self.final.plan


def complete_front(
    config: RunConfig,
    budgets: Sequence[float],
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    on_evaluation: OnEvaluation | None = None,
    workers: WorkerOptions = ALONE,
    adapter: ModelAdapter | None = None,
) -> FrontRecord:
    """Calibrate, search every budget, fit the plans found once more, and write the folder.

    An unfinished front continues, and so does a finished one whose limits are raised.

    Args:
        config: the settings; its genes are "joint", for all kinds of `Point`, or "steps", for those of dense calls. Its
            `calls` is not used, its cost is the currency. A solver that is not fitted leaves "dense-fitted" out.
        budgets: budgets in dense calls, each at least 1.
        out: the folder.
        progress: progress display.
        overwrite: replace what is there.
        on_evaluation: called with each evaluation of each search, those of earlier commands included.
        workers: worker settings.
        adapter: adapter of a pipeline that is loaded already; by the settings when left out.

    Returns:
        The content of `front.json`: facts about the calibration and the reference, and plans as `points`.

    Raises:
        DiffesError: bad settings, or `out` cannot be used; its content is then untouched.
    """
    config = replace(config.resolved(), calls=None)
    genes, solver = config.genes, config.solver or ""
    if not issubclass(PROBLEMS.parse(genes)[0], PlanProblem):
        raise DiffesError(f"a front is of plans, and --genes is {genes}: take joint or steps")
    check_settings(config)
    if genes == "steps" and solver != SOLVER and not SOLVERS.parse(solver)[0].fits:
        raise DiffesError(
            f"solver {solver!r} has no coefficients to fit, and --genes steps searches timesteps for fitted ones and "
            f"for {SOLVER}: leave --solver out, or search --genes joint"
        )
    budgets = _checked(budgets)
    if len({f"{budget:g}" for budget in budgets}) < len(budgets):
        raise DiffesError(f"budgets must differ, in six digits, got {list(budgets)}")
    if config.storage is not None:
        raise DiffesError(
            f"plans keep their evaluations in journals in the run folder, and --storage {config.storage} is for "
            "--genes levels: leave it out"
        )
    extra: dict[str, Any] = {"budgets": sorted(budgets)}
    if adapter is not None:
        extra |= {"call_arguments": said(adapter.call), "fingerprint": fingerprint(adapter.denoiser)}
    config = with_threads(config, out / files.CONFIG)
    with held(out):
        return _front_in(config, out, progress, extra, overwrite, on_evaluation, workers, adapter)


def _checked(budgets: Any) -> list[float]:
    """Return budgets as a list of numbers.

    Raises:
        DiffesError: they are no such list, or one is below 1 or too large.
    """
    given = np.ravel(budgets).tolist() if isinstance(budgets, np.ndarray) else budgets
    numbers = isinstance(given, Sequence) and all(type(budget) in (int, float) for budget in given)
    if not numbers or not given or not all(1 <= budget <= MOST_CALLS for budget in given):
        raise DiffesError(
            f"budgets are numbers of dense calls, at least one budget, none below 1, which a dense call costs, and "
            f"none above {MOST_CALLS}, got {budgets!r}"
        )
    return list(given)


def _front_in(
    config: RunConfig,
    out: Path,
    progress: Progress,
    extra: Mapping[str, Any],
    overwrite: bool,
    on_evaluation: OnEvaluation | None,
    workers: WorkerOptions,
    adapter: ModelAdapter | None,
) -> FrontRecord:
    """Make the front in a folder that this process holds. `extra` are its settings beside those of every run."""
    genes: Genes = config.genes  # type: ignore[assignment]
    settings = replace(config, calls=max(extra["budgets"]))
    with begun(
        out,
        config,
        progress,
        overwrite=overwrite,
        workers=workers,
        extra=extra,
        finished=FRONT,
        searched=settings,
        adapter=adapter,
    ) as bench:
        plans = Plans(bench)
        progress.say(estimate(plans, extra["budgets"], genes))
        make_references(plans, progress)
        points: list[Point] = []
        for budget in extra["budgets"]:
            points += searched(plans, budget, genes, progress, out / folder.JOURNALS, on_evaluation)
    with progress.task("held-out probes, speed, figures", 2) as advance:
        split = _write_bank(plans, [point.plan for point in points], out)
        rows, pictures = _measured(plans, points)
        advance("measured")
        spent: dict[str, Any] = {
            "reference_calls": plans.reference_calls,
            "calls_spent": sum(point.calls_spent for point in points),
        }
        spent["split"] = split
        front = FrontRecord(**facts_of(plans), **spent, genes=genes, points=rows)
        figures = {
            folder.FRONT: charts.error_over_cost(rows, config.cost, front.timing),
            "plans.png": plots.plans({f"{point.kind}, {point.budget:g}": point.plan for point in points}),
        }
        figures |= _shown(plans, points, pictures)
        for name, figure in figures.items():
            files.write_safely(out / name, functools.partial(plots.save, figure))
        advance("figures")
        write_front(out, front)
    folder.end_run(out)
    return read_front(out)


def said(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call for a record: texts and numbers as they are, a digest of anything else."""
    plain = str | int | float | None

    def one(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [one(each) for each in value]
        if isinstance(value, plain):
            return value
        pixels = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        held = pixels.tobytes() if pixels.dtype != object else repr(value).encode()
        return f"{type(value).__name__} {hashlib.sha256(held).hexdigest()[:12]}"

    return {name: one(value) for name, value in call.items()}


def estimate(plans: Plans, budgets: Sequence[float], genes: Genes) -> str:
    """Return in words how many denoiser calls a front makes at most, and how long they take, from two timed ones."""
    bench, config = plans.bench, plans.bench.config
    searches = sum(kind not in ("dense", "off-the-shelf") for kind in KINDS) - (2 if genes == "steps" else 0)
    images = config.probes + plans.fit_probes + config.heldout
    calls = images * plans.reference_steps + searches * config.max_evals * config.probes * sum(
        map(whole_calls, budgets)
    )
    seconds = _seconds_of_an_image(bench.adapter, config.probes, config.scale) * calls
    long = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 0.1):.1f} minutes"
    return f"about {calls:,} denoiser calls on one image each, {long} on this machine"


@torch.no_grad()
def _seconds_of_an_image(adapter: ModelAdapter, n: int, guidance: float) -> float:
    """Return the seconds that a denoiser call takes for each image, where `n` of them are sampled together."""
    timesteps = trailing(min(3, adapter.reach), adapter.reach)

    def timed(n: int) -> float:
        probes = adapter.make_probes(n, 0)
        scheduler = PlanScheduler.of(adapter.own_scheduler, timesteps, SOLVER, adapter.device)
        state = adapter.step(adapter.start(probes, scheduler, guidance), probes, guidance)  # warms up
        begins = time.perf_counter()
        state = adapter.step(state, probes, guidance)
        if adapter.device.type == "cuda":
            torch.cuda.synchronize(adapter.device)
        seconds = time.perf_counter() - begins
        if state.drive is not None:
            state.drive.close()
        return seconds / n

    return adapter.within_room(timed, n if adapter.batched else 1)


def make_references(plans: Plans, progress: Progress) -> None:
    """Sample the dense reference on the probes of the search, of the final fit and of the report, with a bar."""
    config = plans.bench.config
    sizes = {"searched": config.probes, "refitted": plans.fit_probes, "heldout": config.heldout}
    if isinstance(config.guidance, tuple):
        sizes["ends"] = 2 * config.heldout
    with progress.task(f"dense references, {plans.reference_steps} steps", sum(sizes.values())) as advance:
        for name, n in sizes.items():
            getattr(plans, name)
            advance(f"{n} probes", n)


def searched(
    plans: Plans,
    budget: float,
    genes: Genes = "joint",
    progress: Progress | None = None,
    journals: Path | None = None,
    on_evaluation: OnEvaluation | None = None,
    kinds: Sequence[str] = KINDS,
) -> list[Point]:
    """Search a point of each kind at one budget.

    Each search begins with the plans of simpler kinds (`WITHOUT`), and its best few plans are fitted and compared on
    probes that it has not seen. On these, no point is worse than those of the simpler kinds. Searches of dense calls
    have as many evaluations as the settings say. Those of "levels" and "joint" spend at most the denoiser calls that
    the search of "dense-fitted" took.

    Args:
        plans: the workbench, solver and nodes.
        budget: budget in dense calls.
        genes: "joint" for all kinds, "steps" for dense ones only.
        progress: progress display; bars when left out.
        journals: folder that keeps evaluations; stored ones are not paid for again.
        on_evaluation: called with each evaluation of each search.
        kinds: the kinds wanted, in the order of `KINDS`.
    """
    points: dict[str, Point] = {}
    left_out = {"levels", "joint"} if genes == "steps" else set[str]()
    left_out |= set() if plans.fits else {"dense-fitted"}
    for kind in (kind for kind in kinds if kind not in left_out):
        before = plans.denoiser_calls
        found: SearchResult | None = None
        if kind in ("dense", "off-the-shelf"):
            final = plans.even(budget, (SOLVER,) if kind == "dense" else OFF_THE_SHELF)
        else:
            try:
                final, found = _found(plans, kind, budget, points, progress, journals, on_evaluation)
            except Unaffordable:
                continue
        spent = plans.denoiser_calls - before + (found.denoiser_calls if found else 0)
        points[kind] = Point(kind, budget, final, spent, found)
    return list(points.values())


class Unaffordable(Exception):
    """Error: even the cheapest schedule of levels exceeds the budget."""


def _found(
    plans: Plans,
    kind: str,
    budget: float,
    points: Mapping[str, Point],
    progress: Progress | None,
    journals: Path | None,
    on_evaluation: OnEvaluation | None,
) -> tuple[Finalist, SearchResult]:
    """Search plans of a kind. Return the best of its finalists and of the simpler kinds, and the search result."""
    genes: Genes = "levels" if kind == "levels" else "joint" if kind == "joint" else "steps"
    solver = SOLVER if kind in ("dense-planned", "levels") else plans.solver
    known = [points[name].final for name in WITHOUT[kind] if name in points]
    options: dict[str, Any] = {"progress": progress, "on_evaluation": on_evaluation}
    if genes == "levels":
        try:
            space: SearchSpace = plans.level_space(budget)
        except DiffesError as error:
            raise Unaffordable from error
        options["strategy"], evaluator = PAPERS, plans.fixed
    else:
        space, evaluator = plans.space(budget, genes), plans.searched.by(solver)
        options["starts"] = plans.starts(budget, genes, [plans.nearest(each.plan) for each in known])
        options["solver"] = solver
    if (
        kind in ("levels", "joint")
        and "dense-fitted" in points
        and (before := points["dense-fitted"].found) is not None
    ):
        options["max_calls"] = before.denoiser_calls
    store = EvaluationStore(journals / f"{kind}-{budget:g}.journal", space) if journals else None
    found = plans.search(budget, genes, store=store, **options)
    finalists = [plans.finalist(plan) for plan in plans.finalists(found, evaluator)]
    if kind == "dense-fitted":
        finalists += [plans.finalist(replace(each.plan, solver=solver, coefficients=None)) for each in known]
    best = max(finalists, key=lambda each: each.fitness)
    of_known = {(each.plan.calls, each.plan.solver) for each in known}  # those are polished already
    if (best.plan.calls, best.plan.solver) not in of_known:
        best = plans.polished(best)
    return max([best, *known], key=lambda each: each.fitness), found


def _write_bank(plans: Plans, made: Sequence[Plan], out: Path) -> dict[str, Any]:
    """Write one bank for all plans of the front. Return how its levels are shared out over the layers."""
    adapter = plans.bench.adapter
    bank = plans.bench.router.bank.for_schedule(*made)
    split = split_of(bank, adapter.prunable(bank.kind))
    header = {**_made_for(plans), "split": split, "fingerprint": fingerprint(adapter.denoiser)}
    files.write_safely(out / BANK, lambda partial: bank.save(partial, header))
    return split


def _made_for(plans: Plans) -> dict[str, Any]:
    space = plans.bench.levels
    stages = [list(stage) for stage in space.stages.ranges]
    return {**plans.bench.made_for(), "stages": stages, "max_level": space.max_level}


def facts_of(plans: Plans) -> dict[str, Any]:
    """Return the fields of a `FrontRecord` but its points: facts about the calibration, and the reference."""
    config, process = plans.bench.config, plans.heldout.process
    return {
        **_made_for(plans),
        "reference": {
            "solver": SOLVER, "steps": plans.reference_steps, "spacing": SPACING, "final_sigma": 0.0,
            "alphas": [process.at(t).alpha for t in (0, len(process.alphas) // 2, len(process.alphas) - 1)],
        },
        "latent_shape": list(plans.heldout.final_reference.shape[1:]),
        **({} if plans.bench.adapter.strength is None else {"strength": plans.bench.adapter.strength}),
        "prediction_type": process.prediction,
        "solver": plans.solver,
        "currency": config.cost,
        "metric": config.metric,
        "guidance": config.scale,
        **({"guidance_range": list(config.guidance)} if isinstance(config.guidance, tuple) else {}),
        "dtype": config.dtype,
        "nodes": plans.nodes,
        "search_probes": config.probes,
        "fit_probes": plans.fit_probes,
        "heldout": config.heldout,
        "timing": plans.bench.timed_on(),
    }  # fmt: skip


def row_of(
    plans: Plans, kind: str, budget: float, final: Finalist, quality: Quality, cost: float | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Return the fields of a `PlanPoint`, measured on held-out probes, without its time; and the final latents.

    Args:
        plans: the workbench and its held-out probes.
        kind: kind of the plan (see `Point`).
        budget: budget in dense calls.
        final: the plan and its fitness on the probes of the final fit.
        quality: compares latents with the held-out reference.
        cost: cost in dense calls; as the workbench counts it when left out.
    """
    heldout, plan = plans.heldout, final.plan
    latents = heldout.latents(plan)
    scores = heldout.scored(latents)
    scheduler = heldout.scheduler(plan)
    return {
        "kind": kind, "budget": budget, "cost": plans.cost(plan) if cost is None else cost,
        "n_calls": len(plan.calls), "solver": plan.solver,
        "fit_mean": finite(final.fitness), "heldout_mean": finite(float(scores.mean())),
        "heldout_std": finite(float(scores.std())), **quality.of(latents), "timesteps": list(plan.timesteps),
        "sigmas": [noise.sigma / noise.alpha for noise in scheduler.noises], "levels": list(plan.levels),
        "coefficients": [list(row) for row in scheduler.coefficients], **_at_ends(plans, plan),
    }, latents  # fmt: skip


def _at_ends(plans: Plans, plan: Plan) -> dict[str, Any]:
    """Return the held-out error of a plan at both ends of a range of guidance, if there is a range."""
    ends: list[dict[str, Any]] = [
        {"guidance": guidance, **latent_quality(evaluator.latents(plan), evaluator.final_reference)}
        for guidance, evaluator in plans.ends.items()
    ]
    return {"ends": ends} if ends else {}


def _measured(plans: Plans, points: Sequence[Point]) -> tuple[list[PlanPoint], list[Tensor]]:
    """Return the plans with their measurements, and the latents of the first probes of each.

    Every plan is measured on held-out probes and timed, all taking turns.
    """
    bench = plans.bench
    quality = Quality(bench.adapter, plans.heldout.final_reference)
    rows, pictures = [], []
    for point in points:
        row, latents = row_of(plans, point.kind, point.budget, point.final, quality)
        pictures.append(latents[:IMAGES])
        rows.append(row | {"calls_spent": point.calls_spent})
    routed = [point.plan for point in points]
    times = bench.milliseconds(routed, bench.config.probes)
    return [PlanPoint(**row, ms=ms) for row, ms in zip(rows, times, strict=True)], pictures


def _shown(plans: Plans, points: Sequence[Point], pictures: Sequence[Tensor]) -> dict[str, Figure]:
    """Draw images of held-out probes, and the searches, at the middle budget."""
    budgets = sorted({point.budget for point in points})
    shown = budgets[(len(budgets) - 1) // 2]
    adapter, heldout = plans.bench.adapter, plans.heldout
    rows = {f"dense, {plans.reference_steps} steps": heldout.final_reference[:IMAGES]}
    at = [(point, latents) for point, latents in zip(points, pictures, strict=True) if point.budget == shown]
    rows |= {f"{point.kind},\n{_priced(plans, point)}": latents for point, latents in at}
    captions = [adapter.label(condition) for condition in heldout.probes.conditions[:IMAGES]]
    searches = {point.kind: point.found for point, _ in at if point.found}
    figures = {"convergence.png": charts.convergence(searches, plans.bench.config.metric)}
    if adapter.makes_images:
        images = {name: adapter.decode(latents) for name, latents in rows.items()}
        figures["images.png"] = plots.image_grid(images, captions, differences=True)
    return figures


def _priced(plans: Plans, point: Point) -> str:
    """Return the cost of a plan in words: the number of its calls, and their cost unless all are dense."""
    n = len(point.plan.calls)
    return f"{n} calls" if not any(point.plan.levels) else f"{n} calls at the\ncost of {plans.cost(point.plan):.3g}"
