"""What runs in a process of its own: the model, a bank, an evaluator."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from diffes.adapters import adapter_for, load_pipeline
from diffes.measure.evaluator import RoutedEvaluator
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import gathered
from diffes.pruning.calibration import CalibrationSet
from diffes.runtime.apply import pick_device
from diffes.runtime.router import Router
from diffes.search.schedule import Schedule, Stages
from diffes.search.strategy import Rows
from diffes.study.calibration import bank_of, calibration_of, uses_data
from diffes.study.config import RunConfig
from diffes.study.workers.cluster import the_ray
from diffes.study.workers.packing import unpacked

NAMED = ("model", "prompts", "calibration_data")  # settings that may be paths


class Worker:
    """What runs in a process of its own. It keeps nothing that it could not be given again, so that any other can take
    the place of one that died.

    Args:
        config: the settings; the model is loaded as they say.
        threads: of torch, the same in all.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        device = pick_device(config.device)
        device = "cuda" if device.startswith("cuda") else device  # Ray shows each worker its own GPUs alone
        pipe = load_pipeline(config.model, device=device, dtype=getattr(torch, config.dtype))
        pipe.set_progress_bar_config(disable=True)
        self._adapter = adapter_for(pipe)
        if config.prompts is not None:
            self._adapter.use_prompts(Path(config.prompts))
        self._config = config
        self._data: CalibrationSet | None = None
        self._bank = ""  # the name that Ray gave the bank of the router
        self._router: Router | None = None
        self._evaluator: RoutedEvaluator | None = None

    def ready(self) -> None:
        """Returns once the model is loaded."""

    def calibrate(self, stages: Stages, stage: int) -> WeightBank:
        """The bank of one stage, which depends on no other. It is copied: what Ray maps goes when Ray does."""
        if self._data is None and uses_data(self._config):
            self._data = calibration_of(self._config, self._adapter)
        return bank_of(self._config, self._adapter, stages, [stage], self._data)

    def attach(self, bank: list[Any], sent: list[Any] | None = None) -> None:
        """Gets ready to measure, with a bank and an evaluator in place of those before.

        Args:
            bank: `packed`, as a list of one reference, so that it is fetched once.
            sent: what `evaluator.detached()` gave, packed, and a recipe of its metric, likewise; left out, none is
                needed.
        """
        name = bank[0].hex()
        self._evaluator = None
        if self._router is None or name != self._bank:
            self._router = None  # there may be no room for two
            found = unpacked(the_ray().get(bank[0]))
            found = gathered(self._adapter, [found], self._config.bank_bytes, held=False)
            self._bank, self._router = name, Router(self._adapter, found, resident=self._config.bank_bytes)
        if sent is None:
            return
        detached, recipe = the_ray().get(sent[0])
        self._evaluator = unpacked(detached).attached(self._router, recipe(self._adapter.device))

    def measure(self, schedule: Schedule, fidelity: float) -> tuple[float, int, float, Rows | None]:
        """Fitness of a schedule on a fraction of the probes, denoiser calls that were run for it, seconds, and the
        coefficients that were fitted for it.

        Raises:
            DiffesError: the device has no room for a single probe.
        """
        evaluator = self._evaluator
        assert evaluator is not None
        start, before = time.perf_counter(), evaluator.paid_calls
        fitness, rows = evaluator.measured(schedule, fidelity)
        return fitness, evaluator.paid_calls - before, time.perf_counter() - start, rows


class CausedError(Exception):
    """An error and what it was raised from, which Ray loses; both are its arguments."""
