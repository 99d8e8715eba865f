"""Fit without a search: coefficients for a known plan, at another guidance, or with other prompts or another model."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import Tensor

from diffes import files
from diffes.adapters import ModelAdapter, adapter_for, load_pipeline
from diffes.config import Guidance, RunConfig, checked_guidance, in_words
from diffes.errors import DiffesError, at_least
from diffes.figures import charts, plots
from diffes.files import SHIPPED
from diffes.forms import FrontRecord, MeasuredPlan, PlanPoint
from diffes.measure.metrics import make_metric
from diffes.measure.quality import Quality
from diffes.problems.plans import Finalist, Plans
from diffes.problems.workbench import Workbench
from diffes.progress import Progress, RichProgress
from diffes.pruning.bank import WeightBank, check_bank, check_fingerprint, fingerprint
from diffes.results import folder
from diffes.results.artifact import BANK, base_model, chosen, write_front
from diffes.results.lock import is_unused
from diffes.runtime.apply import APPLIED, pick_device
from diffes.runtime.checks import check_cuttable
from diffes.runtime.router import Router
from diffes.solvers import SOLVERS, own_of
from diffes.spaces.schedule import Plan, Stages, check_timesteps
from diffes.spaces.space import SearchSpace
from diffes.study.front import facts_of, row_of

AS_GIVEN = "as given"  # kind of the plan before it was fitted


@dataclass(frozen=True)
class Fit:
    """Fitted plan, and its quality on held-out probes before and after the fit.

    Args:
        plan: the plan with its coefficients. `diffes.apply` takes it if all its calls are dense, else the folder that
            was written.
        before: the plan as it was given, with its quality: `latent_mse`, `latent_interval`, `image_mse`, `ssim` and
            more. Timesteps without coefficients are sampled by DPM-Solver++ 2M.
        after: the fitted plan, likewise.
    """

    plan: Plan
    before: MeasuredPlan
    after: MeasuredPlan


def fit(
    pipe: DiffusionPipeline,
    plan: Plan | Sequence[int] | str | Path,
    *,
    calls: float | None = None,
    guidance: Guidance | None = None,
    prompts: str | Path | None = None,
    call: Mapping[str, Any] | str | None = None,
    solver: str = "fitted",
    probes: int = 64,
    heldout: int = 64,
    seed: int = 0,
    reference_steps: int = 200,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Fit the coefficients of a plan to the dense model at many steps, without a search.

    The fit costs the denoiser calls of two references (for the fit and for the report) and of a few runs of the plan.

    Args:
        pipe: the pipeline as it will be used, with its LoRAs, but with no run applied.
        plan: the folder of a run, a front or an export, which gives the timesteps and levels of one plan; or a plan; or
            the timesteps of dense calls, falling.
        calls: for a folder, the most that the plan may cost, in dense calls; the best such plan is taken.
        guidance: classifier-free guidance scale that the plan will be used at, or the two ends of a range, over which
            the probes are spread. When left out: that of the call, or the pipeline's default if a call is given without
            one; else that of the folder, else 1.
        prompts: for text-to-image models, a JSON file of prompts `search` and `heldout`; the model's own when left out.
        call: further arguments of the pipeline's call, as it will be used: height, width and so on. Of a list of
            prompts every second one is held out.
        solver: a name of `diffes.solvers.SOLVERS` whose coefficients are fitted, with options after a colon.
        probes: number of images for the fit.
        heldout: number of images for the report.
        seed: seed of the probes.
        reference_steps: number of steps of the dense model.
        out: a new folder, for `diffes.apply`, `diffes sample` and `diffes export`; nothing is written when left out.
        progress: progress display; bars when left out.

    Raises:
        DiffesError: the plan or the folder is damaged or for another model, its levels are pruned and the model has
            changed, or the solver fits nothing.

    Example:
        >>> import diffes
        >>> pipe = diffes.load_pipeline("fashion-dit")
        >>> found = diffes.fit(pipe, [999, 600, 250], guidance=2.0, probes=4, heldout=4, reference_steps=20)
        >>> found.after.latent_mse < found.before.latent_mse
        True
        >>> _ = diffes.apply(pipe, found.plan)
    """
    at_least("probes", probes, 1)
    at_least("heldout", heldout, 2)
    at_least("reference_steps", reference_steps, 1)
    if not SOLVERS.parse(solver)[0].fits:
        raise DiffesError(f"solver {solver!r} has no coefficients to fit; choose fitted")
    if guidance is not None:
        guidance = checked_guidance(guidance)
    if out is not None:
        folder.check_writable(Path(out))
        if not is_unused(Path(out)):
            raise DiffesError(f"{out} is not an empty folder; name another one")
    adapter = adapter_for(pipe)
    if own_of(pipe.scheduler) is not pipe.scheduler or hasattr(adapter.denoiser, APPLIED):
        raise DiffesError("a run is applied to this pipeline, and a fit needs the dense one: diffes.remove(pipe) first")
    if prompts is not None:
        adapter.use_prompts(Path(prompts))
    if call is not None:
        guidance = checked_guidance(adapter.use_given(call, guidance))
    home = Path(plan) if isinstance(plan, str | Path) else None
    given, facts, bank = _given(plan, home, calls, adapter)
    if guidance is None:
        guidance = checked_guidance((facts.guidance_range or facts.guidance) if facts else 1.0)
    model = adapter.pipe.config.get("_name_or_path") or (base_model(home, facts.model) if home and facts else "")
    if out is not None and not model:
        raise DiffesError(
            "this pipeline was not loaded from a folder or a hub, so a folder cannot name its model: save and load it "
            "first (pipe.save_pretrained, from_pretrained), or leave out= out"
        )
    bench = _bench(adapter, Router(adapter, bank), given, model, guidance, heldout, seed)
    plans = Plans(bench, solver, reference_steps=reference_steps, fit_probes=probes)
    with (progress or RichProgress()).task(f"fitting at guidance {in_words(guidance)}", probes + heldout) as advance:
        _ = plans.refitted
        advance(f"reference of {probes} images", probes)
        as_given = Finalist(given, plans.refitted.measured(given)[0])
        fitted = plans.polished(plans.finalist(replace(given, solver=solver, coefficients=None)))
        if not math.isfinite(fitted.fitness):
            raise DiffesError(f"the plan fitted by solver {solver!r} fails: its latents are not finite")
        quality = Quality(adapter, plans.heldout.final_reference)
        advance(f"reference of {heldout} images", heldout)
        kind, budget, cost = _named(facts, given)
        spent = plans.refitted.denoiser_calls
        both = [(AS_GIVEN, as_given), (kind, fitted)]
        rows = [row_of(plans, name, budget, each, quality, cost)[0] for name, each in both]
        before, after = (MeasuredPlan(**row, calls_spent=spent) for row in rows)
    if out is not None:
        times = bench.milliseconds([as_given.plan, fitted.plan], bench.config.probes)
        points = [PlanPoint(**each.to_json(), ms=ms) for each, ms in zip((before, after), times, strict=True)]
        _write(Path(out), plans, points, facts, bank)
    return Fit(fitted.plan, before, after)


