"""Files are whole or not there, and read without trust."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffes import files
from diffes.errors import DiffesError


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "schedule.json"
    target.write_text("before")
    with pytest.raises(DiffesError, match="No space left"):
        files.write_safely(target, lambda _: Path("/dev/full").write_text("x" * 100_000))
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_what_is_written_may_be_read_by_all_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1\n}\n'
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "a.json") == {"b": 1}


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("before")

    def interrupted(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_safely(target, interrupted)
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "does not hold a JSON object"), ('{"a":', "is damaged"), (b"\xff", "is damaged")]
)
def test_damaged_json_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DiffesError, match=message):
        files.read_json(path)


def test_a_missing_file_is_of_an_unfinished_run_or_of_none(tmp_path: Path) -> None:
    with pytest.raises(DiffesError, match="no run folder"):
        files.read_json(tmp_path / "report.json")
    (tmp_path / files.CONFIG).write_text("{}")
    with pytest.raises(DiffesError, match="unfinished"):
        files.read_json(tmp_path / "report.json")


def test_a_checksum_is_of_everything_but_itself() -> None:
    data = {"a": 1, "b": [2]}
    digest = files.checksum(data)
    assert files.checksum({"b": [2], "a": 1, "checksum": digest}) == digest
    assert files.checksum({"a": 1, "b": [3]}) != digest
