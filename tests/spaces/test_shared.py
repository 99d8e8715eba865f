"""Several processes on one study in a database, without Ray: a real PostgreSQL, and SQLite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffes.errors import DiffesError
from diffes.spaces.store import EvaluationStore
from diffes.testing import SPACES

SPACE = SPACES["paper"]
EVALUATIONS = 120
SEARCH = """
import json, sys, time
from diffes.spaces.loop import run_search
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Evaluation
from diffes.testing import SPACES, separable

url, strategy, seed, evaluations = sys.argv[1:]
mine = []

class Here:
    def steady(self, more):
        while schedules := more():
            for schedule in schedules:
                time.sleep(0.02)
                mine.append(schedule.levels)
                yield Evaluation(schedule, separable(schedule), 10, 0.02)

space = SPACES["paper"]
store = EvaluationStore(url, space, "together", "us", shared=True)
print("ready", flush=True)
sys.stdin.readline()
made = STRATEGIES.make(strategy, space, seed=int(seed))
found = run_search(made, Here(), max_evals=int(evaluations), store=store, asynchronous=True)
print(json.dumps([mine, found.best.fitness, len(found.evaluations)]))
"""


def postgres(folder: Path) -> Iterator[str]:
    """The URL of a server that is started for the test and listens on a socket in a folder."""
    programs = [shutil.which(name) for name in ("initdb", "postgres")]
    if None in programs:
        pytest.skip("PostgreSQL is not installed")
    user = "nobody" if os.geteuid() == 0 else None  # it does not run as root
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as short:  # the path of a socket must be
        data = Path(short) / "data"
        data.mkdir()
        for path in (Path(short), data):
            path.chmod(0o700)
            if user is not None:
                shutil.chown(path, user)
        made = subprocess.run(
            [str(programs[0]), "-D", str(data), "-U", "diffes", "-A", "trust", "--no-sync"], cwd=short, user=user,
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"PostgreSQL cannot make a database here: {made.stderr[-200:]}")
        command = [str(programs[1]), "-D", str(data), "-k", short, "-h", "", "-F"]
        server = subprocess.Popen(command, cwd=short, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not list(Path(short).glob(".s.PGSQL.*[0-9]")):
                assert server.poll() is None, "the server did not start"
                time.sleep(0.05)
            yield f"postgresql+psycopg://diffes@/postgres?host={short}"
        finally:
            server.send_signal(signal.SIGINT)  # it does not wait for those who are connected
            server.wait()


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database that has nothing yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'studies.db'}"
    else:
        yield from postgres(tmp_path)


def start(url: str, seed: int, evaluations: int = EVALUATIONS, strategy: str = "evolution") -> subprocess.Popen[str]:
    arguments = [url, strategy, str(seed), str(evaluations)]
    process = subprocess.Popen(
        [sys.executable, "-c", SEARCH, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_processes_search_one_study_together_and_one_may_die(url: str) -> None:
    processes = [start(url, seed, strategy=("evolution", "surrogate")[seed == 2]) for seed in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    while len(EvaluationStore(url, SPACE, "together", "us", shared=True)) < 30:
        time.sleep(0.05)
    processes[0].kill()
    processes[0].communicate()
    ended = [json.loads(process.communicate()[0]) for process in processes[1:]]
    store = EvaluationStore(url, SPACE, "together", "us", shared=True)
    assert EVALUATIONS <= len(store) <= EVALUATIONS + 3
    best = max(evaluation.fitness for evaluation in store.evaluations())
    for mine, found, n in ended:
        assert 0 < len(mine) < EVALUATIONS  # the others did the rest
        assert EVALUATIONS <= n <= len(store) and found <= best
    assert max(found for _, found, _ in ended) == best
    twice = {tuple(levels) for levels in ended[0][0]} & {tuple(levels) for levels in ended[1][0]}
    assert len(twice) <= 0.1 * EVALUATIONS  # measured by both at once
    late = start(url, 3, EVALUATIONS + 20)
    mine, found, n = json.loads(late.communicate("go\n")[0])
    assert len(mine) == n - len(store) and found >= best and n >= EVALUATIONS + 20


def test_a_study_of_other_settings_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    EvaluationStore(url, SPACE, "together", "settings 1", shared=True)
    with pytest.raises(DiffesError, match="holds evaluations with run settings 1, and this search has settings 2"):
        EvaluationStore(url, SPACE, "together", "settings 2", shared=True)
