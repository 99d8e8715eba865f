"""A device with room for few images at a time: whole runs find the same, in smaller calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Counting
from diffusers import DiTTransformer2DModel

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig, changed
from diffes.errors import DiffesError
from diffes.problems.workbench import prepare
from diffes.study.front import complete_front
from diffes.study.run import complete_run

ROWS = 6  # three images with guidance


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of all denoiser calls that were made; larger ones than `ROWS` find no room."""
    made: list[int] = []
    forward = DiTTransformer2DModel.forward

    def limited(self: DiTTransformer2DModel, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(latents) > ROWS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        made.append(len(latents))
        return forward(self, latents, *args, **kwargs)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", limited)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"), [("obs", {"cost": "macs", "budget": 0.6}), ("layer_drop", {"strategy": "mosaic"})]
)
def test_a_run_in_smaller_calls_finds_the_same(
    base: RunConfig, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, method: str, changes: Any
) -> None:
    config = replace(base, method=method, stages=2, probes=6, heldout=4, calibration_samples=70, **changes)
    small = complete_run(config, tmp_path / "small", Counting()).run
    assert max(calls) <= ROWS and calls.count(4) > 5
    monkeypatch.undo()
    large = complete_run(config, tmp_path / "large", Counting()).run
    for name in ("evaluations", "calibration_calls", "denoiser_calls", "found"):
        assert getattr(small, name) == getattr(large, name)
    assert small.searched.heldout_mean == pytest.approx(large.searched.heldout_mean, rel=1e-3)


def test_levels_are_timed_on_as_many_images_as_there_is_room_for(base: RunConfig, calls: list[int]) -> None:
    bench = prepare(replace(base, cost="latency", budget=1.0, probes=16), Counting())
    assert max(calls) == 4 and bench.costs[0][0] > 0


@pytest.mark.slow
def test_a_front_in_smaller_calls_finds_the_same(
    base: RunConfig, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reused stays with the images that it is of."""
    config = changed(base, genes="joint", nodes=6, method="obs+block_reuse", stages=2, probes=4, heldout=4, max_evals=4)
    config = replace(config, strategy="evolution", metric="latent_mse")
    small = complete_front(config, [2.0], tmp_path / "small", Counting())
    assert max(calls) <= ROWS
    monkeypatch.undo()
    large = complete_front(config, [2.0], tmp_path / "large", Counting())
    for one, other in zip(small.points, large.points, strict=True):
        same = {"kind", "timesteps", "levels", "calls_spent"}
        assert one.model_dump(include=same) == other.model_dump(include=same)
        assert one.heldout_mean == pytest.approx(other.heldout_mean, rel=1e-3)


def test_what_was_found_to_fit_is_known_from_then_on(tiny: ModelAdapter) -> None:
    asked: list[int] = []
    freed: list[int] = []

    def run(n: int) -> int:
        asked.append(n)
        if n > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return n

    assert tiny.within_room(run, 32, lambda: freed.append(len(asked))) == 4
    assert (asked, freed) == ([32, 32, 16, 8, 4], [1, 2, 3, 4])
    assert tiny.within_room(run, 64) == 4 and tiny.within_room(run, 3) == 3
    assert tiny.room == {"calls": 4} and tiny.within_room(lambda n: n, 32, what="gradients") == 32


def test_no_room_for_a_single_image_is_said(tiny: ModelAdapter) -> None:
    def full(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    with pytest.raises(DiffesError, match=r"no room for a single image .*allocate 20.00 GiB.*: choose --dtype float16"):
        tiny.within_room(full, 4)
