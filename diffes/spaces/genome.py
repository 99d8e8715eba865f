"""Individuals in DEAP's form: a list of levels with a fitness, made without `creator`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deap import base

from diffes.errors import DiffesError


@dataclass(frozen=True)
class Origin:
    """Origin of a schedule: how it was made. The store keeps it beside the evaluation.

    Args:
        operator: name of the mutation, crossover or sampler that made it; several are joined by " + ".
        parents: levels (S,) of the schedules that it was made from.
    """

    operator: str
    parents: tuple[tuple[int, ...], ...] = ()


class Fitness(base.Fitness):  # type: ignore[misc]  # DEAP has no type hints
    """One score, higher is better. NaN is refused: in DEAP's comparisons it would beat every number."""

    weights = (1.0,)

    def _set_values(self, values: Sequence[float]) -> None:
        if any(math.isnan(value) for value in values):
            raise DiffesError("fitness must not be NaN. Set it to -inf for a genome that failed.")
        self.setValues(values)

    values = property(base.Fitness.getValues, _set_values, base.Fitness.delValues)


class Genome(list[int]):
    """Levels (S,) of a schedule with their `fitness`, which is empty until it is set, and their `origin`.

    Args:
        levels: one per stage, stage 0 (the cleanest) first.
        fitness: score of a measured genome.
        origin: how it was made; None if it was not made from others.
    """

    def __init__(self, levels: Iterable[int] = (), fitness: float | None = None, origin: Origin | None = None) -> None:
        super().__init__(levels)
        self.fitness = Fitness() if fitness is None else Fitness((fitness,))
        self.origin = origin
