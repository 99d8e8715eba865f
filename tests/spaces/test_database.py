"""Databases: which URLs will do, several processes that make one at once, whose a study is."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffes.errors import DiffesError
from diffes.spaces import database
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore

SPACE = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5)
OPEN = """
import sys
from diffes.spaces.database import open_database
print("ready", flush=True)
sys.stdin.readline()
open_database(sys.argv[1])
"""


@pytest.mark.parametrize(
    "url", ["", "study.db", "nothing://x/y", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"]
)
def test_what_is_no_lasting_database_is_refused(url: str) -> None:
    with pytest.raises(DiffesError, match=r"URL|is in memory|cannot be opened"):
        database.open_database(url)


@pytest.mark.slow
def test_one_database_may_be_made_by_many_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    makers = [subprocess.Popen([sys.executable, "-c", OPEN, url], **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for maker in makers:
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        maker.stdin.write("go\n")
        maker.stdin.flush()
    errors = [maker.communicate()[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0] * 4, errors


def test_of_two_folders_that_ask_for_one_study_at_once_one_gets_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    database.open_database(url)
    start, outcomes = threading.Barrier(4), []

    def claim(owner: str) -> None:
        start.wait()
        try:
            EvaluationStore(url, SPACE, "one", owner)
            outcomes.append("got it")
        except DiffesError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=claim, args=(f"/runs/{i}/one",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("got it") == 1
    assert sum("holds evaluations with run /runs/" in outcome for outcome in outcomes) == 3


def test_a_study_that_its_maker_left_without_an_owner_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "WAITS", (0.0,))
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    EvaluationStore(url, SPACE, "one")  # as one killed between making it and giving its name
    EvaluationStore(url, SPACE, "one", "/runs/one")
    with pytest.raises(DiffesError, match=r"holds evaluations with run /runs/one, and this search has /other/one"):
        EvaluationStore(url, SPACE, "one", "/other/one")


def test_a_study_of_another_folder_is_refused_before_the_long_part(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    database.check_owner(url, "one", "/runs/one", fresh=True)
    EvaluationStore(url, SPACE, "one", "/runs/one")
    database.check_owner(url, "one", "/runs/one", fresh=True)
    with pytest.raises(DiffesError, match=r"the study 'one' in .* belongs to /runs/one, not to /other/one"):
        database.check_owner(url, "one", "/other/one", fresh=False)
