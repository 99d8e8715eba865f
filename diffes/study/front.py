"""Plans at many budgets from one calibration and one table: `diffes front`, and the folder that it leaves."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from diffes import files
from diffes.errors import DiffesError
from diffes.measure.error_table import MeasuredTable
from diffes.measure.metrics import latent_mse
from diffes.progress import Progress
from diffes.pruning.bank import fingerprint, split_of
from diffes.runtime.artifact import BANK, FRONT, read_front, write_front
from diffes.search.carried import Trajectory
from diffes.search.frontier import ErrorTable
from diffes.search.schedule import Schedule
from diffes.search.store import EvaluationStore
from diffes.study import folder, plots
from diffes.study.config import RunConfig
from diffes.study.heldout import finite
from diffes.study.plans import Genes, Plans
from diffes.study.workbench import prepare

GENES: dict[str, Genes] = {"dense-planned": "steps", "joint": "joint"}


@dataclass(frozen=True)
class Point:
    """A plan of a front.

    Args:
        kind: "dense", evenly spaced dense calls; "dense-planned", dense calls at timesteps of the table and a search;
            "joint", levels too.
        budget: in dense calls.
        genome: the plan.
        calls_spent: denoiser calls, in rows, of the table and the search that led to it.
    """

    kind: str
    budget: float
    genome: Schedule
    calls_spent: int


def complete_front(
    config: RunConfig,
    budgets: Sequence[float],
    out: Path,
    progress: Progress,
    *,
    solver: str = "dpmsolver++",
    nodes: int = 64,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Calibrates, measures the table, searches every budget, and writes the folder; an unfinished one is gone on with.

    Args:
        config: the settings; its budget is not used, its cost is the currency.
        budgets: in dense calls, each above what the cheapest call costs.
        out: the folder.
        progress: told of the long parts.
        solver: of the plans.
        nodes: candidate timesteps.
        overwrite: replace what is there.

    Returns:
        What `front.json` holds.

    Raises:
        DiffesError: bad settings, or `out` cannot be used; what is there is then untouched.
    """
    if not budgets or min(budgets) <= 0:
        raise DiffesError(f"budgets must be positive numbers of dense calls, at least one, got {list(budgets)}")
    extra = {"budgets": sorted(budgets), "solver": solver, "nodes": nodes}
    resumes = folder.open_run(out, config, overwrite=overwrite, extra=extra, finished=FRONT)
    known = files.read_json(out / folder.COSTS) if resumes and (out / folder.COSTS).exists() else {}
    plans = Plans(prepare(config, progress, known.get("costs")), solver, nodes)
    for budget in budgets:
        plans.space(budget, "steps")  # refused before the long part where not even one dense call is that cheap
    folder.begin_run(out, config, resumes=resumes, extra=extra)
    files.write_json(out / folder.COSTS, {"cost": config.cost, "costs": plans.bench.costs})
    table = _table(plans, out / folder.TABLE, progress)
    points: list[Point] = []
    for budget in sorted(budgets):
        points += _searched(plans, table, budget, out, progress)
    with progress.task("held-out probes, speed, figure", 2) as advance:
        split = _write_bank(plans, [point.genome for point in points], out)
        rows = _measured(plans, points)
        advance("measured")
        data = _facts(plans) | {"split": split, "calls_spent": table.calls, "points": rows}
        figure = plots.fronts(rows, plans.bench.config.cost)
        files.write_safely(out / folder.FRONT, functools.partial(plots.save, figure))
        advance("figure")
        write_front(out, data)
    return read_front(out)


def _table(plans: Plans, path: Path, progress: Progress) -> MeasuredTable:
    """The table, from its file where it was measured before."""
    if path.exists():
        with np.load(path) as data:
            table = ErrorTable(**{field.name: data[field.name] for field in fields(ErrorTable)})
            run = Trajectory(**{field.name: data[field.name] for field in fields(Trajectory)})
            return MeasuredTable(table, data["growth"], run, int(data["calls"]))
    found = plans.table(progress)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **asdict(found.table) | asdict(found.run), growth=found.growth, calls=found.calls)

    files.write_safely(path, write)
    return found


def _searched(plans: Plans, table: MeasuredTable, budget: float, out: Path, progress: Progress) -> list[Point]:
    """Evenly spaced dense calls, planned ones, and plans of both; each search begins with what the one before found."""
    dense = plans.space(budget, "steps")
    points = [Point("dense", budget, dense.schedule(dense.uniform()), 0)]
    for kind, genes in GENES.items():
        starts = [points[-1].genome.levels, *plans.starts(table, budget, genes)]
        store = EvaluationStore(out / folder.JOURNALS / f"{kind}-{budget:g}.journal", plans.space(budget, genes))
        found = plans.search(budget, genes, starts=list(dict.fromkeys(starts)), store=store, progress=progress)
        points.append(Point(kind, budget, found.best.schedule, table.calls + found.denoiser_calls))
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
    }


def _measured(plans: Plans, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows of `front.json`: every plan on held-out probes, and timed, all taking turns."""
    heldout, bench = plans.heldout, plans.bench
    final = heldout.final_reference
    rows = []
    for point in points:
        latents = heldout.latents(point.genome)
        scores = heldout.scored(latents)
        plan = heldout.plan(point.genome)
        rows.append(
            {
                "kind": point.kind, "budget": point.budget, "cost": plans.cost(point.genome),
                "n_calls": len(plan.calls), "heldout_mean": finite(float(scores.mean())),
                "heldout_std": finite(float(scores.std())),
                "latent_mse": finite(-float(latent_mse(latents.float(), final.float()).mean())),
                "timesteps": list(plan.timesteps), "levels": list(plan.levels), "calls_spent": point.calls_spent,
            }
        )  # fmt: skip
    routed = [heldout.plan(point.genome) for point in points]
    for row, ms in zip(rows, bench.milliseconds(routed, bench.config.probes), strict=True):
        row["ms"] = ms
    return rows


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
