"""Optuna's tree-structured Parzen estimator as a search strategy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState, create_trial

from diffes.errors import at_least
from diffes.space import SearchSpace
from diffes.store import quiet_optuna
from diffes.strategy import Evaluation, Strategy
from search_strategies.initial import sample_unseen

SUGGESTION_TRIES = 10


class Tpe(Strategy):
    """Asks for what Optuna's TPE suggests, one schedule at a time, moved onto the budget where it is off it.

    TPE knows no budget. A suggestion that had to be repaired is closed as failed, which TPE ignores, and the repaired
    point is added with its score, so that the model learns from schedules that were measured and from no others.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        startup: random suggestions before the model takes over, at least 1.

    Source: Optuna's `TPESampler`, multivariate as is its default since version 5.
    """

    def __init__(self, space: SearchSpace, *, seed: int, startup: int = 10) -> None:
        super().__init__(space, seed=seed)
        self.startup = at_least("startup", startup, 1)
        self._rng = np.random.default_rng(seed)
        self._distributions: dict[str, BaseDistribution] = {
            f"level_{s:02d}": IntDistribution(0, space.max_level) for s in space.visited
        }
        with quiet_optuna():
            self._study = optuna.create_study(
                sampler=TPESampler(n_startup_trials=startup, seed=seed), direction="maximize"
            )
        self._open: Trial | None = None
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[list[int]]:
        levels = self._suggest()
        if levels is None:
            levels = sample_unseen(self.space, self._rng, self._seen)
        if levels is None:
            return []
        self._seen.add(tuple(levels))
        return [levels]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            if self._open is not None:
                self._study.tell(self._open, evaluation.fitness)
                self._open = None
            else:
                levels = evaluation.schedule.levels
                params = {f"level_{s:02d}": levels[s] for s in self.space.visited}
                self._study.add_trial(
                    create_trial(value=evaluation.fitness, params=params, distributions=self._distributions)
                )

    def _suggest(self) -> list[int] | None:
        """An unseen feasible genome (S,) from TPE, or None; its trial stays open if it needed no repair."""
        for _ in range(SUGGESTION_TRIES):
            trial = self._study.ask(self._distributions)
            suggested = [trial.params.get(f"level_{s:02d}", 0) for s in range(self.space.n_stages)]
            feasible = self.space.is_feasible(suggested)
            levels = suggested if feasible else self.space.repair(suggested, self._rng)
            unseen = tuple(levels) not in self._seen
            if feasible and unseen:
                self._open = trial
                return levels
            self._study.tell(trial, state=TrialState.FAIL)
            if unseen:
                return levels
        return None
