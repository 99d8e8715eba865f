"""run_search, asynchronous: results one by one, while others are open, and a search that goes on over its store."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from diffes.errors import DiffesError
from diffes.spaces.ledger import SearchResult
from diffes.spaces.loop import LINE, run_search
from diffes.spaces.schedule import Schedule
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Evaluation, Proposal
from diffes.testing import SPACES, separable

SPACE = SPACES["paper"]
ASYNCHRONOUS = ["evolution", "surrogate"]


class Devices:
    """So many, of which each measures in its own time; what is open at once is noted."""

    def __init__(self, n: int, seed: int = 0, failing: int = 0) -> None:
        self.n, self.failing = n, failing
        self.rng = np.random.default_rng(seed)
        self.open: list[int] = []
        self.measured: list[Schedule] = []

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        raise AssertionError("whole batches are not wanted")

    def steady(self, more: Callable[[], Sequence[Schedule]]) -> Iterator[Evaluation]:
        queue: list[Schedule] = []
        running: list[tuple[float, int, Schedule]] = []
        clock, dry = 0.0, False
        while True:
            while len(running) < self.n and not dry:
                queue = queue or list(more())
                dry = not queue
                if queue:
                    self.measured.append(queue[0])
                    heapq.heappush(running, (clock + self.rng.exponential(), len(self.measured), queue.pop(0)))
            if not running:
                return
            self.open.append(len(running))
            clock, number, schedule = heapq.heappop(running)
            fitness = float("nan") if self.failing and number % self.failing == 0 else separable(schedule)
            yield Evaluation(schedule, fitness, 10, 0.5)
            dry = False


def search(devices: Devices, name: str = "evolution", max_evals: int = 60, **options: object) -> SearchResult:
    strategy = STRATEGIES.make(name, SPACE, seed=1)
    return run_search(strategy, devices, max_evals=max_evals, asynchronous=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "n"), [("evolution", 1), ("evolution", 7), ("evolution", 40), ("surrogate", 7)])
def test_devices_are_kept_busy_and_each_schedule_is_measured_once(name: str, n: int) -> None:
    devices = Devices(n)
    found = search(devices, name)
    assert len(found.evaluations) == 60 == len(set(devices.measured)) == len(devices.measured)
    assert found.denoiser_calls == 600
    busy = devices.open[n : 60 - n]
    assert sum(busy) >= 0.9 * n * len(busy)
    assert max(found.curve()[16:]) == found.best.fitness
    assert [line["evaluations"] for line in found.logbook] == [*range(LINE, 60, LINE), 60]


@pytest.mark.slow
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_it_learns_as_a_search_in_generations_does(name: str) -> None:
    """From evaluations of a few, not by luck: far better than as many random ones."""
    steady = search(Devices(4), name, 60).best.fitness

    def one_by_one(schedules: Sequence[Schedule]) -> list[Evaluation]:
        return [Evaluation(schedule, separable(schedule), 10, 0.5) for schedule in schedules]

    random, whole = (
        run_search(STRATEGIES.make(each, SPACE, seed=1), one_by_one, max_evals=60).best.fitness  # type: ignore[arg-type]
        for each in ("random", name)
    )
    assert steady > random + 0.5 * (whole - random)


@pytest.mark.slow
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_search_goes_on_over_its_store_and_pays_nothing_twice(name: str, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def store() -> EvaluationStore:
        return EvaluationStore(tmp_path / "study.journal", SPACE)

    seen: list[Evaluation] = []

    def stop(evaluation: Evaluation) -> None:
        seen.append(evaluation)
        if len(seen) == 25:
            raise Enough

    before = Devices(5)
    with pytest.raises(Enough):
        search(before, name, store=store(), on_evaluation=stop)
    after = Devices(5, seed=1)
    found = search(after, name, store=store())
    assert found.evaluations[:25] == tuple(seen)
    assert len(found.evaluations) == 60 and len(after.measured) == 35
    assert not {evaluation.schedule for evaluation in seen} & set(after.measured)
    assert found.best.fitness == max(evaluation.fitness for evaluation in found.evaluations)
    more = Devices(5, seed=2)
    assert len(search(more, name, 70, store=store()).evaluations) == 70 and len(more.measured) == 10
    assert store().logbook()[-1]["evaluations"] == 70


def test_limits_end_it_once_what_is_open_is_measured() -> None:
    strategy = STRATEGIES.make("evolution", SPACE, seed=1)
    found = run_search(strategy, Devices(6), max_denoiser_calls=200, asynchronous=True)
    assert 20 <= len(found.evaluations) < 20 + 6  # of 6 devices


def test_failures_stay_failures() -> None:
    with pytest.warns(RuntimeWarning, match="is NaN. It counts as a failed evaluation"):
        found = search(Devices(4, failing=3))
    assert sum(evaluation.fitness == -float("inf") for evaluation in found.evaluations) == 20
    assert found.best.fitness > -float("inf")


def test_what_wants_whole_batches_is_refused() -> None:
    with pytest.raises(DiffesError, match=r"EvoPress is not asynchronous\. Use ask and tell"):
        search(Devices(2), "evopress")
    with pytest.raises(DiffesError, match="function measures whole batches, and an asynchronous search needs single"):
        search(lambda schedules: [])  # type: ignore[arg-type]


def test_what_another_process_measured_meanwhile_counts_once(tmp_path: Path) -> None:
    """Of two stores on one file, one is written to by somebody who is at times a little faster."""
    path = tmp_path / "study.journal"
    ours, theirs = (EvaluationStore(path, SPACE, shared=True) for _ in range(2))

    class Overtaken(Devices):
        def steady(self, more: Callable[[], Sequence[Schedule]]) -> Iterator[Evaluation]:
            def overtaken() -> Sequence[Schedule]:
                if len(self.measured) % 3 == 2:
                    theirs.add(Evaluation(self.measured[-1], separable(self.measured[-1]), 10, 0.5))
                return more()

            return super().steady(overtaken)

    told: list[Evaluation] = []
    found = search(Overtaken(4), store=ours, max_evals=30, on_evaluation=told.append)
    assert len(set(told)) == len(told) == len(found.evaluations) == 30
    assert found.denoiser_calls == 300 and len(EvaluationStore(path, SPACE)) == 30


def test_only_all_probes_are_asked_for() -> None:
    class Halves(type(STRATEGIES.make("random", SPACE, seed=0))):  # type: ignore[misc]
        asynchronous = True

        def _ask(self) -> list[Proposal]:
            return [self.propose(self.space.uniform(), fidelity=0.5)]

    with pytest.raises(DiffesError, match="Halves is asynchronous, so it must ask for evaluations on all probes"):
        run_search(Halves(SPACE, seed=0), Devices(1), max_evals=5, asynchronous=True)
