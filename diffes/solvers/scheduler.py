"""Scheduler of a plan: it visits given timesteps and steps with given coefficients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffes.errors import DiffesError, DiffesWarning
from diffes.solvers.base import SOLVERS, Row, Solver, rows_of
from diffes.solvers.ddim import DDIM
from diffes.solvers.process import END, Noise, NoiseProcess, Prediction, own_of
from diffes.spaces.schedule import check_rows, check_timesteps


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A diffusers scheduler that makes the calls of a plan and no others, and steps with the plan's coefficients.

    Step `i` is `x' = row[0] x + row[1] D_i + row[2] D_(i-1) + ...`, with `row = coefficients[i]` and the clean
    predictions `D` that the outputs of the network stand for. Latents begin with unit noise and are never rescaled.
    Sums are in fp32, whatever the latents are.

    Args:
        plan: timesteps of the calls, falling, in [0, `num_train_timesteps`).
        coefficients: a row for each call; row `i` has from 2 to `i` + 2 finite numbers.
        alphas: signal at each call, each in (0, 1].
        sigmas: noise at each call, each in [0, 1]. The last step ends at signal 1 and noise 0.
        prediction_type: what the network predicts: epsilon, v_prediction, sample or flow_prediction.
        num_train_timesteps: T.

    Attributes:
        timesteps: (n,) tensor of the timesteps.
        keeps: number of clean predictions of earlier calls that are kept for the next step.
        index: steps done since `set_timesteps`, which is the number of the next call.
        fits: solver that fits the coefficients during the run, where they are not fitted yet.
        made_for: shape of an image's latents that the plan was made for; latents of another shape are warned of, once.
            None where it is not known.
        strength: share of the trajectory that the plan was made for, in pipelines that begin with an image and drop
            the first timesteps by their number; None where it is all of it. `set_timesteps` then offers as many more.
        replaces: the pipeline's scheduler whose place it takes, if any; `save_pretrained` then writes that one, so that
            diffusers alone opens the pipeline's folder.

    Raises:
        DiffesError: an argument is not of the form above, or there is no plan.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> scheduler = PlanScheduler.of(DDIMScheduler(), [999, 499], "ddim")
        >>> scheduler.set_timesteps(2)
        >>> latents = torch.ones(1, 4, 2, 2)
        >>> for t in scheduler.timesteps:
        ...     latents = scheduler.step(torch.zeros_like(latents), t, latents).prev_sample
        >>> scheduler.index, latents.shape
        (2, torch.Size([1, 4, 2, 2]))
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        plan: Sequence[int] = (),
        coefficients: Sequence[Sequence[float]] = (),
        alphas: Sequence[float] = (),
        sigmas: Sequence[float] = (),
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
    ) -> None:
        if not len(plan):
            raise DiffesError(
                "a PlanScheduler needs a plan, and got none. The folder of a saved pipeline holds the pipeline's own "
                "scheduler, even if a plan was applied. Save a plan with `diffes export`, or its scheduler with "
                "PlanScheduler.from_config(pipe.scheduler.config).save_pretrained(FOLDER)."
            )
        check_timesteps(plan, num_train_timesteps)
        self.plan = tuple(int(t) for t in plan)
        if not len(plan) == len(alphas) == len(sigmas):
            raise DiffesError(
                f"a plan of {len(plan)} calls needs {len(plan)} alphas and sigmas, got {len(alphas)} and {len(sigmas)}"
            )
        if prediction_type not in get_args(Prediction):
            raise DiffesError(
                f"prediction_type must be one of {', '.join(get_args(Prediction))}, got {prediction_type!r}"
            )
        if not all(0 < a <= 1 and 0 <= s <= 1 for a, s in zip(alphas, sigmas, strict=True)):
            raise DiffesError(f"alphas must be in (0, 1] and sigmas in [0, 1], got {list(alphas)} and {list(sigmas)}")
        check_rows(coefficients, len(plan))
        self.coefficients = [tuple(float(each) for each in row) for row in coefficients]
        self.sigmas = torch.tensor([*(float(s) / float(a) for a, s in zip(alphas, sigmas, strict=True)), 0.0])
        self.noises = [Noise(float(a), float(s)) for a, s in zip(alphas, sigmas, strict=True)]
        self.keeps = max(map(len, self.coefficients)) - 2
        self.fits: Solver | None = None
        self.replaces: Any = None
        self.made_for: tuple[int, ...] | None = None
        self.strength: float | None = None
        self._dropped = 0  # timesteps that the pipeline is expected to drop
        self.timesteps = self._told(None)
        self.num_inference_steps = len(self.plan)
        self.index = 0
        self._clean: tuple[Tensor, ...] = ()  # predictions of the last calls, newest first

    @classmethod
    def of(
        cls, scheduler: Any, timesteps: Sequence[int], rows: str | Sequence[Row], device: Any = None
    ) -> PlanScheduler:
        """Make a scheduler for a plan that takes the place of a pipeline's own.

        Args:
            scheduler: the pipeline's scheduler; the noise process is read from it.
            timesteps: timesteps of the calls, falling.
            rows: coefficients, or the name of a solver that makes them.
            device: device of its timesteps.

        Raises:
            DiffesError: the solver or the noise process is unknown, or an argument is not of its form.
        """
        process = NoiseProcess.of(scheduler)
        check_timesteps(timesteps, len(process.alphas))
        noises = process.along(tuple(timesteps))
        solver: Solver | None = SOLVERS.make(rows) if isinstance(rows, str) else None
        made: PlanScheduler = cls(
            plan=[int(t) for t in timesteps],
            coefficients=rows if solver is None else rows_of(solver, noises),
            alphas=[noise.alpha for noise in noises[:-1]],
            sigmas=[noise.sigma for noise in noises[:-1]],
            prediction_type=process.prediction,
            num_train_timesteps=len(process.alphas),
        )
        if solver is not None:
            made.keeps = solver.memory - 1
            made.fits = solver if solver.fits else None
        made.replaces = own_of(scheduler)
        made.timesteps = made.timesteps.to(device)
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run at the plan's timesteps. Another number of steps is replaced, with a warning.

        Sigmas count by their number only in flow matching, where pipelines make some for every call; `mu` is not read.

        Raises:
            DiffesError: other timesteps are given, or sigmas where pipelines make none.
        """
        given = None if timesteps is None else [int(t) for t in timesteps]
        if given is not None and given != [int(t) for t in self._told(None)]:
            raise DiffesError(
                f"the applied plan visits the timesteps {list(self.plan)}, got timesteps {given}. Leave out the "
                "timesteps, or call diffes.remove(pipe) first."
            )
        if sigmas is not None and self.config.prediction_type != "flow_prediction":
            raise DiffesError(
                f"the applied plan visits the timesteps {list(self.plan)}, got sigmas of your own. Leave them out, or "
                "call diffes.remove(pipe) first."
            )
        if sigmas is not None and num_inference_steps is None:  # pipelines of flow matching make their own
            num_inference_steps = len(sigmas)
        asked = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if self.strength is None:
            self._dropped = 0
        else:  # the pipeline goes on from here with the timesteps after those that it drops
            self._dropped = asked - min(int(asked * self.strength), asked)
        if given is None and num_inference_steps is not None and self.strength is None and asked != len(self.plan):
            warnings.warn(
                f"the applied plan makes {len(self.plan)} denoiser calls, so num_inference_steps={num_inference_steps} "
                "has no effect here. A pipeline that counts its steps itself, for instance to end guidance early, "
                f"needs num_inference_steps={len(self.plan)}. diffes.remove(pipe) restores its own scheduler.",
                DiffesWarning,
                stacklevel=2,
            )
        told = self._told(device)
        self.timesteps = torch.cat([told[:1].expand(self._dropped), told])
        self.index, self._clean = 0, ()

    def _told(self, device: Any) -> Tensor:
        """Return what the network is told in each call (n,): of flow matching `t + 1`, see `NoiseProcess`."""
        made = torch.tensor(self.plan, device=device)
        return made + 1.0 if self.config.prediction_type == "flow_prediction" else made

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later call of the plan; its steps are of first order as long as predictions are missing.

        Raises:
            DiffesError: the plan was made for a strength, and the pipeline begins elsewhere; or no call is left.
        """
        if self.strength is not None and begin_index != self._dropped:
            shares = ((m, m * self.strength) for m in range(len(self.plan), 1001))
            n = next((m for m, share in shares if abs(share - round(share)) < 1e-9), 1000)
            raise DiffesError(
                f"the applied plan was made for strength {self.strength:g}, and the pipeline begins at another place. "
                f"Pass strength={self.strength:g} and num_inference_steps={n}, or call diffes.remove(pipe)."
            )
        if begin_index - self._dropped >= len(self.plan):
            raise DiffesError(
                f"the pipeline drops the first {begin_index} steps, and the applied plan has {len(self.plan)}: it was "
                "made for a whole trajectory. Search one for this strength, diffes.search(pipe, call=dict(image=..., "
                "strength=...)), or call diffes.remove(pipe)."
            )
        self.index = begin_index - self._dropped

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the latents as they are."""
        return sample

    def clean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Return the clean latents, in fp32, that the output of the present call stands for."""
        return self.noises[self.index].clean(sample.float(), model_output.float(), self.config.prediction_type)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_unused: Any
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Return the latents of the next call, or the final ones.

        Args:
            model_output: output of the network, guidance included.
            timestep: not read: calls are counted.
            sample: latents that the network was given.
            return_dict: whether to return an object with `prev_sample`, or a tuple.

        Raises:
            DiffesError: the run is over.
        """
        if self.index >= len(self.plan):
            raise DiffesError(
                f"all {len(self.plan)} calls of the applied plan are made. Call set_timesteps to begin another run."
            )
        if self.made_for not in (None, tuple(sample.shape[1:])):
            warnings.warn(
                f"the applied plan was made for latents of shape {self.made_for}, and this call has "
                f"{tuple(sample.shape[1:])}: another size may need other timesteps and coefficients, which "
                "`diffes.fit(pipe, plan, call=...)` fits",
                DiffesWarning,
                stacklevel=2,
            )
            self.made_for = None
        row = self.coefficients[self.index]
        if len(row) > 2 + len(self._clean):  # the run began at a later call
            row = DDIM().row([*self.noises, END], self.index)
        latents, *clean = self.terms(model_output, sample, len(row))
        after = row[0] * latents
        for weight, each in zip(row[1:], clean, strict=True):
            after = after + weight * each
        self._clean = (clean[0], *self._clean)[: self.keeps]
        self.index += 1
        after = after.to(sample.dtype)
        # PixArt reads a second value in runs of one step
        return SchedulerOutput(prev_sample=after) if return_dict else (after, after)

    def terms(self, model_output: Tensor, sample: Tensor, n: int) -> list[Tensor]:
        """Return the `n` terms of the next step in fp32: the latents, then the clean predictions of the last calls."""
        return [sample.float(), self.clean(model_output, sample), *self._clean][:n]

    def resumed(self, before: PlanScheduler) -> PlanScheduler:
        """Return a copy of this scheduler that continues the run of another plan, which agrees with it so far.

        Args:
            before: scheduler that has made the same calls, with the same coefficients and `keeps`.
        """
        made = copy.deepcopy(self, {id(self.replaces): self.replaces})
        made.coefficients[: before.index] = before.coefficients[: before.index]
        made.index, made._clean = before.index, before._clean
        return made

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean latents noised to timesteps (n,) of the plan.

        Raises:
            DiffesError: a timestep is none of the plan's.
        """
        known = {int(told): noise for told, noise in zip(self._told(None), self.noises, strict=True)}
        if missing := [int(t) for t in timesteps.flatten() if int(t) not in known]:
            raise DiffesError(f"the applied plan visits the timesteps {sorted(known, reverse=True)}, not {missing[0]}")
        shape = (-1, *[1] * (original_samples.dim() - 1))
        alphas, sigmas = (
            torch.tensor([getattr(known[int(t)], name) for t in timesteps.flatten()]).view(shape).to(original_samples)
            for name in ("alpha", "sigma")
        )
        return alphas * original_samples + sigmas * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return the result of `add_noise`, as pipelines of flow matching ask for it."""
        return self.add_noise(sample, noise, timestep)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration that `from_pretrained` reads; in a pipeline, that of the pipeline's own scheduler."""
        if self.replaces is not None:
            self.replaces.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
