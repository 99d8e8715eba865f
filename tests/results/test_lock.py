"""One process a run folder: the second is refused and told who holds it, a dead owner holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.results.lock import LOCK, held
from diffes.study.front import complete_front
from diffes.study.grid import run_cells
from diffes.study.run import complete_run

HOLD = """
import sys, time
from pathlib import Path
from diffes.results.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


class Owner:
    """Another process that holds a folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    try:
        with pytest.raises(DiffesError, match=f"in use by process {owner.process.pid} on .+ since "), held(tmp_path):
            pass
    finally:
        owner.kill()
    assert (tmp_path / LOCK).exists()  # a killed owner leaves its file
    with held(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


LEVELS = RunConfig(genes="levels")


@pytest.mark.parametrize("config", [LEVELS, replace(LEVELS, storage="sqlite:///never-made.db")])
def test_every_kind_of_run_holds_its_folder(tmp_path: Path, config: RunConfig) -> None:
    with held(tmp_path):
        for start in (
            lambda: complete_run(config, tmp_path, None, overwrite=True),  # type: ignore[arg-type]
            lambda: complete_front(RunConfig(cost="macs"), [6.0], tmp_path, None, overwrite=True),  # type: ignore[arg-type]
            lambda: run_cells([config], tmp_path, None),  # type: ignore[arg-type]
        ):
            with pytest.raises(DiffesError, match=f"in use by process {os.getpid()}"):
                start()  # type: ignore[no-untyped-call]


def test_threads_of_one_process_are_kept_apart(tmp_path: Path) -> None:
    errors: list[str] = []

    def second() -> None:
        try:
            with held(tmp_path):
                pass
        except DiffesError as error:
            errors.append(str(error))

    with held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "in use" in errors[0]


def test_a_folder_that_stays_empty_is_taken_away_again(tmp_path: Path) -> None:
    with held(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "b"):
        (tmp_path / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["file"]
    (tmp_path / "c").mkdir()
    with pytest.raises(RuntimeError), held(tmp_path / "c"):
        raise RuntimeError
    assert (tmp_path / "c").is_dir()  # it was there before


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "file", "is a file"), (tmp_path / ("x" * 300), "cannot write to --out")):
        with pytest.raises(DiffesError, match=message), held(path):
            pass
