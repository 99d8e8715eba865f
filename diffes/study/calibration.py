"""What a search is calibrated on, and the bank that comes of it, as the settings of a run say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffes.adapters import ModelAdapter, model_folder
from diffes.pruning import make_method
from diffes.pruning.allocation import allocation_of
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import CalibrationSet, load_calibration, sample_calibration
from diffes.search.schedule import Stages
from diffes.study.config import RunConfig
from diffes.study.heldout import HELDOUT_SEED


def uses_data(config: RunConfig) -> bool:
    """Whether anything is measured for a bank, so that each of its stages takes a while."""
    method = make_method(config.method)
    return method.needs_data or allocation_of(method.kind, config.allocation) == "damage"


def bank_of(
    config: RunConfig,
    adapter: ModelAdapter,
    stages: Stages,
    only: Sequence[int],
    data: CalibrationSet | None,
    progress: Callable[[int], None] | None = None,
) -> WeightBank:
    """The bank of some stages, each of which depends on no other.

    Args:
        config: the settings.
        adapter: the dense model.
        stages: their ranges of timesteps.
        only: numbers of the stages to prune.
        data: of `calibration_of`; None where `uses_data` says so.
        progress: told the stage after each.
    """
    return build_bank(
        adapter, make_method(config.method), stages, data,
        guidance=config.guidance, seed=config.seed, allocation=config.allocation, only=only, progress=progress,
        memory=config.bank_bytes,
    )  # fmt: skip


def calibration_of(config: RunConfig, adapter: ModelAdapter) -> CalibrationSet:
    """Images that were named, those that came with the model, or samples of the dense model."""
    if config.calibration_data is not None:
        path: Path | None = Path(config.calibration_data)
    else:
        home = model_folder(config.model)
        path = home / "calibration.npz" if home and (home / "calibration.npz").is_file() else None
    if path is not None:
        return load_calibration(adapter, path, config.calibration_samples)
    return sample_calibration(
        adapter, config.calibration_samples, n_steps=config.steps, guidance=config.guidance, seed=HELDOUT_SEED + 1
    )
