"""Plans at many budgets from one calibration and one table: `diffes front`, and the folder that it leaves."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from diffes import files
from diffes.errors import DiffesError, at_least
from diffes.measure.error_table import MeasuredTable
from diffes.measure.metrics import latent_mse
from diffes.progress import Progress
from diffes.pruning.bank import fingerprint, split_of
from diffes.runtime.artifact import BANK, FRONT, read_front, write_front
from diffes.runtime.solver import solver_named
from diffes.search.carried import Trajectory
from diffes.search.frontier import ErrorTable
from diffes.search.ledger import OnEvaluation, SearchResult
from diffes.search.schedule import Schedule
from diffes.search.space import SearchSpace
from diffes.search.store import EvaluationStore
from diffes.study import charts, folder, plots
from diffes.study.calibration import Keep
from diffes.study.config import ALONE, RunConfig, WorkerOptions
from diffes.study.heldout import finite
from diffes.study.lock import held
from diffes.study.plans import Genes, Plans, call_costs
from diffes.study.settings import PLANNED
from diffes.study.workbench import prepare
from diffes.study.workers import pool_of

KINDS = ("dense", "dense-planned", "levels", "joint")
IMAGES = 6  # of the picture that shows all kinds
PAPERS = "evolution"  # the strategy of "levels"


@dataclass(frozen=True)
class Point:
    """A plan of a front.

    Args:
        kind: "dense", evenly spaced dense calls, the best of four spacings; "dense-planned", dense calls at timesteps
            of the table and a search; "levels", the paper's search, a level for each stage at evenly spaced timesteps;
            "joint", timesteps and levels.
        budget: in dense calls.
        genome: the plan.
        calls_spent: denoiser calls, in rows, of the table and the search that led to it.
        found: what its search measured.
    """

    kind: str
    budget: float
    genome: Schedule
    calls_spent: int
    found: SearchResult | None = None


def complete_front(
    config: RunConfig,
    budgets: Sequence[float],
    out: Path,
    progress: Progress,
    *,
    genes: Genes = "joint",
    solver: str = "dpmsolver++",
    nodes: int = 64,
    overwrite: bool = False,
    on_evaluation: OnEvaluation | None = None,
    workers: WorkerOptions = ALONE,
) -> dict[str, Any]:
    """Calibrates, measures the table, searches every budget, and writes the folder.

    An unfinished one is gone on with, and a finished one whose limits are raised.

    Args:
        config: the settings; its budget is not used, its cost is the currency.
        budgets: in dense calls, each at least 1.
        out: the folder.
        progress: told of the long parts.
        genes: "joint", all kinds of `Point`; "steps", the first two.
        solver: of the plans.
        nodes: candidate timesteps.
        overwrite: replace what is there.
        on_evaluation: called with each evaluation of each search, those of earlier commands included.
        workers: who measures.

    Returns:
        What `front.json` holds: what was calibrated and how, the solver, the reference, and `points`, a row for each
        plan. Of its calls, in the order of sampling, a row states `timesteps` (training timesteps), `sigmas` (noise
        over signal there, as diffusers' scheduler counts it, without the 0 that it ends at) and `levels` (0 is dense);
        `cost` and `budget` are in dense calls of the currency, `ms` is the time of a run.

    Raises:
        DiffesError: bad settings, or `out` cannot be used; what is there is then untouched.
    """
    if not budgets or not 1 <= min(budgets) <= max(budgets) < math.inf:
        raise DiffesError(
            f"budgets are numbers of dense calls, at least one budget and none below 1, which a dense call costs, got "
            f"{list(budgets)}"
        )
    solver_named(solver)
    at_least("nodes", nodes, 2)
    if config.storage is not None:
        raise DiffesError(
            f"plans keep their evaluations in journals in the run folder, and --storage {config.storage} is for "
            "--genes levels: leave it out"
        )
    extra = {"budgets": sorted(budgets), "genes": genes, "solver": solver, "nodes": nodes}
    with held(out):
        return _front_in(config, out, progress, extra, overwrite, on_evaluation, workers)


def _front_in(
    config: RunConfig,
    out: Path,
    progress: Progress,
    extra: Mapping[str, Any],
    overwrite: bool,
    on_evaluation: OnEvaluation | None,
    workers: WorkerOptions,
) -> dict[str, Any]:
    """The front, in a folder that this process holds; `extra` are its settings beside those of every run."""
    genes: Genes = extra["genes"]
    resumes = folder.open_run(out, config, overwrite=overwrite, extra=extra, finished=FRONT)
    costs = folder.known_costs(out) if resumes else None
    settings = replace(config, budget=0.0 if config.cost == "level" else 1.0)  # of schedules, which are not searched

    @functools.cache
    def begin() -> Path:
        return folder.begin_run(out, config, resumes=resumes, extra=extra, finished=FRONT)

    with pool_of(settings, workers) as pool:
        bench = prepare(settings, progress, costs, PLANNED, pool, Keep(begin, resumes))
        known = costs or call_costs(bench, progress)
        plans = Plans(bench, extra["solver"], extra["nodes"], known_costs=known)
        begin()
        folder.write_costs(out, config.cost, known)
        table = _table(plans, out / folder.TABLE, progress)
        points: list[Point] = []
        for budget in extra["budgets"]:
            points += searched(plans, table, budget, genes, progress, out / folder.JOURNALS, on_evaluation)
    with progress.task("held-out probes, speed, figure", 2) as advance:
        split = _write_bank(plans, [point.genome for point in points], out)
        rows, pictures = _measured(plans, points)
        advance("measured")
        data = _facts(plans) | {"genes": genes, "split": split, "calls_spent": table.calls, "points": rows}
        figures = {folder.FRONT: charts.fronts(rows, config.cost), "plans.png": plots.plans(rows, data["max_level"])}
        figures |= _shown(plans, points, pictures)
        for name, figure in figures.items():
            files.write_safely(out / name, functools.partial(plots.save, figure))
        advance("figures")
        write_front(out, data)
    folder.end_run(out)
    return read_front(out)


def _table(plans: Plans, path: Path, progress: Progress) -> MeasuredTable:
    """The table, from its file where it was measured before."""
    if path.exists():
        try:
            with np.load(path) as data:
                table = ErrorTable(**{field.name: data[field.name] for field in fields(ErrorTable)})
                run = Trajectory(**{field.name: data[field.name] for field in fields(Trajectory)})
                return MeasuredTable(table, data["growth"], run, int(data["calls"]))
        except Exception as error:  # zipfile and numpy each raise their own
            raise DiffesError(f"{path} is damaged ({error}); delete it, and it is measured again") from error
    found = plans.table(progress)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **asdict(found.table) | asdict(found.run), growth=found.growth, calls=found.calls)

    files.write_safely(path, write)
    return found


def searched(
    plans: Plans,
    table: MeasuredTable,
    budget: float,
    genes: Genes = "joint",
    progress: Progress | None = None,
    journals: Path | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> list[Point]:
    """A point of each kind at one budget; none is worse, on the search's probes, than those it could do without.

    Each search begins with what those before it found. The search of dense calls has as many evaluations as the
    settings say, and that of "joint" no more denoiser calls than it took.

    Args:
        plans: the workbench, solver and nodes.
        table: where searches of timesteps start.
        budget: in dense calls.
        genes: "joint" for all kinds, "steps" for dense ones only.
        progress: told of every evaluation; bars when left out.
        journals: folder that keeps evaluations; those that it has are not paid for again.
        on_evaluation: called with each evaluation of each search.
    """
    shown: dict[str, Any] = {"progress": progress, "on_evaluation": on_evaluation}

    def store(kind: str, space: SearchSpace) -> EvaluationStore | None:
        return EvaluationStore(journals / f"{kind}-{budget:g}.journal", space) if journals else None

    before = plans.searched.denoiser_calls
    best, worth = plans.dense(budget)
    points = [Point("dense", budget, best, plans.searched.denoiser_calls - before)]
    allowed: int | None = None
    for kind in KINDS[1:] if genes == "joint" else KINDS[1:2]:
        if kind == "levels":
            try:
                space = plans.level_space(budget)
            except DiffesError:
                continue  # too few dense calls for so many steps
            found = plans.search(budget, "levels", strategy=PAPERS, store=store(kind, space), **shown)
            genome, spent = plans.genome(plans.fixed.plan(found.best.schedule)), found.denoiser_calls
        else:
            of: Genes = "steps" if kind == "dense-planned" else "joint"
            starts = plans.starts(table, budget, of, [plans.nearest(best)])
            stored = store(kind, plans.space(budget, of))
            found = plans.search(budget, of, starts=starts, max_calls=allowed, table=table, store=stored, **shown)
            allowed = found.denoiser_calls
            genome, spent = found.best.schedule, table.calls + found.denoiser_calls
        if found.best.fitness > worth:
            best, worth = genome, found.best.fitness
        points.append(Point(kind, budget, genome if kind == "levels" else best, spent, found))
    return points


def _write_bank(plans: Plans, genomes: Sequence[Schedule], out: Path) -> dict[str, Any]:
    """One bank for all plans of the front; returns how its levels are shared out over the layers."""
    adapter = plans.bench.adapter
    bank = plans.bench.router.bank.for_schedule(*map(plans.heldout.plan, genomes))
    split = split_of(bank, adapter.prunable(bank.kind))
    header = {**_made_for(plans), "split": split, "fingerprint": fingerprint(adapter.denoiser)}
    files.write_safely(out / BANK, lambda partial: bank.save(partial, header))
    return split


def _made_for(plans: Plans) -> dict[str, Any]:
    space = plans.bench.space
    stages = [list(stage) for stage in space.stages.ranges]
    return {**plans.bench.made_for(), "stages": stages, "max_level": space.max_level}


def _facts(plans: Plans) -> dict[str, Any]:
    config = plans.bench.config
    return {
        **_made_for(plans),
        "reference": {"solver": plans.solver, "steps": plans.reference_steps},
        "solver": plans.solver,
        "currency": config.cost,
        "metric": config.metric,
        "guidance": config.guidance,
        "dtype": config.dtype,
        "nodes": plans.nodes,
        "heldout": config.heldout,
        "timing": plans.bench.timed_on(),
    }


def _measured(plans: Plans, points: Sequence[Point]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Rows of `front.json`: every plan on held-out probes, and timed, all taking turns; latents of its first probes."""
    heldout, bench = plans.heldout, plans.bench
    final = heldout.final_reference
    rows, pictures = [], []
    for point in points:
        latents = heldout.latents(point.genome)
        scores = heldout.scored(latents)
        plan = heldout.plan(point.genome)
        pictures.append(latents[:IMAGES])
        rows.append(
            {
                "kind": point.kind, "budget": point.budget, "cost": plans.cost(point.genome),
                "n_calls": len(plan.calls), "heldout_mean": finite(float(scores.mean())),
                "heldout_std": finite(float(scores.std())),
                "latent_mse": finite(-float(latent_mse(latents.float(), final.float()).mean())),
                "timesteps": list(plan.timesteps),
                "sigmas": heldout.scheduler(plan.timesteps).sigmas[:-1].tolist(),
                "levels": list(plan.levels), "calls_spent": point.calls_spent,
            }
        )  # fmt: skip
    routed = [heldout.plan(point.genome) for point in points]
    for row, ms in zip(rows, bench.milliseconds(routed, bench.config.probes), strict=True):
        row["ms"] = ms
    return rows, pictures


def _shown(plans: Plans, points: Sequence[Point], pictures: Sequence[Tensor]) -> dict[str, Figure]:
    """Images of held-out probes and the searches, at the budget in the middle."""
    budgets = sorted({point.budget for point in points})
    shown = budgets[(len(budgets) - 1) // 2]
    adapter, heldout = plans.bench.adapter, plans.heldout
    rows = {f"dense, {plans.reference_steps} steps": heldout.final_reference[:IMAGES]}
    at = [(point, latents) for point, latents in zip(points, pictures, strict=True) if point.budget == shown]
    rows |= {f"{point.kind}, {shown:g} calls": latents for point, latents in at}
    captions = [adapter.label(condition) for condition in heldout.probes.conditions[:IMAGES]]
    searches = {point.kind: point.found for point, _ in at if point.found}
    images = {name: adapter.decode(latents) for name, latents in rows.items()}
    return {
        "images.png": plots.image_grid(images, captions, differences=True),
        "convergence.png": charts.convergence(searches, plans.bench.config.metric),
    }


def verdicts(data: Mapping[str, Any]) -> list[str]:
    """What each budget shows, in a sentence: how far a plan is ahead of dense calls on held-out probes, if it is."""
    lines, thin = [], "thin or reusing calls" if "reuse" in data["kind"] else "thin calls"
    for budget in sorted({point["budget"] for point in data["points"]}):
        at = {p["kind"]: p for p in data["points"] if p["budget"] == budget and p["latent_mse"] is not None}
        if not {"dense", "dense-planned"} <= set(at):
            continue
        best = at.get("joint", at["dense-planned"])
        even, chosen = (at[kind]["latent_mse"] / max(best["latent_mse"], 1e-12) for kind in ("dense", "dense-planned"))
        start = f"{budget:g} dense calls: "
        if best is at["dense-planned"]:
            lines.append(start + f"well-chosen timesteps have {even:.2f} times less error than evenly spaced ones")
        elif not any(best["levels"]):
            lines.append(start + f"{thin} add nothing, the best plan found is dense")
        elif chosen <= 1:
            lines.append(start + f"{thin} add nothing ({1 / chosen:.2f} times the error of well-chosen dense ones)")
        else:
            lines.append(
                start + f"the plan has {chosen:.2f} times less error than as many well-chosen dense calls, {even:.2f} "
                f"times less than evenly spaced ones, and takes {best['ms'] / at['dense-planned']['ms']:.2f} times "
                "their milliseconds"
            )
    return lines


def rows_of(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table of a front: a line for each plan, by budget."""
    return [
        (
            f"{point['budget']:g}", point["kind"], f"{point['cost']:.2f}", str(point["n_calls"]),
            "failed" if point["heldout_mean"] is None else f"{point['heldout_mean']:.4f}",
            "failed" if point["latent_mse"] is None else f"{point['latent_mse']:.5f}", f"{point['ms']:.0f}",
        )
        for point in data["points"]
    ]  # fmt: skip


COLUMNS = ("budget", "", "dense calls", "calls", "held-out fitness", "latent MSE", "ms")
