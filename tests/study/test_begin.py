"""The number of torch threads that a run begins with."""

from __future__ import annotations

import json
from pathlib import Path

from diffes.config import RunConfig
from diffes.files import CONFIG
from diffes.study.begin import with_threads
from diffes.study.cells import CELLS


def test_work_that_continues_keeps_its_number_of_threads(tmp_path: Path) -> None:
    config = RunConfig()
    assert (with_threads(config, tmp_path / CONFIG).threads or 0) >= 1
    for settings, expected in (({"threads": 3}, 3), ({"threads": None}, None), ({}, None)):  # older versions had none
        record = json.dumps({"settings": settings})
        (tmp_path / CONFIG).write_text(record)
        (tmp_path / CELLS).write_text(f"{record}\n{record}\n")
        assert [with_threads(config, tmp_path / name).threads for name in (CONFIG, CELLS)] == [expected] * 2
    assert with_threads(RunConfig(threads=2), tmp_path / CONFIG).threads == 2
    (tmp_path / CONFIG).write_text("[]")
    assert (with_threads(config, tmp_path / CONFIG).threads or 0) >= 1
