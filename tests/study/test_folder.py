"""The run folder: when a run may go into it, what is cleared, what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffes import files
from diffes.errors import DiffesError
from diffes.study import folder
from diffes.study.config import RunConfig

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
    with pytest.raises(DiffesError, match="finished run; pass --overwrite"):
        folder.open_run(out, CONFIG, overwrite=False)
    assert not folder.open_run(out, CONFIG, overwrite=True)


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"settings": {}, "versions": {"torch": "2"}}'])
def test_what_is_no_run_is_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / files.CONFIG).write_text(content)
    with pytest.raises(DiffesError, match="holds no run"):
        folder.open_run(tmp_path, CONFIG, overwrite=True)


def test_the_settings_and_versions_are_kept(tmp_path: Path) -> None:
    folder.begin_run(tmp_path, CONFIG, resumes=False)
    record = json.loads((tmp_path / files.CONFIG).read_text())
    assert RunConfig(**record["settings"]) == CONFIG
    assert {"python", "diffes", "torch", "deap"} <= set(record["versions"])
