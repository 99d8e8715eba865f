"""Optuna's samplers as strategies."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.trial import TrialState

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.testing import SPACES, StrategyConformance, answer, trace
from search_strategies.optuna_search import CmaEs, OptunaSearch, Tpe

PAPER = SPACES["paper"]


class TestOptuna(StrategyConformance):
    name = "optuna"
    evaluations = 40


class TestTpe(StrategyConformance):
    name = "tpe"
    evaluations = 40


class TestCmaEs(StrategyConformance):
    name = "cmaes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "TpeSampler"}, "Did you mean 'TPESampler'"),
        ({"n_startup": 3}, "does not accept the options {'n_startup': 3}"),
        ({"sampler": "GridSampler"}, "does not accept the options"),
        ({"sampler": "PartialFixedSampler"}, "takes no seed"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        OptunaSearch(PAPER, seed=0, **options)


def test_tpe_refuses_no_startup() -> None:
    with pytest.raises(DiffesError, match="startup must be at least 1, got 0"):
        Tpe(PAPER, seed=0, startup=0)


@pytest.mark.parametrize("strategy_class", [Tpe, OptunaSearch])
def test_it_learns_from_measured_points_only(strategy_class: type[OptunaSearch]) -> None:
    strategy = strategy_class(PAPER, seed=0)
    asked = trace(strategy, n=20)
    complete = [trial for trial in strategy._study.trials if trial.value is not None]
    assert [tuple(trial.params[f"level_{s:02d}"] for s in range(10)) for trial in complete] == [
        levels for levels, _ in asked
    ]
    assert all(trial.state.is_finished() for trial in strategy._study.trials)


def test_cmaes_learns_from_its_own_suggestions() -> None:
    """Each suggestion gets the score of the schedule that it was repaired to."""
    strategy = CmaEs(PAPER, seed=0)
    scores = []
    for _ in range(12):
        batch = strategy.ask()
        evaluations = answer(batch)
        scores += [evaluation.fitness for evaluation in evaluations]
        strategy.tell(evaluations)
    complete = [trial for trial in strategy._study.trials if trial.state == TrialState.COMPLETE]
    assert [trial.value for trial in complete] == scores
    suggested = [[trial.params[f"level_{s:02d}"] for s in range(10)] for trial in complete]
    assert not all(PAPER.is_feasible(levels) for levels in suggested)


def test_a_proposal_names_its_sampler_or_random() -> None:
    (proposal,) = OptunaSearch(PAPER, seed=0, sampler="RandomSampler").ask()
    assert proposal.origin == Origin("RandomSampler")
    space = SearchSpace.mean_sparsity(Stages.equal(3), 2, 0.5)
    strategy = OptunaSearch(space, seed=0, sampler="RandomSampler")
    asked = []
    while batch := strategy.ask():
        asked += batch
        strategy.tell(answer(batch))
    assert len({proposal.schedule for proposal in asked}) == len(asked) == 7
    assert {proposal.origin.operator for proposal in asked if proposal.origin} <= {"RandomSampler", "random"}


def test_another_sampler_takes_its_options() -> None:
    strategy = OptunaSearch(SPACES["small"], seed=0, sampler="NSGAIISampler", population_size=4)
    assert strategy.sampler == "NSGAIISampler"
    assert len(trace(strategy, n=10)) == 10
