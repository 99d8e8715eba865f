"""Reference: a dense run of many steps. Solvers are fitted to its latents at any timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffes.solvers import Noise

SOLVER, SPACING = "dpmsolver++", "trailing"


@dataclass(frozen=True, eq=False)
class Reference:
    """Latents of a dense run before each call and at the end.

    Args:
        states: (m + 1, n, C, h, w) in fp32 on the CPU, the noisiest first; the last are the final latents.
        timesteps: (m,) timesteps of the calls, falling.
        noises: (m + 1,) signal and noise at each call, and at the end.
    """

    states: Tensor
    timesteps: tuple[int, ...]
    noises: Sequence[Noise]

    def at(self, timestep: int | None, noise: Noise) -> Tensor:
        """Return latents (n, C, h, w) at a timestep, or the final ones where it is None.

        Between two calls the clean prediction is held constant, so that `x/s` is linear in `a/s`: from `x_j` and
        `x_(j+1)` of the run, `x = (s/s_j) x_j + (a - a_j s/s_j) D` with `D = (x_(j+1) - (s_(j+1)/s_j) x_j) / (a_(j+1) -
        a_j s_(j+1)/s_j)`. This takes no denoiser call.

        Args:
            timestep: in [0, T); above the noisiest call, that call is taken.
            noise: signal `a` and noise `s` at the timestep.
        """
        if timestep is None:
            return self.states[-1]
        j = max(int(np.searchsorted(-np.array(self.timesteps), -timestep, side="right")) - 1, 0)
        if self.timesteps[j] <= timestep:
            return self.states[j]
        now, after = self.noises[j], self.noises[j + 1]
        shrunk, whole = noise.sigma / now.sigma, after.sigma / now.sigma
        share = (noise.alpha - now.alpha * shrunk) / (after.alpha - now.alpha * whole)
        return (shrunk - share * whole) * self.states[j] + share * self.states[j + 1]


def inner_products(terms: Sequence[Tensor], target: Tensor) -> Tensor:
    """Return inner products (k + 1, k + 1) in fp64 on the CPU of k terms and a target, each (n, C, h, w)."""
    stacked = torch.stack([*terms, target.to(terms[0])]).flatten(1).double()
    return (stacked @ stacked.T).cpu()
