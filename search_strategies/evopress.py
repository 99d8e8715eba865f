"""EvoPress: many offspring of one parent, measured on few probes first and the promising ones on more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffes.errors import DiffesError, at_least
from diffes.space import SearchSpace
from diffes.strategy import Evaluation, Origin, Strategy
from search_strategies.initial import hybrid, sample_unseen
from search_strategies.operators import Genome, make_toolbox

MUTATION_TRIES = 20


class EvoPress(Strategy):
    """(1 + lambda) with rungs: all offspring on few probes, survivors on more, the last ones against the parent.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        lam: lambda, offspring of a generation, at least 1; also the size of the hybrid first population.
        fidelities: the fraction of the probes of each rung, rising, the last one 1.
        survivors: how many go on from each rung but the last, falling.
        mutation: a registered mutation, with options after a colon.

    Raises:
        DiffesError: the rungs are not as above.

    Source: EvoPress (Sieberling et al. 2024), algorithm 1, whose rungs are numbers of tokens; here they are probes. Its
    own setting has more and larger rungs, for searches of thousands of evaluations.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        lam: int = 16,
        fidelities: Sequence[float] = (0.25, 1.0),
        survivors: Sequence[int] = (4,),
        mutation: str = "level_switch_small",
    ) -> None:
        super().__init__(space, seed=seed)
        self.lam = at_least("lam", lam, 1)
        rising = all(a < b for a, b in zip((0, *fidelities), fidelities, strict=False))
        if not (rising and fidelities and fidelities[-1] == 1 and len(survivors) == len(fidelities) - 1):
            raise DiffesError(
                "fidelities must rise within (0, 1] and end with 1, with a number of survivors for each but the last, "
                f"got {tuple(fidelities)} and {tuple(survivors)}"
            )
        self.fidelities = tuple(fidelities)
        self.survivors = tuple(at_least("survivors", n, 1) for n in survivors)
        self.mutation = mutation
        self._rng = np.random.default_rng(seed)
        self._toolbox = make_toolbox(space, self._rng, mutate=mutation)
        self._parent: Evaluation | None = None
        self._rung = 0
        self._going_on: list[list[int]] = []
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[list[int]]:
        if self._rung == 0:
            self._going_on = self._offspring()
            self._seen.update(map(tuple, self._going_on))
        self.fidelity = self.fidelities[self._rung]
        return self._going_on

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        ranked = sorted(evaluations, key=lambda evaluation: evaluation.fitness, reverse=True)
        if self._rung < len(self.survivors):
            self._going_on = [list(e.schedule.levels) for e in ranked[: self.survivors[self._rung]]]
            self._rung += 1
            return
        self._rung = 0
        if ranked and (self._parent is None or ranked[0].fitness >= self._parent.fitness):
            self._parent = ranked[0]

    def _offspring(self) -> list[list[int]]:
        """Lambda distinct unseen genomes (S,), mutants of the parent as far as there are new ones; fewer at the end."""
        if self._parent is None:
            return hybrid(self.space, self._rng, self.lam)
        parent = self._parent.schedule.levels
        batch: dict[tuple[int, ...], None] = {}
        while len(batch) < self.lam:
            taken = self._seen | batch.keys()
            child = Genome(parent)
            for _ in range(MUTATION_TRIES):
                (child,) = self._toolbox.mutate(child)
                if tuple(child) not in taken:
                    self.origins[tuple(child)] = Origin(self.mutation, (parent,))
                    break
            else:
                sample = sample_unseen(self.space, self._rng, taken)
                if sample is None:
                    break
                child = Genome(sample)
                self.origins[tuple(child)] = Origin("random")
            batch[tuple(int(level) for level in child)] = None
        return [list(levels) for levels in batch]
