"""Fitted solver: coefficients by least squares, so that every step leads to where the dense reference is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffes.errors import DiffesError, at_least
from diffes.solvers.base import Row
from diffes.solvers.ddim import DDIM
from diffes.solvers.dpmsolver import DPMSolver
from diffes.solvers.process import Floats, Noise


class Fitted(DPMSolver):
    """Solver that fits each step by ridge regression, from the run's own latents to those of the reference.

    At call `i` the terms are the present latents and the clean predictions of the last calls, and the target is the
    latents that the reference has at the next timestep. Because the present latents are the run's own, each step also
    corrects the errors of those before it. The ridge pulls towards DPM-Solver++ 2M.

    Args:
        memory: number of clean predictions that a step reads, at least 1.
        ridge: strength of the ridge, relative to the mean square of each term, above 0.
        scaled: whether to scale each step so that its latents have the mean square of the reference's. Least squares
            shrinks towards the mean where there are too few calls to predict from.

    Example:
        >>> import numpy as np
        >>> terms = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0], [2.0, 3.0, 13.0]])  # the target is 2 x + 3 D
        >>> [round(c, 3) for c in Fitted().fit((1.0, 1.0), terms)]
        [2.0, 3.0]
    """

    fits = True

    def __init__(self, memory: int = 3, ridge: float = 1e-5, scaled: bool = True) -> None:
        at_least("memory", memory, 1)
        if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < np.inf:
            raise DiffesError(f"ridge must be a finite number above 0, got {ridge!r}")
        if not isinstance(scaled, bool):
            raise DiffesError(f"scaled must be true or false, got {scaled!r}")
        self.memory = memory
        self.ridge = ridge
        self.scaled = scaled

    def row(self, noises: Sequence[Noise], i: int) -> Row:
        known = super().row(noises, i) if self.memory > 1 else DDIM.row(self, noises, i)
        return (*known, *(0.0,) * (1 + min(i + 1, self.memory) - len(known)))

    def fit(self, prior: Row, products: Floats) -> Row:
        # min |A c - y|^2 + ridge |diag(A'A)^(1/2) (c - prior)|^2
        squares, target, start = products[:-1, :-1], products[:-1, -1], np.array(prior)
        sizes = np.where(squares.diagonal() > 0, squares.diagonal(), 1.0)  # a term that is 0 keeps its prior
        found = start + np.linalg.solve(squares + self.ridge * np.diag(sizes), target - squares @ start)
        if self.scaled and (square := found @ squares @ found) > 0:
            found *= np.sqrt(products[-1, -1] / square)
        return tuple(float(each) for each in found)
