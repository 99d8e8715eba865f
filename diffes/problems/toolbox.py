"""DEAP toolbox on a calibrated model, for any algorithm of DEAP."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from deap import base

from diffes.errors import DiffesError
from diffes.spaces.ledger import Ledger
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import Evaluator, Proposal
from diffes.spaces.variation import make_toolbox


class Measure:
    """Functions `evaluate` and `map` of a toolbox. They measure fitness on the real pipeline, each schedule once.

    Args:
        ledger: measures schedules, counts denoiser calls and stores evaluations.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, genome: Sequence[int]) -> tuple[float]:
        """Return the fitness of one genome (S,) in DEAP's form; -inf if the evaluation failed.

        Raises:
            DiffesError: the genome does not meet the budget.
        """
        return self.batch([genome])[0]

    def __reduce__(self) -> Any:
        """Refuse to be pickled: a pool's `map` would copy the model into every process.

        Raises:
            DiffesError: always.
        """
        raise DiffesError(
            "evaluate works on the model of this process and cannot be sent to another. Keep the toolbox's own map. "
            "For several processes, build the toolbox in `with bench.on_workers(N) as many: toolbox = many.toolbox()`"
        )

    def batch(self, genomes: Iterable[Sequence[int]]) -> list[tuple[float]]:
        """Measure many genomes together and return their fitness. Equal starts of trajectories share denoiser calls."""
        space = self._ledger.space
        asked = [Proposal(space.schedule(_whole(g)), origin=getattr(g, "origin", None)) for g in genomes]
        new = list({p.schedule: p for p in asked if p not in self._ledger}.values())
        for _ in self._ledger.measure(new):
            pass
        self._ledger.arrange(new)
        if new:
            self._ledger.log(new)
        return [(self._ledger[proposal].fitness,) for proposal in asked]

    def map(self, function: Callable[..., Any], *many: Iterable[Any]) -> list[Any]:
        """Apply a function as Python's `map` does. If it is `evaluate`, measure the whole generation as one batch."""
        return self.batch(*many) if getattr(function, "func", None) is self else list(map(function, *many))


def _whole(genome: Sequence[Any]) -> list[int]:
    """Return a genome as whole numbers.

    Raises:
        DiffesError: it has something else.
    """
    try:
        return [operator.index(gene) for gene in genome]
    except TypeError:
        raise DiffesError(f"a genome is a sequence of whole numbers, got {list(genome)!r}") from None


def measuring_toolbox(
    space: SearchSpace,
    evaluate: Evaluator,
    *,
    seed: int,
    mutation: str | None = None,
    crossover: str | None = None,
    store: EvaluationStore | None = None,
) -> base.Toolbox:
    """Build a complete DEAP toolbox; see `Workbench.toolbox`."""
    ledger = Ledger(space, evaluate, store)
    measure = Measure(ledger)
    toolbox = make_toolbox(space, np.random.default_rng(seed), mutate=mutation, mate=crossover)
    toolbox.register("evaluate", measure)
    toolbox.register("map", measure.map)
    toolbox.register("result", ledger.result)
    return toolbox
