"""Settings are refused before the long part, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.measure.metrics import METRICS, make_metric
from diffes.problems.checks import check_settings, operators_of, try_metric
from diffes.spaces.strategy import STRATEGIES, Evaluation, Proposal, Strategy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost": "latencie"}, "unknown cost 'latencie'. Did you mean 'latency'.* Known: .*level.*macs"),
        ({"metric": "latent_mes"}, "unknown metric 'latent_mes'. Did you mean 'latent_mse'"),
        ({"strategy": "evolve"}, "unknown strategy 'evolve'. Did you mean .*'evolution'"),
        ({"strategy": "evolution:moo=4"}, "moo"),
        ({"mutation": "swap_stage"}, "unknown mutation 'swap_stage'. Did you mean 'swap_stages'"),
        ({"crossover": "deap.cxTwoPint"}, "unknown crossover.*'deap.cxTwoPoint'"),
        ({"strategy": "random", "mutation": "swap_stages"}, "'random' takes no mutation; leave --mutation swap_stages"),
        ({"strategy": "evopress", "crossover": "level_exchange"}, "takes no crossover"),
    ],
)
def test_unknown_names_and_options_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        check_settings(RunConfig(genes="levels", **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_the_strategies_that_ship_pass(strategy: str) -> None:
    check_settings(RunConfig(genes="levels", strategy=strategy))


def test_operators_are_those_that_were_named() -> None:
    config = RunConfig(strategy="nsga2")
    assert operators_of(config) == {}
    named = replace(config, mutation="level_step", crossover="deap.cxUniform:indpb=0.5")
    assert operators_of(named) == {"mutation": "level_step", "crossover": "deap.cxUniform:indpb=0.5"}


def test_a_strategy_that_needs_what_nobody_provides_is_refused() -> None:
    @STRATEGIES.register("wishful")
    class Wishful(Strategy):
        needs = ("oracle",)

        def _ask(self) -> list[Proposal]:
            return []

        def _tell(self, evaluations: Sequence[Evaluation]) -> None: ...

    try:
        with pytest.raises(DiffesError, match="'wishful' needs oracle, which no run provides; known: profile"):
            check_settings(RunConfig(strategy="wishful"))
    finally:
        STRATEGIES.unregister("wishful")


def test_a_metric_is_tried_on_what_the_model_makes(tiny: ModelAdapter) -> None:
    for name in ("latent_mse", "psnr"):
        try_metric(make_metric(name, tiny.device), tiny)
    METRICS.register("fussy")(lambda outputs, references: outputs.view(1))
    try:
        with pytest.raises(DiffesError, match=r"'fussy' failed \(RuntimeError: .+ a tensor of 2 scores"):
            try_metric(make_metric("fussy", tiny.device), tiny)
    finally:
        METRICS.unregister("fussy")
