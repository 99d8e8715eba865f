"""Use of results in diffusers: `apply` a run to a pipeline, `remove` it again, or `load` both in one line."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers import DiffusionPipeline

from diffes.adapters import adapter_for, load_pipeline
from diffes.errors import DiffesError, DiffesWarning
from diffes.forms import AGAIN, FrontRecord, ScheduleFacts
from diffes.pruning.bank import WeightBank, check_bank, check_fingerprint
from diffes.results.artifact import BANK, base_model, chosen
from diffes.runtime.checks import check_cuttable, check_not_offloaded
from diffes.runtime.router import Router
from diffes.solvers import SOLVERS, own_of
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Plan, Schedule

P = TypeVar("P", bound=DiffusionPipeline)
APPLIED = "_diffes_applied"  # attribute of a routed denoiser


@dataclass(frozen=True)
class _Applied:
    """Router of a denoiser, and the scheduler of the plan that it runs, if any."""

    router: Router
    scheduler: PlanScheduler | None = None


class Result(Protocol):
    """Result of a search with a folder of its own, such as a front."""

    @property
    def out(self) -> Path:
        """The folder."""


def apply(pipe: P, run: str | Path | Plan | Result, *, calls: float | None = None, resident: str = "auto") -> P:
    """Make a pipeline run the schedule of a run, or a plan. From then on only diffusers' own calls are needed.

    A schedule works with any number of steps, guidance and scheduler that counts in training timesteps, because routing
    depends on the timestep alone. A plan brings a scheduler of its own, with its timesteps and coefficients: the
    pipeline makes the plan's calls, whatever `num_inference_steps` it is given (a warning says so), and other timesteps
    are refused.
    `pipe.save_pretrained` still writes the dense pipeline with its own scheduler. Move the pipeline to its device and
    dtype, and load LoRAs, first. Call `torch.compile` afterwards, with `torch._dynamo.config.recompile_limit` above the
    number of different levels, because each level is compiled separately. A run applied before is removed first.

    Args:
        pipe: the pipeline that the run was made for.
        run: the folder of a run or of a front, or one that `diffes export` or `diffes fit` wrote; what `diffes.search`
            or `diffes.front` returned; or a plan whose calls are all dense.
        calls: highest cost of a front's plan, in dense denoiser calls; the best plan within is taken, and the best of
            all where it is left out.
        resident: which pruned layers stay ready on the device: "all" of this schedule, so that a change of stage or
            level moves nothing; "stream" none but those in use, in the memory of the dense weights (see `Router`); or
            "auto", as many as fit into half of the memory that is free.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: the run is damaged or was made for another model, prediction type or noise process, the pipeline is
            offloaded, or no plan is as cheap as `calls`; the pipeline is then as it was.
    """
    adapter = adapter_for(pipe)
    folder: Path | None = None
    facts: ScheduleFacts | FrontRecord | None = None
    header: dict[str, Any] = {}
    schedule: Schedule | Plan
    if isinstance(run, Plan):
        check_alone(run, calls)
        schedule, bank = run, WeightBank({}, "width", max_level=run.max_level)
    else:
        folder = Path(run) if isinstance(run, str | Path) else run.out
        schedule, facts = chosen(folder, calls)
        bank, header = WeightBank.open(folder / BANK, adapter.dtype)
        if facts.to_json().get("split") != header.get("split"):
            raise DiffesError(f"{folder} is damaged: its schedule and its bank divide levels differently; {AGAIN}")
    if isinstance(schedule, Schedule):
        adapter.check_sampler()
    if any(schedule.levels):  # calls that are all dense change no weights
        check_not_offloaded(adapter.denoiser)
        check_cuttable(adapter)
    if (last := schedule.stages.ranges[-1][1]) != adapter.n_timesteps:
        raise DiffesError(
            f"{folder or 'this plan'} was made for a pipeline with {last} training timesteps, and this one has "
            f"{adapter.n_timesteps}. Apply it to the pipeline that it was made for."
        )
    previous: _Applied | None = getattr(adapter.denoiser, APPLIED, None)
    routed_before, scheduler_before = previous.router.schedule if previous else None, pipe.scheduler
    router: Router | None = None
    if previous:
        previous.router.remove()
    try:
        needed = bank.for_schedule(schedule)  # no more, so that no unneeded outputs are kept for reuse
        router = Router(adapter, needed, resident=resident)
        if folder is not None:
            check_fingerprint(adapter.denoiser, header.get("fingerprint"), folder / BANK)
            check_bank(needed, header, adapter, folder / BANK)
        own = own_of(pipe.scheduler)
        front = facts if isinstance(facts, FrontRecord) else None
        planned = planned_scheduler(own, schedule, front) if isinstance(schedule, Plan) else None
        if planned is not None and front is not None and front.latent_shape:
            planned.made_for = tuple(front.latent_shape)
        if planned is not None and front is not None:
            planned.strength = front.strength
        if front is not None:
            router.guidance = tuple(front.guidance_range or [front.guidance] * 2)
        router.install(schedule)
        put_scheduler(pipe, own if planned is None else planned)
        setattr(adapter.denoiser, APPLIED, _Applied(router, planned))
    except BaseException:
        if router is not None and router.schedule is not None:
            router.remove()
        put_scheduler(pipe, scheduler_before)
        if previous and routed_before:
            previous.router.install(routed_before)
            setattr(adapter.denoiser, APPLIED, previous)
        elif hasattr(adapter.denoiser, APPLIED):
            delattr(adapter.denoiser, APPLIED)
        raise
    if previous is not None and previous.scheduler not in (None, scheduler_before):
        _warn_of_another()
    return pipe


def remove(pipe: P) -> P:
    """Make a pipeline dense again, bit for bit, and restore the scheduler that a plan's replaced.

    Pruned layers belong to the denoiser, and a plan's scheduler to the pipeline that the plan was applied to. Where
    several pipelines share a denoiser, any of them makes it dense; a warning says if the scheduler of a plan stays in
    another one, which `remove` restores there. A scheduler that was set after `apply` is kept.

    Returns:
        The same pipeline.

    Raises:
        DiffesError: no run is applied to it.
    """
    denoiser = adapter_for(pipe).denoiser
    applied: _Applied | None = getattr(denoiser, APPLIED, None)
    planned = pipe.scheduler if own_of(pipe.scheduler) is not pipe.scheduler else None
    if applied is None and planned is None:
        raise DiffesError("no run is applied to this pipeline. Call diffes.apply(pipe, RUN) first.")
    if applied is not None:
        applied.router.remove()
        delattr(denoiser, APPLIED)
        if applied.scheduler not in (None, pipe.scheduler):
            _warn_of_another()
    if planned is not None:
        put_scheduler(pipe, own_of(planned))
    return pipe


def _warn_of_another() -> None:
    warnings.warn(
        "another pipeline shares this denoiser and has a plan applied, or the scheduler was replaced since. If a "
        "pipeline still has the scheduler of that plan, call diffes.remove on it, too.",
        DiffesWarning,
        stacklevel=3,
    )


def check_alone(plan: Plan, calls: float | None) -> None:
    """Check a plan that comes without a folder.

    Raises:
        DiffesError: it has pruned calls, which need a bank, or a budget is given beside it.
    """
    if any(plan.levels):
        raise DiffesError(
            f"a plan with the levels {list(plan.levels)} needs pruned weights. Pass the folder that the plan is from."
        )
    if calls is not None:
        raise DiffesError(f"calls={calls} chooses a plan in a folder, and here a plan is given. Leave calls out.")


def planned_scheduler(own: Any, plan: Plan, front: FrontRecord | None = None) -> PlanScheduler:
    """Return the scheduler of a plan, for a pipeline whose own scheduler it replaces.

    Args:
        own: of the pipeline.
        plan: with coefficients, or of a solver that makes them from the timesteps alone.
        front: the plan's front, with its point only, which says what model the plan was made for; if it has one.

    Raises:
        DiffesError: the plan has to be fitted first, or was fitted for another prediction type or noise process.
    """
    if plan.coefficients is None and SOLVERS.parse(plan.solver)[0].fits:
        raise DiffesError(
            f"this plan has no coefficients, and its solver {plan.solver!r} needs them. Fit them with `diffes fit RUN` "
            "or diffes.fit(pipe, plan)."
        )
    made = PlanScheduler.of(own, plan.timesteps, plan.rows)
    predicts = made.config.prediction_type
    if front is not None and front.prediction_type not in (None, predicts):
        raise DiffesError(
            f"the plan was made for a model that predicts {front.prediction_type}, and this pipeline predicts "
            f"{predicts}. Fit the plan again for this model, with `diffes fit`."
        )
    sigmas = front.points[0].sigmas if front else [noise.sigma / noise.alpha for noise in made.noises]
    for timestep, sigma, noise in zip(plan.timesteps, sigmas, made.noises, strict=True):
        found = noise.sigma / noise.alpha
        if not math.isclose(sigma, found, rel_tol=1e-3):
            raise DiffesError(
                f"the plan was made for a model with sigma {sigma:.4g} at timestep {timestep}, and this pipeline has "
                f"{found:.4g}. Fit the plan again for this model, with `diffes fit`."
            )
    return made


def put_scheduler(pipe: Any, scheduler: Any) -> None:
    """Give a pipeline a scheduler. Its `model_index.json` still names the pipeline's own one."""
    pipe.scheduler = scheduler
    own = own_of(scheduler)
    if own is not scheduler:
        pipe.register_to_config(scheduler=(type(own).__module__.split(".")[0], type(own).__name__))