def fit_run(run: Path, out: Path, *, model: str | None = None, device: str = "auto", **options: Any) -> Fit:
    """Fit a plan of a folder, on its own model or another one, and write the result to a folder (see `fit`).

    Args:
        run: folder of a front or of an export.
        out: folder to write.
        model: a shipped name, a folder or a hub id, in place of the run's own.
        device: where to run.
        options: further arguments of `fit`.
    """
    import torch

    _, facts = chosen(run, options.get("calls"))
    name = base_model(run, facts.model) if model is None else model
    pipe = load_pipeline(name, device=pick_device(device), dtype=getattr(torch, facts.dtype))
    pipe.set_progress_bar_config(disable=True)
    return fit(pipe, run, out=out, **options)


def _given(
    plan: Plan | Sequence[int] | str | Path, home: Path | None, calls: float | None, adapter: ModelAdapter
) -> tuple[Plan, FrontRecord | None, WeightBank]:
    """Return the plan that was given, the front that it is from, if any, and the weights that its calls need."""
    if home is not None:
        found, about = chosen(home, calls)
        if not (isinstance(about, FrontRecord) and isinstance(found, Plan)):
            raise DiffesError(
                f"{home} holds a schedule of levels, which keeps the pipeline's own solver: it has no fit"
            )
        return found, about, _bank_of(home, found, adapter)
    if calls is not None:
        raise DiffesError(f"calls={calls} chooses a plan of a folder, and one plan is given: leave calls out")
    given = plan if isinstance(plan, Plan) else _dense(adapter, plan)
    if any(given.levels):
        raise DiffesError("a plan with pruned calls needs its bank: give the folder that it is from, not the plan")
    return given, None, WeightBank({}, "width", max_level=given.max_level)


