"""DPM-Solver++ 2M: second order, from the clean predictions of two calls."""

from __future__ import annotations

from collections.abc import Sequence

from diffes.solvers.base import Row
from diffes.solvers.ddim import DDIM
from diffes.solvers.process import Noise


class DPMSolver(DDIM):
    """DDIM with the clean prediction extrapolated over half of the step: `D_i + (h / 2 h_0) (D_i - D_(i-1))`.

    `h` is the length of the step in the logarithm of signal over noise, `h_0` that of the step before. The first step
    and the last one, which ends without noise, are of first order, as in diffusers with a final sigma of zero.

    Source: Lu et al., arXiv 2211.01095, algorithm 2.

    Example:
        >>> from diffes.solvers import Noise
        >>> run = [Noise(0.6, 0.8), Noise(0.8, 0.6), Noise(1.0, 0.0)]
        >>> DPMSolver().row(run, 1)
        (0.0, 1.0)
    """

    memory = 2

    def row(self, noises: Sequence[Noise], i: int) -> Row:
        kept, new = super().row(noises, i)
        if i == 0 or not noises[i + 1].sigma:
            return kept, new
        before, now, after = (noise.log_snr for noise in noises[i - 1 : i + 2])
        slope = (after - now) / (now - before) / 2
        return kept, new * (1 + slope), -new * slope
