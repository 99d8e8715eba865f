"""Solvers, which make the coefficients that compute the next latents from the present ones."""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from diffes.errors import at_least
from diffes.plugins import guarded, unexpected
from diffes.registry import Registry
from diffes.solvers.process import Floats, Noise

Row = tuple[float, ...]
"""Coefficients of one step: for the present latents, then for the clean predictions of the last calls, newest first."""


class Solver(abc.ABC):
    """Rule for the coefficients of every step of a sampling run.

    One step of every usual solver is `x' = a x + b_0 D_i + b_1 D_(i-1) + ...` with the clean predictions `D` of the
    last calls, so a solver is a row `(a, b_0, b_1, ...)` for each call. A subclass writes `row`; one whose coefficients
    are found by least squares along the run also sets `fits` and writes `fit`.

    Attributes:
        memory: largest number of clean predictions that a step reads.
        fits: whether `fit` replaces the rows of `row`.

    Example:
        >>> from diffes.solvers import SOLVERS, NoiseProcess, coefficients
        >>> from diffusers import DDIMScheduler
        >>> process = NoiseProcess.of(DDIMScheduler())
        >>> [[round(c, 3) for c in row] for row in coefficients("ddim", process.along([999, 499]))]
        [[0.96, 0.274], [0.0, 1.0]]
    """

    memory: int = 1
    fits: ClassVar[bool] = False

    @abc.abstractmethod
    def row(self, noises: Sequence[Noise], i: int) -> Row:
        """Return the coefficients of step `i`, which leads from `noises[i]` to `noises[i + 1]`.

        Args:
            noises: (n + 1,) signal and noise at each of n calls, and at the end.
            i: number of the step, in [0, n).
        """

    def fit(self, prior: Row, products: Floats) -> Row:
        """Return coefficients of one step that lead nearest to a target.

        Args:
            prior: coefficients from `row`, as many as there are terms; missing ones are 0.
            products: (k + 1, k + 1) inner products of the k terms (the latents, then the predictions) and of the
                target, which is last.
        """
        return prior


SOLVERS: Registry[type[Solver]] = Registry("solver of plans", "diffes.solvers", Solver)


def solver(name: str) -> Callable[[type[Solver]], type[Solver]]:
    """Register a subclass of `Solver` under a name; its constructor's parameters are its options.

    Example:
        >>> from diffes.solvers import SOLVERS, Solver, solver
        >>> @solver("stay")
        ... class Stay(Solver):
        ...     memory = 1
        ...
        ...     def row(self, noises, i):
        ...         return (1.0, 0.0)
        >>> SOLVERS.make("stay").row([], 0)
        (1.0, 0.0)
        >>> SOLVERS.unregister("stay")
    """
    return SOLVERS.register(name)


def coefficients(name: str, noises: Sequence[Noise]) -> tuple[Row, ...]:
    """Return the rows (n,) of a solver for a whole run; of a solver that fits, the rows that the fit starts from.

    Args:
        name: name of the solver, with options after a colon.
        noises: (n + 1,) signal and noise at each call and at the end.

    Raises:
        DiffesError: there is no such solver, or it takes no such options.

    Example:
        >>> coefficients("dpmsolver++", [Noise(0.6, 0.8), Noise(1.0, 0.0)])
        ((0.0, 1.0),)
    """
    return rows_of(SOLVERS.make(name), noises)


def rows_of(made: Solver, noises: Sequence[Noise]) -> tuple[Row, ...]:
    """Return the rows (n,) of a solver for a whole run, checked (see `coefficients`).

    Raises:
        DiffesError: the solver's memory is no whole number from 1 on, or a row has no coefficients of the latents and
            of 1 to `memory` predictions, or they are not finite.
        PluginError: a solver of somebody else raised another error.
    """
    what, noises = f"solver {type(made).__qualname__}", tuple(noises)
    with guarded(made, what, "have a memory, a whole number from 1 on"):
        memory = at_least(f"memory of {what}", made.memory, 1)
    rows: list[Row] = []
    for i in range(len(noises) - 1):
        most = min(memory, i + 1)
        wanted = f"return finite coefficients of the latents and of 1 to {most} predictions from row {i}"
        with guarded(made, what, wanted):
            given = made.row(noises, i)
            found = _numbers(given)
        if found is None or not 2 <= len(found) <= 1 + most:
            raise unexpected(what, wanted, given)
        rows.append(found)
    return tuple(rows)


def fit_of(made: Solver, prior: Row, products: Floats) -> Row:
    """Return the coefficients that a solver fits to products, checked; the prior where these are not finite, because
    the run has failed.

    Raises:
        DiffesError: there are more or fewer than the prior has, or they are not finite.
        PluginError: a solver of somebody else raised another error.
    """
    if not np.isfinite(products).all():
        return prior
    what, wanted = f"solver {type(made).__qualname__}", f"return {len(prior)} finite coefficients from fit"
    with guarded(made, what, wanted):
        given = made.fit(prior, products)
        found = _numbers(given)
    if found is None or len(found) != len(prior):
        raise unexpected(what, f"{wanted}, as many as its prior has", given)
    return found


def _numbers(given: Sequence[Any]) -> Row | None:
    """Return coefficients as floats; None where one is no finite number."""
    known = tuple(given)
    finite = all(isinstance(each, numbers.Real) and math.isfinite(each) for each in known)
    return tuple(float(each) for each in known) if finite else None
