"""Worker in its own process, with the model, a bank and an evaluator."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from diffes.adapters import adapter_for, load_pipeline
from diffes.config import RunConfig
from diffes.measure.evaluator import RoutedEvaluator
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import gathered
from diffes.pruning.calibrate import bank_of, calibration_of, uses_data
from diffes.pruning.calibration import CalibrationSet
from diffes.runtime.apply import pick_device
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.strategy import Rows
from diffes.workers.cluster import the_ray
from diffes.workers.packing import unpacked

NAMED = ("model", "prompts", "call", "calibration_data")  # settings that may be paths


class Worker:
    """Worker in its own process. Everything that it keeps can be sent again, so that a new worker can replace it.

    Args:
        config: the settings; the model is loaded as they say.
        threads: torch threads, the same in all workers.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # no code writes to it
        device = pick_device(config.device)
        device = "cuda" if device.startswith("cuda") else device  # Ray shows each worker only its own GPUs
        pipe = load_pipeline(config.model, device=device, dtype=getattr(torch, config.dtype))
        pipe.set_progress_bar_config(disable=True)
        self._adapter = adapter_for(pipe)
        self._adapter.configure(config.prompts, config.call)
        self._config = config
        self._data: CalibrationSet | None = None
        self._bank = ""  # Ray's id of the bank of the router
        self._router: Router | None = None
        self._evaluator: RoutedEvaluator | None = None

    def ready(self) -> None:
        """Return once the model is loaded."""

    def calibrate(self, stages: Stages, stage: int) -> WeightBank:
        """Build the bank of one stage, which is independent of the others.

        It is returned unpacked, so that the receiver copies it: memory that Ray maps is gone when Ray ends.
        """
        if self._data is None and uses_data(self._config):
            self._data = calibration_of(self._config, self._adapter)
        return bank_of(self._config, self._adapter, stages, [stage], self._data)

    def attach(self, bank: list[Any], sent: list[Any] | None = None) -> None:
        """Get ready to measure, with a bank and an evaluator in place of earlier ones.

        Args:
            bank: list of one reference to a packed bank, so that the bank is fetched only once.
            sent: list of one reference to the packed `evaluator.detached()` and a function that makes its metric; left
                out if no evaluator is needed.
        """
        name = bank[0].hex()
        self._evaluator = None
        if self._router is None or name != self._bank:
            self._router = None  # there may be no memory for two banks
            found = unpacked(the_ray().get(bank[0]))
            found = gathered(self._adapter, [found], self._config.bank_bytes, held=False)
            self._bank, self._router = name, Router(self._adapter, found, resident=self._config.bank_bytes)
        if sent is None:
            return
        detached, recipe = the_ray().get(sent[0])
        self._evaluator = unpacked(detached).attached(self._router, recipe(self._adapter.device))

    def measure(self, schedule: Schedule, fidelity: float) -> tuple[float, int, float, Rows | None]:
        """Measure a schedule on a fraction of the probes.

        Returns:
            Fitness, denoiser calls that were run for it, seconds, and the coefficients that were fitted for it.

        Raises:
            DiffesError: the device has no memory for a single probe.
        """
        evaluator = self._evaluator
        assert evaluator is not None
        start, before = time.perf_counter(), evaluator.paid_calls
        fitness, rows = evaluator.measured(schedule, fidelity)
        return fitness, evaluator.paid_calls - before, time.perf_counter() - start, rows


class CausedError(Exception):
    """Error that carries an error and its cause as arguments, because Ray loses the cause."""
