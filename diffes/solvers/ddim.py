"""DDIM without noise: first order in the clean prediction."""

from __future__ import annotations

from collections.abc import Sequence

from diffes.solvers.base import Row, Solver
from diffes.solvers.process import Noise


class DDIM(Solver):
    """DDIM: `x' = (s'/s) x + (a' - a s'/s) D_i`, with signal `a` and noise `s` before the step and after it.

    It is Euler's method in the sigmas of a variance, and DPM-Solver++ of order 1.

    Source: Song et al., arXiv 2010.02502, equation 12 with no noise.

    Example:
        >>> from diffes.solvers import Noise
        >>> DDIM().row([Noise(0.6, 0.8), Noise(1.0, 0.0)], 0)
        (0.0, 1.0)
    """

    def row(self, noises: Sequence[Noise], i: int) -> Row:
        now, then = noises[i], noises[i + 1]
        shrunk = then.sigma / now.sigma
        return shrunk, then.alpha - now.alpha * shrunk
