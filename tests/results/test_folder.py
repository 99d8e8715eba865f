"""The run folder: when a run may go into it, what is cleared, what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffes import files
from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.results import folder

CONFIG = RunConfig()


def unfinished(out: Path) -> Path:
    folder.begin_run(out, CONFIG, resumes=False)
    (out / folder.JOURNAL).write_text("paid for")
    return out


def test_a_new_folder_is_looked_at_and_not_made(tmp_path: Path) -> None:
    assert not folder.open_run(tmp_path / "a" / "b", CONFIG, overwrite=False)
    assert not (tmp_path / "a" / "b").exists()


def test_an_unfinished_run_of_the_same_settings_is_gone_on_with(tmp_path: Path) -> None:
    out = unfinished(tmp_path / "run")
    assert folder.open_run(out, CONFIG, overwrite=False)
    folder.begin_run(out, CONFIG, resumes=True)
    assert (out / folder.JOURNAL).read_text() == "paid for"


def test_one_of_other_settings_or_versions_is_not(tmp_path: Path) -> None:
    out = unfinished(tmp_path / "run")
    with pytest.raises(DiffesError, match="seed was 0 and is 1"):
        folder.open_run(out, replace(CONFIG, seed=1), overwrite=False)
    record = json.loads((out / files.CONFIG).read_text())
    record["versions"]["torch"] = "1.0"
    (out / files.CONFIG).write_text(json.dumps(record))
    with pytest.raises(DiffesError, match=r"torch was '1\.0' and is"):
        folder.open_run(out, CONFIG, overwrite=False)
    assert not folder.open_run(out, CONFIG, overwrite=True)
    folder.begin_run(out, CONFIG, resumes=False)
    assert not (out / folder.JOURNAL).exists()


def test_a_finished_run_is_only_replaced_when_told_to(tmp_path: Path) -> None:
    out = unfinished(tmp_path / "run")
    (out / folder.REPORT).write_text("{}")
    with pytest.raises(DiffesError, match=r"finished run\. Raise --max-evals to continue it, pass --overwrite"):
        folder.open_run(out, CONFIG, overwrite=False)
    assert not folder.open_run(out, CONFIG, overwrite=True)


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"settings": {}, "versions": {"torch": "2"}}'])
def test_what_is_no_run_is_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / files.CONFIG).write_text(content)
    with pytest.raises(DiffesError, match="not a run of diffes"):
        folder.open_run(tmp_path, CONFIG, overwrite=True)


def test_the_settings_and_versions_are_kept(tmp_path: Path) -> None:
    folder.begin_run(tmp_path, CONFIG, resumes=False)
    record = json.loads((tmp_path / files.CONFIG).read_text())
    assert RunConfig(**record["settings"]) == CONFIG
    assert {"python", "diffes", "torch", "deap"} <= set(record["versions"])


@pytest.mark.parametrize("finished", [False, True])
def test_raised_limits_go_on_from_what_is_there(tmp_path: Path, finished: bool) -> None:
    out = unfinished(tmp_path / "run")
    if finished:
        (out / folder.REPORT).write_text("{}")
    more = replace(CONFIG, max_evals=CONFIG.max_evals + 1)
    assert folder.open_run(out, more, overwrite=False)
    folder.begin_run(out, more, resumes=True)
    assert (out / folder.JOURNAL).read_text() == "paid for"
    assert not (out / folder.REPORT).exists()
    assert folder.open_run(out, more, overwrite=False)  # it is the run's own settings from now on
    with pytest.raises(DiffesError, match=f"max_evals was {more.max_evals} and is {CONFIG.max_evals}"):
        folder.open_run(out, CONFIG, overwrite=False)


def test_a_limit_taken_away_is_raised_and_a_new_one_is_not(tmp_path: Path) -> None:
    limited = replace(CONFIG, time_limit=60.0)
    folder.begin_run(tmp_path, limited, resumes=False)
    assert folder.open_run(tmp_path, CONFIG, overwrite=False)
    folder.begin_run(tmp_path, CONFIG, resumes=True)
    with pytest.raises(DiffesError, match=r"time_limit was None and is 60\.0"):
        folder.open_run(tmp_path, limited, overwrite=False)


def test_other_settings_of_a_finished_run_are_named(tmp_path: Path) -> None:
    out = unfinished(tmp_path / "run")
    (out / folder.REPORT).write_text("{}")
    with pytest.raises(DiffesError, match=r"finished run \(seed was 0 and is 1\)"):
        folder.open_run(out, replace(CONFIG, seed=1, max_evals=999), overwrite=False)


def test_own_leftovers_block_nothing_and_go(tmp_path: Path) -> None:
    for name in (".partial-config.json", ".write-test123", ".lock"):
        (tmp_path / name).write_text("left by a killed process")
    assert not folder.open_run(tmp_path, CONFIG, overwrite=False)
    folder.begin_run(tmp_path, CONFIG, resumes=False)
    assert {path.name for path in tmp_path.iterdir()} == {files.CONFIG, ".lock"}


def test_a_replaced_run_is_a_run_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = unfinished(tmp_path / "run")
    (out / folder.REPORT).write_text("{}")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.begin_run(out, replace(CONFIG, seed=1), resumes=False)
    assert folder.open_run(out, CONFIG, overwrite=False) and not (out / folder.JOURNAL).exists()


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffesError, match="File name too long"):
        folder.open_run(tmp_path / ("x" * 300), CONFIG, overwrite=False)
