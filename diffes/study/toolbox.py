"""DEAP's toolbox on a calibrated model: what any algorithm of DEAP runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from deap import base

from diffes.search.ledger import Ledger
from diffes.search.space import SearchSpace
from diffes.search.store import EvaluationStore
from diffes.search.strategy import Evaluator, Proposal
from diffes.search.variation import make_toolbox


class Measure:
    """A toolbox's `evaluate` and `map`: fitness on the real pipeline, every schedule paid for once.

    Args:
        ledger: what pays, counts and stores.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, genome: Sequence[int]) -> tuple[float]:
        """Fitness of one genome (S,), as DEAP wants it; -inf where it failed.

        Raises:
            DiffesError: the genome does not meet the budget.
        """
        return self.batch([genome])[0]

    def batch(self, genomes: Iterable[Sequence[int]]) -> list[tuple[float]]:
        """Fitness of many, measured together: what shares the start of its trajectory shares its denoiser calls."""
        space = self._ledger.space
        asked = [Proposal(space.schedule(list(g)), origin=getattr(g, "origin", None)) for g in genomes]
        new = list({p.schedule: p for p in asked if p not in self._ledger}.values())
        for _ in self._ledger.measure(new):
            pass
        self._ledger.arrange(new)
        if new:
            self._ledger.log(new)
        return [(self._ledger[proposal].fitness,) for proposal in asked]

    def map(self, function: Callable[..., Any], *many: Iterable[Any]) -> list[Any]:
        """Python's `map`, but `evaluate` over a generation, as DEAP's algorithms ask for it, is one batch."""
        return self.batch(*many) if getattr(function, "func", None) is self else list(map(function, *many))


def measuring_toolbox(
    space: SearchSpace,
    evaluate: Evaluator,
    *,
    seed: int,
    mutation: str | None = None,
    crossover: str | None = None,
    store: EvaluationStore | None = None,
) -> base.Toolbox:
    """A whole DEAP toolbox; see `Workbench.toolbox`."""
    ledger = Ledger(space, evaluate, store)
    measure = Measure(ledger)
    toolbox = make_toolbox(space, np.random.default_rng(seed), mutate=mutation, mate=crossover)
    toolbox.register("evaluate", measure)
    toolbox.register("map", measure.map)
    toolbox.register("result", ledger.result)
    return toolbox
