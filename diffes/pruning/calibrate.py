"""Calibration data of a run, and the bank that is built from them, as the settings say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.config import HELDOUT_SEED, RunConfig
from diffes.errors import DiffesError
from diffes.files import write_safely
from diffes.pruning import make_method
from diffes.pruning.allocation import by_sensitivity
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import CalibrationSet, load_calibration, sample_calibration
from diffes.pruning.stage_file import read_stage, write_stage
from diffes.spaces.schedule import Stages


def uses_data(config: RunConfig) -> bool:
    """Check whether a bank is built from measurements, so that each of its stages takes a while."""
    method = make_method(config.method)
    return method.needs_data or by_sensitivity(method.kind, config.allocation)


def bank_of(
    config: RunConfig,
    adapter: ModelAdapter,
    stages: Stages,
    only: Sequence[int],
    data: CalibrationSet | None,
    progress: Callable[[int], None] | None = None,
) -> WeightBank:
    """Build the bank of some stages. Each stage is independent of the others.

    Args:
        config: the settings.
        adapter: the dense model.
        stages: their ranges of timesteps.
        only: numbers of the stages to prune.
        data: result of `calibration_of`; None if `uses_data` is false.
        progress: called with the number of each finished stage.
    """
    return build_bank(
        adapter, make_method(config.method), stages, data,
        guidance=config.scale, seed=config.seed, allocation=config.allocation, only=only, progress=progress,
        memory=config.bank_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class Keep:
    """Store of the finished parts of a calibration, so that a killed run can continue from them.

    Args:
        begin: begins the run, unless it has begun, and returns the folder; called when the folder is first needed.
        resumes: whether the folder may hold parts from an earlier process.
    """

    begin: Callable[[], Path]
    resumes: bool

    def stages(
        self, adapter: ModelAdapter, only: Sequence[int], make: Callable[[Sequence[int]], Iterable[WeightBank]]
    ) -> Iterator[WeightBank]:
        """Yield the banks of single stages, the stored ones first. Build missing and damaged ones.

        Args:
            adapter: the dense model.
            only: numbers of the stages.
            make: builds the banks of the given stages, one by one.
        """
        missing = list(only)
        for stage in only if self.resumes else ():
            try:
                bank = read_stage(self._file(stage), adapter)
            except DiffesError:
                continue
            missing.remove(stage)
            yield bank
        for bank in make(missing) if missing else ():
            path = self._file(min(bank)[0])
            write_stage(path, bank, adapter)
            yield read_stage(path, adapter)

    def samples(self, first: int, make: Callable[[], Tensor]) -> Tensor:
        """Return latents (n, C, h, w), from sample number `first` on. Read them, or make and store them."""
        path = self._place(f"samples{first}.safetensors")
        if self.resumes and path.exists():
            with suppress(Exception):  # safetensors has its own error class; a damaged file is made again
                return load_file(path)["latents"]
        made = make()
        write_safely(path, lambda partial: save_file({"latents": made.cpu().contiguous()}, partial))
        return made

    def _file(self, stage: int) -> Path:
        return self._place(f"stage{stage}.json")

    def _place(self, name: str) -> Path:
        folder = self.begin()
        folder.mkdir(exist_ok=True)
        return folder / name


def calibration_of(config: RunConfig, adapter: ModelAdapter, keep: Keep | None = None) -> CalibrationSet:
    """Return the calibration data: the images in the settings, else those of the model, else dense samples."""
    if config.calibration_data is not None:
        path: Path | None = Path(config.calibration_data)
    else:
        home = adapter.folder
        path = home / "calibration.npz" if home and (home / "calibration.npz").is_file() else None
    if path is not None:
        return load_calibration(adapter, path, config.calibration_samples)
    return sample_calibration(
        adapter, config.calibration_samples, n_steps=config.steps, guidance=config.scale, seed=HELDOUT_SEED + 1,
        keep=None if keep is None else keep.samples,
    )  # fmt: skip
