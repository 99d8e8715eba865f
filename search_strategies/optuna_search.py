"""Optuna's samplers, and those of OptunaHub, as search strategies."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState, create_trial

from diffes.errors import DiffesError, at_least, unknown_name
from diffes.spaces.database import quiet_optuna
from diffes.spaces.genome import Origin
from diffes.spaces.initial import sample_unseen
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal, Strategy

SUGGESTION_TRIES = 10


class OptunaSearch(Strategy):
    """Strategy that asks for what a sampler suggests, one schedule at a time, repaired where it is off the budget.

    Samplers know no budget. A suggestion that had to be repaired is closed as failed, which samplers ignore. The
    repaired point is added with its score, so that the sampler learns from measured schedules only.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        sampler: name of a class in `optuna.samplers` ("GPSampler"), or of a package of OptunaHub with a slash
            ("samplers/auto_sampler"), which `optunahub` fetches when it is named.
        options: further arguments of the sampler.

    Raises:
        DiffesError: there is no such sampler, it lacks a library, it takes no seed, or it takes no such options.
    """

    credits_suggestions: ClassVar[bool] = False

    def __init__(self, space: SearchSpace, *, seed: int, sampler: str = "TPESampler", **options: Any) -> None:
        super().__init__(space, seed=seed)
        self.sampler = sampler
        self._rng = np.random.default_rng(seed)
        self._distributions: dict[str, BaseDistribution] = {
            f"level_{s:02d}": IntDistribution(0, len(space.genes) - 1) for s in space.visited
        }
        with quiet_optuna():
            self._study = optuna.create_study(sampler=_make_sampler(sampler, seed, options), direction="maximize")
        self._open: Trial | None = None
        self._seen: set[tuple[int, ...]] = set()

    def _ask(self) -> list[Proposal]:
        levels = self._suggest()
        operator = self.sampler
        if levels is None:
            levels, operator = sample_unseen(self.space, self._rng, self._seen), "random"
        if levels is None:
            return []
        self._seen.add(tuple(levels))
        return [self.propose(levels, origin=Origin(operator))]

    def _tell(self, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            if self._open is not None:
                self._study.tell(self._open, evaluation.fitness)
                self._open = None
            else:
                levels = evaluation.schedule.levels
                params = {f"level_{s:02d}": self.space.genes.index(levels[s]) for s in self.space.visited}
                self._study.add_trial(
                    create_trial(value=evaluation.fitness, params=params, distributions=self._distributions)
                )

    def _suggest(self) -> list[int] | None:
        """Return an unseen feasible genome (S,) from the sampler, or None; its trial stays open if it gets a score."""
        for _ in range(SUGGESTION_TRIES):
            trial = self._study.ask(self._distributions)
            suggested = [self.space.genes[trial.params.get(f"level_{s:02d}", 0)] for s in range(self.space.n_stages)]
            feasible = self.space.is_feasible(suggested)
            levels = suggested if feasible else self.space.repair(suggested, self._rng)
            unseen = tuple(levels) not in self._seen
            if unseen and (feasible or self.credits_suggestions):
                self._open = trial
                return levels
            self._study.tell(trial, state=TrialState.FAIL)
            if unseen:
                return levels
        return None


class Tpe(OptunaSearch):
    """Optuna's tree-structured Parzen estimator.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.
        startup: random suggestions before the model takes over, at least 1.

    Source: Optuna's `TPESampler`, multivariate, which is its default since version 5.
    """

    def __init__(self, space: SearchSpace, *, seed: int, startup: int = 10) -> None:
        self.startup = at_least("startup", startup, 1)
        super().__init__(space, seed=seed, sampler="TPESampler", n_startup_trials=startup)


class CmaEs(OptunaSearch):
    """CMA-ES with a margin for integers.

    It learns from its own suggestions only, so each gets the score of the schedule that it was repaired to.

    Args:
        space: the feasible schedules.
        seed: the only source of randomness.

    Source: Optuna's `CmaEsSampler`, which runs the library `cmaes`.
    """

    credits_suggestions = True

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        super().__init__(space, seed=seed, sampler="CmaEsSampler", with_margin=True)


def _make_sampler(name: str, seed: int, options: dict[str, Any]) -> BaseSampler:
    if "/" in name:
        try:
            import optunahub
        except ImportError as error:
            raise DiffesError(f"sampler {name!r} is from OptunaHub. Run pip install optunahub.") from error
        module = optunahub.load_module(name)
        classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, BaseSampler)]
        (cls,) = [c for c in classes if c.__module__.startswith(module.__name__)][:1] or classes[:1]
    else:
        known = [n for n, c in vars(optuna.samplers).items() if inspect.isclass(c) and issubclass(c, BaseSampler)]
        if name not in known:
            raise unknown_name("sampler", name, known)
        cls = getattr(optuna.samplers, name)
    make: Callable[..., BaseSampler] = cls
    if "seed" not in inspect.signature(cls).parameters:
        raise DiffesError(
            f"sampler {name!r} takes no seed, so its searches cannot be repeated. Choose another sampler."
        )
    try:
        with quiet_optuna(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return make(seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise DiffesError(f"sampler {name!r} does not accept the options {options} ({error})") from error
    except ImportError as error:
        raise DiffesError(f"sampler {name!r} needs a library that is missing ({error}). Install it.") from error