def load(
    run: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    calls: float | None = None,
    resident: str = "auto",
) -> Any:
    """Load the pipeline that a run was made for, with the run applied.

    Args:
        run: a folder that `diffes export` wrote, or the folder of a run or of a front.
        device: "cpu", "cuda", "cuda:1"; "auto" takes cuda where there is one.
        dtype: of the model; that of the search when left out.
        calls: highest cost of a front's plan, in dense denoiser calls (see `apply`).
        resident: which pruned layers stay ready on the device (see `apply`).

    Returns:
        The diffusers pipeline. Its base model comes from the folder, from diffes itself or, by its hub id, from the
        hub: whichever the folder names.

    Raises:
        DiffesError: the folder is damaged, or its base model missing or another.
    """
    folder = Path(run)
    _, facts = chosen(folder, calls)
    pipe = load_pipeline(
        base_model(folder, facts.model), device=pick_device(device), dtype=dtype or getattr(torch, facts.dtype)
    )
    return apply(pipe, folder, calls=calls, resident=resident)


def pick_device(name: str) -> str:
    """Return the name of a device, "auto" resolved.

    Raises:
        DiffesError: the device is "meta", which holds no numbers.
    """
    if name.split(":")[0] == "meta":
        raise DiffesError(f"nothing can run on the device {name!r}, which holds no numbers. Choose cpu or cuda.")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
