"""EvoPress: many offspring of one parent, measured on few probes first and the promising ones on more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffes.errors import DiffesError, at_least
from diffes.spaces.genome import Genome
from diffes.spaces.initial import hybrid
from diffes.spaces.operators import MUTATIONS
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy
from diffes.spaces.variation import make_toolbox, vary


class EvoPress(Strategy):
    """(1 + lambda) evolution with rungs: all offspring on few probes, survivors on more, the last against the parent.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        lam: lambda, offspring per generation, at least 1. It is also the size of the hybrid first population, which is
            larger if the space has more starts: on few probes they are cheap to tell apart.
        fidelities: the fraction of the probes of each rung, rising, the last one 1.
        survivors: number of schedules that go on from each rung but the last, falling.
        mutation: a registered mutation or one of DEAP's, with options after a colon. None takes the small-step default
            of the space: "level_switch_small" as in EvoPress, "plan_move:max_moves=1" for plans.

    Raises:
        DiffesError: the rungs are not as above.

    Source: EvoPress (Sieberling et al. 2024), algorithm 1, whose rungs are numbers of tokens; here they are probes. Its
    own setting has more and larger rungs, for searches of thousands of evaluations.
    """

    operators = ("mutation",)

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        lam: int = 16,
        fidelities: Sequence[float] = (0.25, 1.0),
        survivors: Sequence[int] = (4,),
        mutation: str | None = None,
    ) -> None:
        super().__init__(space, seed=seed)
        self.lam = at_least("lam", lam, 1)
        rising = all(a < b for a, b in zip((0, *fidelities), fidelities, strict=False))
        if not (rising and fidelities and fidelities[-1] == 1 and len(survivors) == len(fidelities) - 1):
            raise DiffesError(
                "fidelities must rise, from above 0 to 1 at the end, and survivors must have one number for each but "
                f"the last. Got {tuple(fidelities)} and {tuple(survivors)}."
            )
        self.fidelities = tuple(fidelities)
        self.survivors = tuple(at_least("survivors", n, 1) for n in survivors)
        self._rng = np.random.default_rng(seed)
        self._toolbox = make_toolbox(space, self._rng, mutate=mutation or MUTATIONS.default(space, small=True))
        self._parent: Genome | None = None
        self._rung = 0
        self._going_on: list[Genome] = []
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[Proposal]:
        if self._rung == 0:
            self._going_on = self._offspring()
            self._seen.update(map(tuple, self._going_on))
        fidelity = self.fidelities[self._rung]
        return [self.propose(genome, fidelity=fidelity, origin=genome.origin) for genome in self._going_on]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Select those that go on to the next rung, or the next parent after the last rung.

        Of equals the one asked first goes on, but an offspring as good as the parent takes its place.
        """
        told = zip(evaluations, self._going_on, strict=True)
        ranked = [
            Genome(genome, evaluation.fitness, genome.origin)
            for evaluation, genome in sorted(told, key=lambda pair: pair[0].fitness, reverse=True)
        ]
        if self._rung < len(self.survivors):
            self._going_on = ranked[: self.survivors[self._rung]]
            self._rung += 1
            return
        self._rung = 0
        if ranked and (self._parent is None or ranked[0].fitness >= self._parent.fitness):
            self._parent = ranked[0]

    def _offspring(self) -> list[Genome]:
        """Return the first population, or later lambda distinct unseen genomes (S,): mutants of the parent.

        Random genomes follow where no mutant is new, and there are fewer than lambda where no more are found.
        """
        if self._parent is None:
            size = max(self.lam, len(self.space.starts))
            return [Genome(levels) for levels in hybrid(self.space, self._rng, size)]
        return vary([self._parent], self._toolbox, self.lam, space=self.space, rng=self._rng, seen=self._seen)
