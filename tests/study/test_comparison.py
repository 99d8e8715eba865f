"""What is said of finished cells: paired by seed, only against what was measured alike, ties and failures named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diffes.search.schedule import Schedule, Stages
from diffes.study.comparison import Comparison
from diffes.study.config import RunConfig
from diffes.study.record import Candidate, RunRecord


def row(strategy: str, seed: int, heldout: float | None, **settings: Any) -> RunRecord:
    config = replace(RunConfig(), strategy=strategy, seed=seed, **settings)
    schedule = Schedule(Stages.equal(2), (1, 1), 2)
    candidate = Candidate(20, (1, 1), heldout, 0.0, 0.5, 0.5, 1.0)
    rival = replace(candidate, heldout_mean=1.0)
    return RunRecord(
        config.to_json(), {}, schedule, candidate, rival, replace(rival, levels=None), 1, 1, 1.0, ((1, 1.0),)
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
    assert "| 1 of 3, 1 tied |" in comparison.markdown() and "| 0 of 3, 3 tied |" in comparison.markdown()


def test_only_what_was_measured_alike_is_compared_and_failures_are_left_out() -> None:
    rows = [row("evolution", seed, 1.0 + seed) for seed in range(3)]
    rows += [row("tpe", 0, 2.0), row("tpe", 1, None), row("tpe", 2, 0.0)]
    rows += [row("random", seed, -5.0, metric="latent_mse") for seed in range(3)]
    first, second, third = Comparison(("strategy", "metric"), tuple(rows)).summary()
    assert (second["failed"], second["ahead"], second["heldout_mean"]) == (1, 1, 1.0)
    assert third["ahead"] is None and third["p"] is None and first["failed"] == 0
    assert "failed" in Comparison(("strategy",), (row("evolution", 0, None),)).markdown()
