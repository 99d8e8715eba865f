"""Held-out scores: from probes that no search draws, each candidate measured once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffes.adapters.text_to_image import TextToImageAdapter
from diffes.config import HELDOUT_SEED
from diffes.measure.quality import finite
from diffes.problems.heldout import HeldOut
from diffes.problems.workbench import Workbench
from diffes.spaces.schedule import Schedule


def prompts_of(bench: Workbench) -> dict[str, list[str]]:
    assert isinstance(bench.adapter, TextToImageAdapter)
    return bench.adapter.prompts


def test_probes_are_of_the_heldout_split(prompted: Workbench) -> None:
    probes = HeldOut(prompted).evaluator.probes
    prompts = prompts_of(prompted)
    assert sorted(map(str, probes.conditions)) == sorted(prompts["heldout"])
    assert not set(prompts["heldout"]) & set(prompts["search"])


def test_a_search_measures_on_prompts_of_its_own(prompted: Workbench) -> None:
    probes = prompted.evaluator(6, 0).probes
    assert sorted(map(str, probes.conditions)) == sorted(prompts_of(prompted)["search"])


def test_noise_is_that_of_no_search(bench: Workbench) -> None:
    seeds = HeldOut(bench).evaluator.probes.seeds
    assert seeds == bench.adapter.make_probes(4, HELDOUT_SEED, "heldout").seeds
    assert not set(seeds) & set(bench.evaluator(4, bench.config.seed).probes.seeds)


def test_a_schedule_is_scored_against_the_dense_model_on_them(prompted: Workbench) -> None:
    """The oracle runs the routed sampling loop itself."""
    adapter, schedule = prompted.adapter, prompted.uniform()
    probes = adapter.make_probes(6, HELDOUT_SEED, "heldout")
    dense = adapter.sample(probes, 4, prompted.config.scale)
    with prompted.router.routed(schedule):
        routed = adapter.sample(probes, 4, prompted.config.scale)
    scores = -(routed - dense).square().flatten(1).mean(1).double()
    found = HeldOut(prompted)(schedule, search=0.5)
    assert found.heldout_mean == pytest.approx(float(scores.mean()), rel=1e-4)
    assert found.heldout_std == pytest.approx(float(scores.std()), rel=1e-4)
    assert (found.steps, found.levels, found.search) == (4, schedule.levels, 0.5)
    assert found.nominal_sparsity == pytest.approx(0.5)
    assert found.macs_fraction == prompted.macs_fraction(schedule)


def test_the_dense_model_at_fewer_steps_is_a_candidate(bench: Workbench) -> None:
    heldout = HeldOut(bench)
    found = heldout(2)
    scores = heldout.evaluator.dense_scores(2)
    assert found.heldout_mean == float(scores.mean()) < 0
    assert (found.steps, found.levels, found.nominal_sparsity, found.macs_fraction) == (2, None, 0.0, 0.5)
    assert heldout(4).heldout_mean == 0


def test_each_candidate_is_measured_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout, asked = HeldOut(bench), list[Schedule]()
    scores = heldout.evaluator.scores

    def counted(schedule: Schedule) -> torch.Tensor:
        asked.append(schedule)
        return scores(schedule)

    monkeypatch.setattr(heldout.evaluator, "scores", counted)
    first, second = heldout(bench.uniform(), 1.0), heldout(bench.uniform(), 2.0)
    assert len(asked) == 1
    assert first == replace(second, search=1.0)


def test_benches_that_measure_alike_share_one(bench: Workbench) -> None:
    heldout, config = bench.heldout(), bench.config
    assert replace(bench, config=replace(config, seed=5, budget=0.3)).heldout() is heldout
    assert replace(bench, config=replace(config, heldout=5)).heldout() is not heldout
    assert bench.with_metric("latent_cosine").heldout() is not heldout


def test_a_failed_probe_has_no_score() -> None:
    assert (finite(-float("inf")), finite(float("nan")), finite(0.5)) == (None, None, 0.5)
