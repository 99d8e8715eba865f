"""A Gaussian process over schedules: a function of each feature, of each pair of them, and noise."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize
from scipy.sparse import csr_array

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Kernel:
    """Covariance of schedules: a function of each feature, of each pair of them, and noise.

    Args:
        parameters: (2 V + 2,) natural logarithms: how far each feature's function reaches, in its unit; how much each
            counts; how much pairs count; variance of what neither explains.
        grid: (G,) the values that features take, evenly spaced from 0 on; None where they are any numbers.
    """

    parameters: Floats
    grid: Floats | None = None

    @classmethod
    def prior(cls, n: int, grid: Floats | None = None) -> Kernel:
        """What is assumed of n features before anything was measured."""
        return cls(np.log([0.5] * n + [0.1] * n + [0.4, 0.01]), grid)

    def alone(self, a: Floats, b: Floats) -> Floats:
        """(n, m, V) covariances of each feature's own function; features (n, V) and (m, V)."""
        return self.weight * np.exp(-(((a[:, None] - b[None]) / self.reach) ** 2) / 2)

    def __call__(self, a: Floats, b: Floats) -> Floats:
        """(n, m) covariances, noise left out; features (n, V) and (m, V)."""
        total, squares = self._looked_up(a, b) if self.grid is not None else self._added_up(a, b)
        return self.summed(total, squares)

    def _looked_up(self, a: Floats, b: Floats) -> tuple[Floats, Floats]:
        """(n, m) sums over features of covariances and of their squares, as products with indicator matrices."""
        assert self.grid is not None
        points = np.repeat(self.grid[:, None], a.shape[1], axis=1)
        table = self.alone(points, points).transpose(2, 0, 1)  # (V, G, G)
        features = np.arange(a.shape[1])
        rows = table[features, np.searchsorted(self.grid, a)].reshape(len(a), -1)  # (n, V G)
        marks = np.zeros((len(b), *table.shape[:2]))
        marks[np.arange(len(b))[:, None], features, np.searchsorted(self.grid, b)] = 1
        sums = np.vstack([rows, rows**2]) @ marks.reshape(len(b), -1).T
        return sums[: len(a)], sums[len(a) :]

    def _added_up(self, a: Floats, b: Floats) -> tuple[Floats, Floats]:
        """(n, m) the same sums, feature by feature."""
        total, squares = np.zeros((len(a), len(b))), np.zeros((len(a), len(b)))
        for v, (reach, weight) in enumerate(zip(self.reach, self.weight, strict=True)):
            alone = weight * np.exp((a[:, v, None] - b[None, :, v]) ** 2 * (-0.5 / reach**2))
            total += alone
            squares += alone * alone
        return total, squares

    @property
    def reach(self) -> Floats:
        """(V,) of each feature."""
        return np.exp(self.parameters[: len(self.parameters) // 2 - 1])

    @property
    def weight(self) -> Floats:
        """(V,) of each feature."""
        return np.exp(self.parameters[len(self.parameters) // 2 - 1 : -2])

    @property
    def pairs(self) -> float:
        """How much pairs count."""
        return float(np.exp(self.parameters[-2]))

    @property
    def noise(self) -> float:
        """Variance of what is not explained."""
        return float(np.exp(self.parameters[-1])) + 1e-6

    @property
    def variance(self) -> float:
        """Of the fitness of any schedule, noise left out."""
        return float(self.summed(self.weight.sum(), (self.weight**2).sum()))

    def summed(self, total: Floats, squares: Floats) -> Floats:
        """Covariances of what has these sums over features of covariances and of their squares."""
        return total + self.pairs * (total**2 - squares) / 2

    def fitted(self, levels: Floats, scores: Floats) -> Kernel:
        """The kernel under which scores (n,) at features (n, V) are likeliest, given the prior; from here on."""
        prior = self.prior(levels.shape[1]).parameters
        likelihood = _Likelihood(levels, scores, self.grid)

        def loss(parameters: Floats) -> tuple[float, Floats]:
            value, gradient = likelihood(Kernel(parameters))
            far = parameters - prior
            return float(far @ far / 2 - value), far - gradient

        bounds = [(value - 4, value + 4) for value in prior]
        found = minimize(loss, self.parameters, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 20})
        return replace(self, parameters=np.asarray(found.x))


class _Likelihood:
    """How likely scores are under a kernel: logarithm, up to a constant, and gradient.

    Each pair of schedules is looked at once. On a grid covariances are made for each distance there is, and looked up.

    Args:
        levels: features (n, V).
        scores: (n,).
        grid: (G,) the values that features take, evenly spaced from 0 on; None where they are any numbers.
    """

    def __init__(self, levels: Floats, scores: Floats, grid: Floats | None) -> None:
        self.scores = scores
        i, j = np.tril_indices(len(levels), -1)
        self._below = i * len(levels) + j  # where the pairs are in a flat matrix
        self._marks = None
        if grid is None:
            self._squares = np.ascontiguousarray(((levels[i] - levels[j]) ** 2).T)  # (V, P), each pair its own
            return
        places = np.searchsorted(grid, levels).astype(np.int32)
        apart = np.abs(places[i] - places[j]) + np.arange(levels.shape[1], dtype=np.int32) * np.int32(len(grid))
        self._squares = np.tile(grid**2, (levels.shape[1], 1))  # (V, G)
        rows = np.arange(len(i) + 1, dtype=np.int32) * np.int32(levels.shape[1])
        shape = (len(i), self._squares.size)
        self._marks = csr_array((np.ones(apart.size), apart.ravel(), rows), shape=shape)

    def _over_features(self, table: Floats) -> Floats:
        """(P,) sums over features for each pair, of what each distance (V, G) or each pair (V, P) has."""
        return table.sum(0) if self._marks is None else self._marks @ table.ravel()

    def _over_pairs(self, worth: Floats) -> Floats:
        """(V, G) sums over the pairs at each distance of what each pair (P,) has; where pairs are alone, that."""
        return worth if self._marks is None else (self._marks.T @ worth).reshape(self._squares.shape)

    def __call__(self, kernel: Kernel) -> tuple[float, Floats]:
        """The value, and its gradient (2 V + 2,) by the kernel's parameters."""
        scores, weight, pairs = self.scores, kernel.weight, kernel.pairs
        alone = weight[:, None] * np.exp(self._squares * (-0.5 / kernel.reach[:, None] ** 2))
        squared = alone * alone
        total, squares = self._over_features(alone), self._over_features(squared)
        covariance = np.zeros((len(scores), len(scores)))
        covariance.put(self._below, kernel.summed(total, squares))
        np.fill_diagonal(covariance, kernel.variance + kernel.noise)
        factor = np.linalg.cholesky(covariance)  # reads the lower triangle only
        inverse, _ = dpotri(factor, lower=1)  # writes it only
        weights = cho_solve((factor, True), scores)
        own = (weights**2 - np.diag(inverse)).sum() / 2  # of the value by the covariance, on the diagonal
        outer = (np.outer(weights, weights) - inverse).take(self._below)  # and of both halves beside it
        by_pair = alone * self._over_pairs(outer * (1 + pairs * total)) - pairs * squared * self._over_pairs(outer)
        both = outer @ (total**2 - squares) + own * (weight.sum() ** 2 - (weight**2).sum())
        gradient = np.array([
            *(by_pair * self._squares).sum(1) / kernel.reach**2,
            *by_pair.sum(1) + own * weight * (1 + pairs * (weight.sum() - weight)),
            pairs * both / 2,
            math.exp(kernel.parameters[-1]) * own,
        ])  # fmt: skip
        return float(-scores @ weights / 2 - np.log(np.diag(factor)).sum()), gradient


class Model:
    """A Gaussian process conditioned on measured schedules.

    Args:
        kernel: the covariance.
        levels: features (n, V).
        scores: (n,), around 0 with a variance of 1.
    """

    def __init__(self, kernel: Kernel, levels: Floats, scores: Floats) -> None:
        covariance = kernel(levels, levels)
        np.fill_diagonal(covariance, kernel.variance + kernel.noise)
        factor = np.asarray(np.linalg.cholesky(covariance), dtype=float)
        self._condition(kernel, levels, scores, factor)

    def _condition(self, kernel: Kernel, levels: Floats, scores: Floats, factor: Floats) -> None:
        self.kernel, self.levels, self.scores, self._factor = kernel, levels, scores, factor
        self.weights = cho_solve((factor, True), scores)

    def predict(self, levels: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation (m,) of the scores at features (m, V), noise left out."""
        across = self.kernel(self.levels, levels)
        known = solve_triangular(self._factor, across, lower=True, check_finite=False)
        variance = np.maximum(self.kernel.variance - np.einsum("nm,nm->m", known, known), 1e-10)
        return across.T @ self.weights, np.sqrt(variance)

    def believing(self, levels: Floats, score: float) -> Model:
        """The model as if a score had been measured at features (1, V)."""
        n = len(self.scores)
        factor = np.zeros((n + 1, n + 1))
        factor[:n, :n] = self._factor
        factor[n, :n] = solve_triangular(self._factor, self.kernel(self.levels, levels)[:, 0], lower=True)
        factor[n, n] = math.sqrt(self.kernel.variance + self.kernel.noise - factor[n, :n] @ factor[n, :n])
        model = copy.copy(self)
        model._condition(self.kernel, np.vstack([self.levels, levels]), np.append(self.scores, score), factor)
        return model
