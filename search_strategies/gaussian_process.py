"""Gaussian process over schedules: a function of each feature, of each pair of them, and noise."""

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
        parameters: (2 V + 2,) natural logarithms of the reach of each feature's function, in its unit; of the weight of
            each feature; of the weight of pairs; and of the variance of the noise.
        grid: (G,) values that features take, evenly spaced from 0 on; None if they can be any numbers.
    """

    parameters: Floats
    grid: Floats | None = None

    @classmethod
    def prior(cls, n: int, grid: Floats | None = None) -> Kernel:
        """Return the kernel that is assumed for n features before anything was measured."""
        return cls(np.log([0.5] * n + [0.1] * n + [0.4, 0.01]), grid)

    def alone(self, a: Floats, b: Floats) -> Floats:
        """Return the covariances (n, m, V) of each feature's own function, for features (n, V) and (m, V)."""
        return self.weight * np.exp(-(((a[:, None] - b[None]) / self.reach) ** 2) / 2)

    def __call__(self, a: Floats, b: Floats) -> Floats:
        """Return the covariances (n, m) of features (n, V) and (m, V), without noise."""
        total, squares = self._looked_up(a, b) if self.grid is not None else self._added_up(a, b)
        return self.summed(total, squares)

    def _looked_up(self, a: Floats, b: Floats) -> tuple[Floats, Floats]:
        """Return the sums (n, m) over features of covariances and of their squares, by products with indicators."""
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
        """Return the same sums (n, m), added up feature by feature."""
        total, squares = np.zeros((len(a), len(b))), np.zeros((len(a), len(b)))
        for v, (reach, weight) in enumerate(zip(self.reach, self.weight, strict=True)):
            alone = weight * np.exp((a[:, v, None] - b[None, :, v]) ** 2 * (-0.5 / reach**2))
            total += alone
            squares += alone * alone
        return total, squares

    @property
    def reach(self) -> Floats:
        """Reach (V,) of each feature's function."""
        return np.exp(self.parameters[: len(self.parameters) // 2 - 1])

    @property
    def weight(self) -> Floats:
        """Weight (V,) of each feature."""
        return np.exp(self.parameters[len(self.parameters) // 2 - 1 : -2])

    @property
    def pairs(self) -> float:
        """Weight of pairs."""
        return float(np.exp(self.parameters[-2]))

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return float(np.exp(self.parameters[-1])) + 1e-6

    @property
    def variance(self) -> float:
        """Variance of the fitness of any schedule, without noise."""
        return float(self.summed(self.weight.sum(), (self.weight**2).sum()))

    def summed(self, total: Floats, squares: Floats) -> Floats:
        """Return the covariances that have these sums over features of covariances and of their squares."""
        return total + self.pairs * (total**2 - squares) / 2

    def fitted(self, levels: Floats, scores: Floats) -> Kernel:
        """Return the kernel under which scores (n,) at features (n, V) are likeliest, given the prior.

        The optimisation starts from this kernel.
        """
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
    """Log-likelihood of scores under a kernel, up to a constant, and its gradient.

    Each pair of schedules is used once. On a grid, covariances are computed once per distance and looked up.

    Args:
        levels: features (n, V).
        scores: (n,).
        grid: (G,) values that features take, evenly spaced from 0 on; None if they can be any numbers.
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
        """Return the sums (P,) over features for each pair, from a table by distance (V, G) or by pair (V, P)."""
        return table.sum(0) if self._marks is None else self._marks @ table.ravel()

    def _over_pairs(self, worth: Floats) -> Floats:
        """Return the sums (V, G) of a value per pair (P,) over the pairs at each distance.

        Without a grid each pair has its own distance, and the values are returned.
        """
        return worth if self._marks is None else (self._marks.T @ worth).reshape(self._squares.shape)

    def __call__(self, kernel: Kernel) -> tuple[float, Floats]:
        """Return the log-likelihood, and its gradient (2 V + 2,) with respect to the kernel's parameters."""
        scores, weight, pairs = self.scores, kernel.weight, kernel.pairs
        alone = weight[:, None] * np.exp(self._squares * (-0.5 / kernel.reach[:, None] ** 2))
        squared = alone * alone
        total, squares = self._over_features(alone), self._over_features(squared)
        covariance = np.zeros((len(scores), len(scores)))
        covariance.put(self._below, kernel.summed(total, squares))
        np.fill_diagonal(covariance, kernel.variance + kernel.noise)
        factor = np.linalg.cholesky(covariance)  # reads the lower triangle only
        inverse, _ = dpotri(factor, lower=1)  # writes the lower triangle only
        weights = cho_solve((factor, True), scores)
        own = (weights**2 - np.diag(inverse)).sum() / 2  # derivative by the covariance: diagonal
        outer = (np.outer(weights, weights) - inverse).take(self._below)  # and both halves off the diagonal
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
        """Predict the mean and standard deviation (m,) of the scores at features (m, V), without noise."""
        across = self.kernel(self.levels, levels)
        known = solve_triangular(self._factor, across, lower=True, check_finite=False)
        variance = np.maximum(self.kernel.variance - np.einsum("nm,nm->m", known, known), 1e-10)
        return across.T @ self.weights, np.sqrt(variance)

    def believing(self, levels: Floats, score: float) -> Model:
        """Return the model as if a score had been measured at features (1, V)."""
        n = len(self.scores)
        factor = np.zeros((n + 1, n + 1))
        factor[:n, :n] = self._factor
        factor[n, :n] = solve_triangular(self._factor, self.kernel(self.levels, levels)[:, 0], lower=True)
        factor[n, n] = math.sqrt(self.kernel.variance + self.kernel.noise - factor[n, :n] @ factor[n, :n])
        model = copy.copy(self)
        model._condition(self.kernel, np.vstack([self.levels, levels]), np.append(self.scores, score), factor)
        return model
