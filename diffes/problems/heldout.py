"""Scores on held-out probes, which no search sees. All candidates of a report are measured here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diffes.config import HELDOUT_SEED
from diffes.measure.quality import finite
from diffes.results.folder import config_record
from diffes.results.record import Candidate, RunRecord, rises
from diffes.spaces.ledger import SearchResult
from diffes.spaces.schedule import Schedule

if TYPE_CHECKING:
    from diffes.problems.workbench import Workbench


class HeldOut:
    """Evaluator on held-out probes of schedules and of the dense model at a number of steps. It measures each once.

    Args:
        bench: workbench with the model, the metric and the number of held-out probes.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self.evaluator = bench.evaluator(bench.config.heldout, HELDOUT_SEED, "heldout")
        self._known: dict[Schedule | int, Candidate] = {}

    def __call__(self, candidate: Schedule | int, search: float | None = None) -> Candidate:
        """Measure a schedule, or the dense model at a number of steps.

        Args:
            candidate: the schedule, or the number of steps.
            search: its fitness on the probes of a search, if there is one.
        """
        if candidate not in self._known:
            self._known[candidate] = self._measure(candidate)
        return replace(self._known[candidate], search=search)

    def _measure(self, candidate: Schedule | int) -> Candidate:
        bench, all_steps = self._bench, self._bench.config.steps
        if isinstance(candidate, int):
            scores = self.evaluator.dense_scores(candidate)
            steps, levels, sparsity, macs = candidate, None, 0.0, candidate / all_steps
        else:
            scores = self.evaluator.scores(candidate)
            steps, levels = all_steps, candidate.levels
            sparsity, macs = candidate.nominal_sparsity(bench.levels.steps), bench.macs_fraction(candidate)
        mean, deviation = (finite(float(value)) for value in (scores.mean(), scores.std()))
        return Candidate(steps, levels, mean, deviation, sparsity, macs)


def record_of(bench: Workbench, result: SearchResult) -> RunRecord:
    """Build the record of a search: what was found and its rivals at the same cost, on held-out probes."""
    problem = bench.problem
    found = problem.finish(result)
    return RunRecord(
        **config_record(bench.config),
        found=found.routed,
        searched=problem.measure(found.routed, found.fitness),
        rivals=problem.rivals_of(found),
        evaluations=len(result.evaluations),
        denoiser_calls=result.denoiser_calls + found.calls,
        seconds=result.seconds,
        calibration_calls=bench.router.bank.calls,
        curve=rises(result),
    )
