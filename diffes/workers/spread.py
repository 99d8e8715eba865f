"""Evaluators on the workers of a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from diffes.measure.evaluator import RoutedEvaluator, in_trie_order
from diffes.measure.metrics import METRICS, Metric, make_metric
from diffes.plugins import guarded
from diffes.spaces.schedule import Schedule
from diffes.spaces.strategy import Evaluation
from diffes.workers.packing import packed

if TYPE_CHECKING:
    from diffes.workers.pool import Pool


class Spread:
    """Evaluator on the workers of a pool. It counts denoiser calls as the evaluator of this process would.

    Args:
        pool: the workers.
        local: the evaluator of this process; it counts calls, and measures nothing.
    """

    def __init__(self, pool: Pool, local: RoutedEvaluator) -> None:
        self._pool, self._local = pool, local
        name = local.metric.name
        recipe: Callable[[torch.device], Metric] = partial(make_metric, name)
        if name in METRICS.names() and not METRICS.is_known_elsewhere(name):  # it may be defined in a notebook
            recipe = partial(_as_it_is, local.metric)
        self._recipe = recipe
        self._sent: Any = None

    def expect(
        self, schedules: Sequence[Schedule], fidelity: float = 1.0, paid: Mapping[Schedule, int] | None = None
    ) -> None:
        """Count a batch before it is measured, as the evaluator of this process does."""
        self._local.expect(schedules, fidelity, paid)

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        """Evaluate a batch, and yield each evaluation when it is done, in any order."""
        ordered = in_trie_order(schedules)
        calls = {schedule: self._local.count(schedule, fidelity) for schedule in ordered}
        for schedule, fitness, seconds, rows, measured in self._pool.measured(*self._ready(), ordered, fidelity):
            yield Evaluation(schedule, fitness, calls[schedule], seconds, fidelity, rows, measured)

    def steady(self, more: Callable[[], Sequence[Schedule]]) -> Iterator[Evaluation]:
        """Evaluate the schedules that `more` returns whenever a worker is free; see `Evaluator`."""
        calls: dict[Schedule, int] = {}

        def counted() -> list[Schedule]:
            ordered = in_trie_order(more())
            calls.update((schedule, self._local.count(schedule)) for schedule in ordered)
            return ordered

        for schedule, fitness, seconds, rows, measured in self._pool.measured(*self._ready(), [], more=counted):
            yield Evaluation(schedule, fitness, calls.pop(schedule), seconds, coefficients=rows, measured=measured)

    def _ready(self) -> tuple[Any, Any]:
        """Send the bank and the evaluator, unless they were sent before. Return references to both."""
        bank = self._pool.send_bank(self._local.router.bank)
        if self._sent is None:
            metric = self._local.metric
            with guarded(metric.function, f"metric {metric.name!r}", "be one that pickle can send to the workers"):
                self._sent = self._pool.send((packed(self._local.detached()), self._recipe))
        return bank, self._sent


def _as_it_is(metric: Metric, _device: torch.device) -> Metric:
    return metric