def _dense(adapter: ModelAdapter, timesteps: Any) -> Plan:
    """Return a plan of dense calls, stepped by DPM-Solver++ 2M as long as it is not fitted."""
    if not isinstance(timesteps, Sequence | np.ndarray | Tensor):
        raise DiffesError(f"a plan is a folder, a Plan, or the timesteps of dense calls, got {timesteps!r}")
    given = timesteps.reshape(-1).tolist() if isinstance(timesteps, np.ndarray | Tensor) else list(timesteps)
    check_timesteps(given, adapter.n_timesteps)
    calls = tuple((t, 0) for t in given)
    return Plan(Stages.equal(1, adapter.n_timesteps), calls, adapter.max_level("width"), "dpmsolver++")


def _bank_of(home: Path, plan: Plan, adapter: ModelAdapter) -> WeightBank:
    """Read the weights that a plan needs. If it has levels other than dense, check that they are of this very model."""
    bank, header = WeightBank.open(home / BANK, adapter.dtype)
    needed = bank.for_schedule(plan)
    if any(plan.levels):
        check_cuttable(adapter)
        check_fingerprint(adapter.denoiser, header.get("fingerprint"), home / BANK)
        check_bank(needed, header, adapter, home / BANK)
    return needed


def _bench(
    adapter: ModelAdapter, router: Router, plan: Plan, model: str, guidance: Guidance, heldout: int, seed: int
) -> Workbench:
    """Build a workbench that measures, but is not calibrated."""
    stages, top = plan.stages, plan.max_level
    dtype = str(adapter.dtype).removeprefix("torch.")
    home = Path(model or type(adapter.pipe).__name__)
    name = home.name if home.resolve().parent == SHIPPED.resolve() else str(home)
    config = RunConfig(
        model=name, method=router.bank.kind, cost="macs", metric="latent_mse", guidance=guidance, heldout=heldout,
        seed=seed, dtype=dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    costs = [[1.0] * (top + 1)] * len(stages)
    space = SearchSpace.dense_fraction(stages, (1,) * len(stages), costs, 1.0)
    return Workbench(config, adapter, space, router, make_metric("latent_mse", adapter.device), costs)


def _named(facts: FrontRecord | None, plan: Plan) -> tuple[str, float, float]:
    """Return kind, budget and cost of a plan: those of its folder, or those of dense calls if it has none."""
    if facts is None:
        return "dense-fitted", float(len(plan.calls)), float(len(plan.calls))
    (point,) = facts.points
    return point.kind if point.kind != AS_GIVEN else "fitted", point.budget, point.cost


def _write(out: Path, plans: Plans, points: list[PlanPoint], facts: FrontRecord | None, bank: WeightBank) -> None:
    """Write the folder of a front of two plans: the one that was given, and the fitted one."""
    bench = plans.bench
    out.mkdir(parents=True, exist_ok=True)
    kept = (
        {}
        if facts is None
        else facts.model_dump(include={"method", "allocation", "kind", "split", "currency"}, exclude_unset=True)
    )
    data = facts_of(plans) | {"allocation": "equal", "nodes": points[0].n_calls} | kept
    del data["search_probes"]  # there was no search
    header = {**data, "fingerprint": fingerprint(bench.adapter.denoiser)}
    files.write_safely(out / BANK, lambda partial: bank.save(partial, header))
    front = FrontRecord(**data, points=points)
    figure = charts.error_over_cost(points, front.currency, front.timing)
    files.write_safely(out / folder.FRONT, functools.partial(plots.save, figure))
    files.write_json(out / files.CONFIG, folder.config_record(bench.config))  # as for any run, with the versions here
    write_front(out, front)
