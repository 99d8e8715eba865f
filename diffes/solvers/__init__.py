"""Solvers of plans: rows of coefficients, who makes them, and the scheduler that steps with them."""

from diffes.solvers.base import SOLVERS, Row, Solver, coefficients, solver
from diffes.solvers.process import END, Noise, NoiseProcess

__all__ = ["END", "SOLVERS", "Noise", "NoiseProcess", "Row", "Solver", "coefficients", "solver"]
