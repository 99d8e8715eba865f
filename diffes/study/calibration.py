"""What a search is calibrated on, and the bank that comes of it, as the settings of a run say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffes.adapters import ModelAdapter, model_folder
from diffes.errors import DiffesError
from diffes.files import write_safely
from diffes.pruning import make_method
from diffes.pruning.allocation import allocation_of
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import CalibrationSet, load_calibration, sample_calibration
from diffes.pruning.stage_file import read_stage, write_stage
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
        guidance=config.scale, seed=config.seed, allocation=config.allocation, only=only, progress=progress,
        memory=config.bank_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class Keep:
    """Where a run keeps what its calibration has finished, so that a killed one goes on with it.

    Args:
        begin: begins the run, if that was not done, and gives the folder; called when there is something to keep.
        resumes: whether something may be there already.
    """

    begin: Callable[[], Path]
    resumes: bool

    def stages(
        self, adapter: ModelAdapter, only: Sequence[int], make: Callable[[Sequence[int]], Iterable[WeightBank]]
    ) -> Iterator[WeightBank]:
        """Banks of single stages, those that are there first; what is damaged is made anew.

        Args:
            adapter: the dense model.
            only: numbers of the stages.
            make: makes banks of single stages.
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
        """Latents (n, C, h, w) from the `first` one on, read or made."""
        path = self._place(f"samples{first}.safetensors")
        if self.resumes and path.exists():
            with suppress(Exception):  # safetensors has an error class of its own; what is damaged is made anew
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
    """Images that were named, those that came with the model, or samples of the dense model."""
    if config.calibration_data is not None:
        path: Path | None = Path(config.calibration_data)
    else:
        home = model_folder(config.model)
        path = home / "calibration.npz" if home and (home / "calibration.npz").is_file() else None
    if path is not None:
        return load_calibration(adapter, path, config.calibration_samples)
    return sample_calibration(
        adapter, config.calibration_samples, n_steps=config.steps, guidance=config.scale, seed=HELDOUT_SEED + 1,
        keep=None if keep is None else keep.samples,
    )  # fmt: skip
