"""`kill -9` at random moments of one search, many times over: the same end, and nothing paid for twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SEARCH = """
import json, sys, time
from diffes.spaces.loop import run_search
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Evaluation
from diffes.testing import SPACES, separable

journal, started, strategy = sys.argv[1:]
log = open(started, "a")

def evaluate(schedules, fidelity=1.0):
    for schedule in schedules:
        log.write(json.dumps([schedule.levels, fidelity]) + "\\n")
        log.flush()
        time.sleep(0.004)
        yield Evaluation(schedule, separable(schedule), 10, 0.01, fidelity)

space = SPACES["paper"]
store = EvaluationStore(journal, space)
result = run_search(STRATEGIES.make(strategy, space, seed=1), evaluate, max_evals=200, store=store)
print(json.dumps([result.best.schedule.levels, result.best.fitness, len(result.evaluations), result.denoiser_calls]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "kills"), [("evolution:mu=4,lam=16", 4), ("evopress", 2)])
def test_kills_change_nothing(strategy: str, kills: int, tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / f"{name}.journal"), str(tmp_path / f"{name}.started"), strategy]
        return subprocess.Popen([sys.executable, "-c", SEARCH, *arguments], stdout=subprocess.PIPE, text=True)

    def started() -> list[str]:
        path = tmp_path / "killed.started"
        return path.read_text().splitlines() if path.exists() else []

    undisturbed, _ = start("whole").communicate()
    rng = np.random.default_rng(0)
    in_flight = []
    for _ in range(kills):
        before = len(started())
        process = start("killed")
        while len(started()) == before:  # the search has begun
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.1)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        in_flight.append(started()[-1])
    resumed, _ = start("killed").communicate()
    assert json.loads(resumed) == json.loads(undisturbed)
    paid_twice = [line for line in set(started()) if started().count(line) > 1]
    assert set(paid_twice) <= set(in_flight)
    assert len(started()) <= len((tmp_path / "whole.started").read_text().splitlines()) + kills
