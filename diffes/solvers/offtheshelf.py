"""Multistep solvers of diffusers as rows of coefficients, and the ways in which diffusers spaces timesteps evenly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from diffes.errors import DiffesError
from diffes.solvers.base import Row, Solver
from diffes.solvers.process import Noise, NoiseProcess, own_of

ENDS = {"final_sigmas_type": "zero"}
SPACINGS: dict[str, dict[str, Any]] = {
    **{name: {"timestep_spacing": name} for name in ("trailing", "linspace", "leading")},
    "log-snr": {"use_lu_lambdas": True},
}
"""Settings with which diffusers spaces timesteps evenly: three in time, one in the log of the signal-to-noise ratio."""
SHIFTS = {"trailing": 1.0, "shift 2": 2.0, "shift 3": 3.0, "shift 6": 6.0}
"""Shifts of evenly spaced sigmas of flow matching; Stable Diffusion 3 has 3."""


class OffTheShelf(Solver):
    """A multistep scheduler of diffusers as rows of coefficients.

    Each of its steps is linear in the latents and in the predictions so far. To find the coefficients, it is run in
    fp64 on unit vectors: one for the noise that a run begins with, and one for each clean prediction. All latents of
    the run are then combinations of these. The share of the noise tells how much of the present latents is in the next
    ones.

    Args:
        order: order of the solver, 1 to 3.

    Example:
        >>> from diffes.solvers import coefficients, Noise
        >>> noises = [Noise(0.1, 0.99), Noise(0.6, 0.8), Noise(1.0, 0.0)]
        >>> [len(row) for row in coefficients("unipc:order=2", noises)]
        [2, 3]
    """

    scheduler: ClassVar[Any]
    corrects: ClassVar[int] = 0  # 1 where a corrector reads one prediction more
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, order: int = 2) -> None:
        if order not in (1, 2, 3):
            raise DiffesError(f"order must be 1, 2 or 3, got {order}")
        self.order = order
        self.memory = order + self.corrects
        self._known: tuple[tuple[Noise, ...], list[Row]] | None = None

    def row(self, noises: Sequence[Noise], i: int) -> Row:
        key = tuple(noises)
        if self._known is None or self._known[0] != key:
            self._known = key, self._rows(noises)
        return self._known[1][i]

    def _rows(self, noises: Sequence[Noise]) -> list[Row]:
        n = len(noises) - 1
        made = self.scheduler(solver_order=self.order, prediction_type="sample", **self.settings, **ENDS)
        made.set_timesteps(n)
        made.timesteps = torch.arange(n - 1, -1, -1)
        made.sigmas = torch.tensor([noise.sigma / noise.alpha for noise in noises], dtype=torch.float64)
        made.num_inference_steps = n
        basis = torch.eye(n + 1, dtype=torch.float64)[..., None]  # a batch of entries with one channel
        latents, rows = basis[0], list[Row]()
        for i in range(n):
            after = made.step(basis[i + 1], made.timesteps[i], latents).prev_sample
            kept = float(after[0] / latents[0])
            weights = (after - kept * latents)[1 : i + 2, 0].flip(0).tolist()
            rows.append((kept, *weights[: self.memory]))
            latents = after
        return rows


class UniPC(OffTheShelf):
    """UniPC, predictor and corrector; see `OffTheShelf`.

    Source: Zhao et al., arXiv 2302.04867, as diffusers' `UniPCMultistepScheduler`.

    Example:
        >>> UniPC(order=3).memory
        4
    """

    scheduler = UniPCMultistepScheduler
    corrects = 1


class DPMSolver3M(OffTheShelf):
    """DPM-Solver++ 3M; see `OffTheShelf`.

    Source: Lu et al., arXiv 2211.01095, as diffusers' `DPMSolverMultistepScheduler` of order 3.

    Example:
        >>> DPMSolver3M().memory
        3
    """

    scheduler = DPMSolverMultistepScheduler
    settings: ClassVar[dict[str, Any]] = {"algorithm_type": "dpmsolver++"}

    def __init__(self, order: int = 3) -> None:
        super().__init__(order)


def spacings_of(scheduler: Any) -> list[str]:
    """Return the names of the ways in which timesteps of a pipeline's noise process are spaced evenly."""
    return [*(SHIFTS if NoiseProcess.of(scheduler).flows else SPACINGS)]


def spaced(scheduler: Any, n: int, spacing: str) -> list[int]:
    """Return at most `n` timesteps of a pipeline's noise process, falling, evenly spaced.

    With `alphas_cumprod`, they are those of diffusers. Of flow matching, sigmas are evenly spaced down from 1 and then
    shifted: `s sigma / (1 + (s - 1) sigma)`.

    Args:
        scheduler: the pipeline's scheduler.
        n: at least 1; there are fewer where two round to the same timestep.
        spacing: a name of `spacings_of`.

    Source: Esser et al., arXiv 2403.03206, equation 23, for the shift.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> spaced(DDIMScheduler(), 4, "trailing")
        [999, 749, 499, 249]
        >>> spaced(FlowMatchEulerDiscreteScheduler(), 4, "shift 3")
        [999, 899, 749, 499]
    """
    process = NoiseProcess.of(scheduler)
    last = len(process.alphas) - 1
    if process.flows:
        shift = SHIFTS[spacing]
        sigmas = [1 - i / n for i in range(n)]
        found = [shift * sigma / (1 + (shift - 1) * sigma) * (last + 1) - 1 for sigma in sigmas]
        return sorted({max(round(t), 0) for t in found}, reverse=True)
    plain = dict.fromkeys(
        ("thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False
    )
    settings = {"algorithm_type": "dpmsolver++", **plain, **ENDS, **SPACINGS[spacing]}
    made = DPMSolverMultistepScheduler.from_config(own_of(scheduler).config, **settings)
    made.set_timesteps(n)
    return sorted({min(int(t), last) for t in made.timesteps}, reverse=True)  # an offset may lead beyond the last
