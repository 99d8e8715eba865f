"""Solvers of plans: the rules that make rows of coefficients, and the scheduler that steps with them."""

from diffes.solvers.base import SOLVERS, Row, Solver, coefficients, fit_of, solver
from diffes.solvers.process import END, Noise, NoiseProcess, own_of

__all__ = ["END", "SOLVERS", "Noise", "NoiseProcess", "Row", "Solver", "coefficients", "fit_of", "own_of", "solver"]
