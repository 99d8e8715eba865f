"""Conformance suites for plug-ins of your own: strategies, mutations, crossovers and adapters of model families.

Subclass one in a test file, and name what it tests; pytest finds the tests:

    from diffes.testing import MutationConformance

    class TestMine(MutationConformance):
        name = "my_mutation"
"""

from typing import TYPE_CHECKING, Any

from diffes.spaces.strategy import STRATEGIES
from diffes.testing.strategies import (
    PLANS,
    SPACES,
    CrossoverConformance,
    MutationConformance,
    StrategyConformance,
    answer,
    evaluate,
    separable,
    trace,
)

if TYPE_CHECKING:
    from diffes.testing.adapters import AdapterConformance

__all__ = [
    "PLANS", "SPACES", "STRATEGIES", "AdapterConformance", "CrossoverConformance", "MutationConformance",
    "StrategyConformance", "answer", "evaluate", "separable", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the suite of adapters when it is asked for: it needs torch, and a test of a strategy needs none."""
    if name != "AdapterConformance":
        raise AttributeError(name)
    from diffes.testing.adapters import AdapterConformance

    return AdapterConformance
