"""What is said of finished cells: paired by seed, only against what was measured alike, ties and failures named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diffes.config import RunConfig
from diffes.results.record import FEWER_STEPS, UNIFORM, Candidate, RunRecord
from diffes.spaces.schedule import Schedule, Stages
from diffes.study.comparison import Comparison, holm
from diffes.study.equal_cost import calls_of, config_of


def row(strategy: str, seed: int, heldout: float | None, **settings: Any) -> RunRecord:
    config = replace(RunConfig(genes="levels").resolved(), strategy=strategy, seed=seed, **settings)
    schedule = Schedule(Stages.equal(2), (1, 1), 2)
    candidate = Candidate(20, (1, 1), heldout, 0.0, 0.5, 0.5, 1.0)
    rival = replace(candidate, heldout_mean=1.0)
    return RunRecord(
        config.to_json(),
        {},
        schedule,
        candidate,
        {UNIFORM: rival, FEWER_STEPS: replace(rival, levels=None)},
        1,
        1,
        1.0,
        ((1, 1.0),),
    )


def test_the_test_is_paired_by_seed() -> None:
    """Six seeds, always ahead by a little, between seeds that differ by much: p is the smallest possible, 2 / 2^6."""
    rows = [row("evolution", seed, seed * 10.0) for seed in range(6)]
    rows += [row("tpe", seed, seed * 10.0 + 0.1 + seed / 100) for seed in reversed(range(6))]
    first, second = Comparison(("strategy",), tuple(rows)).summary()
    assert first["p"] is None and first["ahead"] is None
    assert second["p"] == pytest.approx(2 / 2**6) and second["ahead"] == 6


def test_a_tie_is_said_to_be_one() -> None:
    rows = [row("evolution", seed, float(seed)) for seed in range(3)]
    rows += [row("tpe", 0, 0.0), row("tpe", 1, 1.5), row("tpe", 2, 1.0)]
    rows += [row("random", seed, float(seed)) for seed in range(3)]
    comparison = Comparison(("strategy",), tuple(rows))
    _, tpe, twin = comparison.summary()
    assert (tpe["ahead"], tpe["tied"]) == (1, 1)
    assert (twin["ahead"], twin["tied"], twin["p"]) == (0, 3, None)
    assert twin["difference_low"] == twin["difference"] == twin["difference_high"] == 0
    assert "| 1 of 3, 1 tied |" in comparison.markdown() and "| 0 of 3, 3 tied |" in comparison.markdown()


def test_only_what_was_measured_alike_is_compared_and_failures_are_left_out() -> None:
    rows = [row("evolution", seed, 1.0 + seed) for seed in range(3)]
    rows += [row("tpe", 0, 2.0), row("tpe", 1, None), row("tpe", 2, 0.0)]
    rows += [row("random", seed, -5.0, metric="latent_mse") for seed in range(3)]
    first, second, third = Comparison(("strategy", "metric"), tuple(rows)).summary()
    assert (second["failed"], second["ahead"], second["heldout_mean"]) == (1, 1, 1.0)
    assert third["ahead"] is None and third["p"] is None and first["failed"] == 0
    assert "failed" in Comparison(("strategy",), (row("evolution", 0, None),)).markdown()


def test_a_table_for_the_terminal_has_short_numbers_and_says_once_what_is_the_same_for_all() -> None:
    rows = [row("evolution", seed, 0.5 + 0.01 * seed) for seed in range(3)] + [
        row("tpe", seed, 0.6) for seed in range(3)
    ]
    comparison = Comparison(("strategy",), tuple(rows))
    assert comparison.same_rivals() == {UNIFORM: "1.0000", FEWER_STEPS: "1.0000 (50.0%)"}
    head, body = comparison.table(brief=True)
    assert not {UNIFORM, FEWER_STEPS} & set(head) and body[0][:2] == ["evolution", ".5100 ± .01000"]
    whole, _ = comparison.table()
    assert {UNIFORM, FEWER_STEPS} <= set(whole)
    rows[3] = replace(rows[3], rivals={UNIFORM: replace(rows[3].searched, heldout_mean=4.0)})
    assert UNIFORM not in Comparison(("strategy",), tuple(rows)).same_rivals()


def test_rounding_is_no_lead_and_pairs_are_counted() -> None:
    rows = [row("evolution", seed, 0.99) for seed in range(4)]
    rows += [row("tpe", seed, 0.99 * (1 + 1e-9)) for seed in range(3)] + [row("tpe", 3, None)]
    _, tpe = Comparison(("strategy",), tuple(rows)).summary()
    assert (tpe["ahead"], tpe["tied"], tpe["pairs"], tpe["p"]) == (0, 3, 3, None)


def test_differences_have_an_interval_and_p_is_corrected_for_their_number() -> None:
    """The interval of 0.1, 0.2, 0.3 by hand: 0.2 plus or minus 4.3027 * 0.1 / sqrt(3)."""
    rows = [row("evolution", seed, float(seed)) for seed in range(3)]
    rows += [row("tpe", seed, seed + 0.1 * (seed + 1)) for seed in range(3)]
    rows += [row("random", seed, seed - 1.0 - seed / 10) for seed in range(3)]
    comparison = Comparison(("strategy",), tuple(rows))
    first, tpe, random = comparison.summary()
    assert tpe["difference"] == pytest.approx(0.2)
    assert [tpe["difference_low"], tpe["difference_high"]] == pytest.approx([0.2 - 0.2484, 0.2 + 0.2484], abs=1e-4)
    assert (tpe["p"], tpe["p_holm"]) == (random["p"], random["p_holm"]) == (0.25, 0.5)
    assert first["difference"] is None and first["p_holm"] is None
    assert "| +0.2000 [-0.0484, +0.4484] | 0.500 |" in comparison.markdown()


def test_holm_is_step_down() -> None:
    """Four p values, by hand: 4 x .01, then 3 x .02, then 2 x .02 which stays at .06, then .9."""
    assert holm([0.02, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.6, 0.5]) == [1, 1] and holm([]) == []


def found(stages: int, seed: int, cost: float, heldout: float, budget: float = 0.55) -> RunRecord:
    made = row("evolution", seed, heldout, stages=stages, budget=budget, cost="macs")
    candidate = replace(made.searched, macs_fraction=cost, cost=cost)
    rivals = {**made.rivals, UNIFORM: candidate}
    return replace(made, searched=candidate, rivals=rivals, curve=((5, heldout - 0.1), (9, heldout)))


def test_what_costs_something_else_is_interpolated_or_not_compared() -> None:
    cheap = [found(2, seed, 0.52, 0.7 + seed / 100) for seed in range(2)]
    exact = [found(5, seed, 0.549, 0.8) for seed in range(2)]
    bare = Comparison(("stages",), (*cheap, *exact))
    assert bare.to_interpolate() == cheap
    first, second = bare.summary()
    assert second["same_cost"] is False and second["ahead"] is None and second["p"] is None
    assert "other cost" in bare.markdown() and "not compared" in bare.markdown()
    above = [replace(r, above=found(2, i, 0.58, 0.9, budget=0.61)) for i, r in enumerate(cheap)]
    whole = Comparison(("stages",), (*above, *exact))
    assert whole.to_interpolate() == []
    first, second = whole.summary()
    assert first["cost"] == first["macs"] == pytest.approx(0.55) and first["between"] == pytest.approx([0.52, 0.58])
    assert first["heldout_mean"] == pytest.approx((0.8 + 0.805) / 2) == first["rivals"][UNIFORM]["heldout_mean"]
    assert second["same_cost"] and second["between"] is None and (second["ahead"], second["tied"]) == (0, 1)
    assert "| 55.0% (52.0%, 58.0%) |" in whole.markdown()
    (calls, best) = zip(*whole.measured()[2,][0].curve, strict=True)
    assert calls == (5, 9) and best == pytest.approx((0.7, 0.8))


def test_those_alike_in_cost_are_compared_as_they_are() -> None:
    records = [found(stages, 0, 0.52 + 0.001 * (stages == 5), 0.8) for stages in (2, 5)]
    comparison = Comparison(("stages",), tuple(records))
    assert comparison.to_interpolate() == [] and comparison.summary()[1]["same_cost"]


def test_different_budgets_are_not_compared() -> None:
    records = [found(2, 0, 0.5, 0.7, budget=0.5), found(2, 0, 0.55, 0.8)]
    assert [line["ahead"] for line in Comparison(("budget",), tuple(records)).summary()] == [None, None]


def test_searches_that_had_nothing_left_to_ask_are_marked() -> None:
    short = row("uniform", 0, 0.9, max_calls=10)
    text = Comparison(
        ("strategy",), (short, replace(short, settings=row("tpe", 0, 0.9, max_calls=1).settings))
    ).markdown()
    assert "| 1* |" in text and "| 1 |" in text and "nothing left to ask" in text


def test_unequal_effort_is_said_and_a_range_of_guidance_is_a_value_like_others() -> None:
    rows = [row("random", 0, 0.5), row("random", 0, 0.6, max_evals=9)]
    text = Comparison(("strategy", "max_evals"), tuple(rows)).markdown()
    assert "Rows that differ in max_evals were searched with unequal effort." in text
    ranged = replace(rows[0], settings={**rows[0].settings, "guidance": [1.5, 4.0]})
    assert len(Comparison(("guidance",), (rows[0], ranged)).summary()) == 2


def test_the_final_fit_is_no_part_of_what_a_search_spends() -> None:
    done = row("random", 0, 0.5)
    allowed = calls_of(config_of(done.settings))
    for spent, exhausted in ((allowed - 1, True), (allowed, False)):
        record = replace(done, denoiser_calls=10 * allowed, curve=((spent, 0.5),))
        assert [line["exhausted"] for line in Comparison(("strategy",), (record,)).summary()] == [exhausted]
