"""Number of torch threads: of idle cores, and what the user chose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from diffes.runtime import threads
from diffes.runtime.threads import choose_threads, own_threads, usable_cores


@pytest.fixture(autouse=True)
def four_idle_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four idle cores, on which the user chose nothing."""
    before = torch.get_num_threads()
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("load", "expected"), [(0.0, 4), (0.4, 4), (1.0, 3), (2.6, 1), (4.0, 1), (20.0, 1)])
def test_there_are_as_many_as_idle_cores(load: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    assert choose_threads() == expected
    assert torch.get_num_threads() == 4  # it is only chosen


def test_no_more_than_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # of a machine where others have the other cores
    monkeypatch.setattr(psutil, "getloadavg", lambda: (40.0, 0.0, 0.0))
    assert choose_threads() == 4
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    assert choose_threads() == 2


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_a_number_in_the_environment_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(psutil, "getloadavg", lambda: (4.0, 0.0, 0.0))
    assert choose_threads() == 4


def test_a_number_that_was_set_in_torch_stays() -> None:
    torch.set_num_threads(3)
    assert own_threads() == 4 and choose_threads() == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
)
def test_the_limit_of_a_container_counts(text: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert usable_cores(tmp_path / "cpu.max") == expected
    assert usable_cores(tmp_path / "nothing") == 4


def test_two_logical_cores_of_one_physical_core_are_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 2)
    assert own_threads() == 2
    torch.set_num_threads(2)
    assert choose_threads() == 2
