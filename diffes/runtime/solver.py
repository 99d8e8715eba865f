"""Solvers of plans: diffusers' schedulers with timesteps of one's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler

from diffes.errors import DiffesError, unknown_name

_DPM = {
    "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "thresholding": False, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
}  # fmt: skip
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmsolver++": (DPMSolverMultistepScheduler, {**_DPM, "solver_order": 2}),
    "ddim": (DPMSolverMultistepScheduler, {**_DPM, "solver_order": 1}),
}
"""DPM-Solver++ of order 2 and of order 1; the latter is DDIM without noise, and Euler in the sigmas of a variance."""

SPACINGS: dict[str, dict[str, Any]] = {
    **{name: {"timestep_spacing": name} for name in ("trailing", "linspace", "leading")},
    "log-snr": {"use_lu_lambdas": True},
}
"""How diffusers spaces timesteps evenly: three ways in time, and one in the logarithm of the signal-to-noise ratio."""


def solver_named(name: str) -> tuple[Any, dict[str, Any]]:
    """Scheduler class and settings of a solver that takes timesteps of one's own.

    Raises:
        DiffesError: there is none of that name.
    """
    if name not in SOLVERS:
        raise unknown_name("solver of plans", name, SOLVERS)
    return SOLVERS[name]


def scheduler_for(scheduler: Any, solver: str, timesteps: Sequence[int], device: Any = None) -> Any:
    """A scheduler that visits these timesteps, ready to run: the noise schedule of a pipeline's own, another solver.

    Args:
        scheduler: the pipeline's.
        solver: a name of `SOLVERS`.
        timesteps: falling, in [0, T).
        device: of its tensors.

    Raises:
        DiffesError: the solver is unknown, or the scheduler's noise process is not one of variances.
    """
    kind, settings = solver_named(solver)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise DiffesError(
            f"{type(scheduler).__name__} does not count in training timesteps, which plans are made of; give the "
            "pipeline another scheduler, for instance EulerDiscreteScheduler.from_config"
        )
    made = _planned(kind).from_config(scheduler.config, **settings)
    made.plan = [int(t) for t in timesteps]
    made.set_timesteps(len(made.plan), device=device)
    return made


def spaced(scheduler: Any, n: int, spacing: str) -> list[int]:
    """At most `n` timesteps of a pipeline's noise schedule, falling, as diffusers spaces them.

    Args:
        scheduler: the pipeline's.
        n: at least 1; where two would round to the same timestep there are fewer.
        spacing: a name of `SPACINGS`.
    """
    made = DPMSolverMultistepScheduler.from_config(scheduler.config, **_DPM | SPACINGS[spacing])
    made.set_timesteps(n)
    return sorted({int(t) for t in made.timesteps}, reverse=True)


@functools.cache
def _planned(kind: Any) -> Any:
    """A subclass of a scheduler whose only timesteps are those of its `plan`."""

    class Planned(kind):  # type: ignore[misc]
        plan: list[int]

        def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **other: Any) -> None:
            given = other.pop("timesteps", None)
            if (given is None and num_inference_steps != len(self.plan)) or any(v is not None for v in other.values()):
                raise DiffesError(
                    f"the plan that is applied has {len(self.plan)} steps at timesteps of its own, got "
                    f"num_inference_steps={num_inference_steps}: pass num_inference_steps={len(self.plan)} and nothing "
                    "else about timesteps, or call diffes.remove(pipe) first"
                )
            if given is not None and [int(t) for t in given] != self.plan:
                raise DiffesError(
                    f"the plan that is applied visits the timesteps {self.plan}, got {list(given)}: leave them out, or "
                    "call diffes.remove(pipe) first"
                )
            super().set_timesteps(timesteps=np.array(self.plan), device=device)

    Planned.__name__ = Planned.__qualname__ = kind.__name__
    return Planned


def retimed(state: Any, ready: Any) -> Any:
    """A scheduler in the middle of one run that goes on with the timesteps of another, which agree with its own so far.

    Args:
        state: a copy of the scheduler as it was left; its memory of earlier steps stays.
        ready: a scheduler of the same kind with the other timesteps.
    """
    for name in ("timesteps", "sigmas", "num_inference_steps", "plan"):
        setattr(state, name, getattr(ready, name))
    return state
