"""A calibrated model: what its budget counts, what measures its searches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from conftest import Counting

from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.measure.currencies import CURRENCIES, Calls, Currency, macs_fraction
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.problems.checks import are_known_elsewhere
from diffes.problems.workbench import Workbench, prepare, vary, workbench
from diffes.pruning import METHODS
from diffes.solvers import SOLVERS
from diffes.spaces.schedule import Schedule
from diffes.spaces.strategy import Evaluation, Evaluator


def test_budgets_in_macs_and_latency(base: RunConfig) -> None:
    """What is found costs at most the budget, counted over the whole network."""
    bench = prepare(replace(base, cost="macs", budget=0.7), Counting())
    space = bench.space
    levels = space.uniform()
    assert 0.6 < macs_fraction(bench.router, space.schedule(levels), space.steps) <= 0.7001
    with pytest.raises(DiffesError, match=r"fraction of the dense cost in \[0\.\d+, 1\], got 0.01"):
        prepare(replace(base, cost="macs", budget=0.01), Counting())
    timed = prepare(replace(base, cost="latency", budget=1.0), Counting())
    assert all(len(row) == 5 and min(row) > 0 for row in timed.costs)
    assert prepare(replace(base, cost="latency", budget=1.0), Counting(), timed.costs).space == timed.space


def falling(schedules: Sequence[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
    """An evaluator that no model has: the more the first stage loses, the better."""
    return [Evaluation(s, float(1000 + s.levels[0]), 7, 0.1, fidelity) for s in schedules]


def test_a_factory_makes_what_measures_searches_and_toolboxes(bench: Workbench) -> None:
    made: list[Workbench] = []

    def factory(each: Workbench) -> Evaluator:
        made.append(each)
        return falling

    mine = replace(bench, make_evaluator=factory)
    result = mine.search("random", progress=Counting(), max_evals=5, seed=3)
    assert [e.fitness for e in result.evaluations] == [1000.0 + e.schedule.levels[0] for e in result.evaluations]
    assert result.denoiser_calls == 5 * 7
    assert made[0].config.seed == 3 and made[0].router is bench.router
    toolbox = mine.toolbox()
    assert toolbox.evaluate(mine.uniform().levels) == (1000.0 + mine.uniform().levels[0],)
    assert len(made) == 2
    other = vary(mine, replace(mine.config, budget=0.25), Counting())
    assert other.search("uniform", progress=Counting()).best.fitness >= 1000


def test_a_search_tells_of_every_evaluation_and_stops_at_its_limit_in_time(bench: Workbench) -> None:
    mine = replace(bench, make_evaluator=lambda _: falling)
    seen: list[Evaluation] = []
    result = mine.search("random", progress=Counting(), max_evals=50, time_limit=0.55, on_evaluation=seen.append)
    assert seen == list(result.evaluations)
    assert len(seen) == 6  # of 0.1 s each


def test_without_one_the_searchs_own_probes_measure(bench: Workbench) -> None:
    evaluator = bench.search_evaluator()
    assert isinstance(evaluator, ScheduleEvaluator)
    expected = bench.adapter.make_probes(4, bench.config.seed, "search")
    assert evaluator.probes.seeds == expected.seeds
    assert evaluator.probes.conditions == expected.conditions


@pytest.fixture
def halves() -> Iterator[str]:
    """A currency of one's own: each level halves the cost of a call, in the cleanest stage it costs nothing more."""

    @CURRENCIES.register("halves")
    class Halves(Currency):
        def table(self, calls: Calls) -> list[list[float]]:
            assert len(calls.probes) == 4
            return [[(s + 1) * 0.5**level for level in range(calls.max_level + 1)] for s in range(len(calls.stages))]

    yield "halves"
    CURRENCIES.unregister("halves")


def test_a_budget_may_be_counted_in_a_currency_of_ones_own(bench: Workbench, base: RunConfig, halves: str) -> None:
    table = [[(s + 1) * 0.5**level for level in range(5)] for s in range(4)]
    progress = Counting()
    for mine in (
        prepare(replace(base, cost=halves, budget=0.4), progress),
        vary(bench, replace(base, cost=halves, budget=0.4), progress),
    ):
        assert mine.costs == table
        best = mine.search("random", progress=Counting(), max_evals=8).best.schedule
        shares = [row[level] for row, level in zip(table, best.levels, strict=True)]
        assert sum(shares) <= 0.4 * sum(row[0] for row in table) + 1e-6
    assert progress.titles.count("halves by level") == 2
    assert vary(mine, replace(mine.config, seed=1), progress).costs is mine.costs


def test_an_unknown_currency_names_the_nearest(bench: Workbench, base: RunConfig) -> None:
    unknown = replace(base, cost="mac")
    with pytest.raises(DiffesError, match=r"unknown cost 'mac'\. Did you mean 'macs'"):
        prepare(unknown, Counting())
    with pytest.raises(DiffesError, match=r"unknown cost 'mac'\. Did you mean 'macs'"):
        vary(bench, unknown, Counting())


def test_the_profile_and_the_damage_are_those_of_the_settings(bench: Workbench) -> None:
    profile, damage = bench.profile(), bench.sensitivity()
    assert len(profile.loss) == len(damage) == 4
    expected = bench.evaluator(4, bench.config.seed).scores(bench.space.any_schedule([0, 2, 0, 0])).mean()
    assert damage[1][2] == pytest.approx(-float(expected))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(DiffesError, match=r"unknown setting 'stage'\. Did you mean .*'stages'"):
        workbench(Counting(), stage=3)


def test_a_bench_with_another_metric_measures_by_it(bench: Workbench) -> None:
    other = bench.with_metric("latent_cosine")
    assert other.metric.name == other.config.metric == "latent_cosine"
    (found,) = other.search_evaluator()([bench.uniform()])
    assert -1 <= found.fitness < 1
    assert bench.metric.name == "latent_mse"


class _Nobody:
    """Workers that must not be asked for a bank."""

    def banks(self, *_: object) -> Iterator[object]:
        raise AssertionError("workers do not know this method")


def test_workers_are_not_asked_for_what_only_this_process_knows(base: RunConfig) -> None:
    config = replace(base, method="obs")
    METHODS.register("mine")(type("Mine", (METHODS.get("obs"),), {}))
    try:
        assert not are_known_elsewhere(replace(config, method="mine+layer_drop"))
        mine = prepare(replace(config, method="mine"), Counting(), pool=_Nobody())  # type: ignore[arg-type]
        assert sorted(mine.router.bank) == sorted(prepare(config, Counting()).router.bank)
    finally:
        METHODS.unregister("mine")
    assert are_known_elsewhere(replace(config, method="obs+layer_drop"))
    SOLVERS.register("mine")(type("Mine", (SOLVERS.get("ddim"),), {}))
    try:
        planned = replace(config, genes="joint", cost="macs", budget=None, solver="mine")
        assert not are_known_elsewhere(planned)
        with pytest.raises(DiffesError, match="solver 'mine' is registered in this process only"):
            prepare(planned, Counting(), pool=_Nobody())  # type: ignore[arg-type]
    finally:
        SOLVERS.unregister("mine")
