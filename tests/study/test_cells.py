"""Whole cells in workers: the records and journals of one process, whatever happens to a worker or a cell."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Counting, small_config

import diffes
from diffes.config import ALONE, RunConfig, WorkerOptions
from diffes.results.record import RunRecord
from diffes.spaces.operators import MUTATIONS
from diffes.study import cells, grid
from diffes.study.cell import CellWorker
from diffes.workers import Pool, pool_of

ray = pytest.importorskip("ray", reason='several workers need Ray: pip install "diffes[ray]"')
TWO = WorkerOptions(workers=2)
NOTED = ("denoiser_calls", "operator", "parents")  # of a trial


class Noting(Counting):
    """Progress that notes what the bars say, too."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        with super().task(title, total):
            yield lambda note, amount=1: self.notes.append(note)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> RunConfig:
    return small_config(tiny_folder, cost="macs", budget=0.8, threads=1)


@pytest.fixture(scope="module")
def pool(model: RunConfig) -> Iterator[Pool]:
    with pool_of(model, TWO, CellWorker) as made:
        assert made is not None
        yield made


@pytest.fixture
def one_pool(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The same workers for all commands."""
    monkeypatch.setattr(cells, "pool_of", lambda *_: nullcontext(pool))
    return pool


def facts(record: RunRecord) -> RunRecord:
    """All of a record but the time that it took."""
    above = None if record.above is None else facts(record.above)
    return replace(record, seconds=0.0, above=above)


def trials(out: Path) -> dict[str, list[Any]]:
    """What was measured, by journal."""
    found: dict[str, list[Any]] = {}
    for path in (out / cells.JOURNALS).glob("*.journal"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [(line["params"], line["value"], line["user_attrs"]) for line in lines if "params" in line]
        found[path.name] = [
            (*row, *(attributes[each] for each in NOTED if each in attributes)) for *row, attributes in rows
        ]
    return found


def by_worker(out: Path, name: str = "*") -> int:
    """Evaluations that were spread over workers."""
    return sum(path.read_text().count('"worker"') for path in (out / cells.JOURNALS).glob(name))


@pytest.mark.slow
def test_workers_run_whole_cells_as_one_process_does(
    model: RunConfig, one_pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches again at a budget above included; from a folder that was named relative to that of the command."""
    varied: dict[str, list[Any]] = {"strategy": ["evolution", "uniform"]}
    alone = grid.run_experiment(model, varied, 1, tmp_path / "alone", Counting())
    monkeypatch.chdir(tmp_path)
    progress = Noting()
    spread = grid.run_experiment(model, varied, 1, Path("spread"), progress, TWO)
    assert all(record.above is not None for record in spread.records)
    assert [facts(record) for record in spread.records] == [facts(record) for record in alone.records]
    assert spread.markdown() == alone.markdown()
    assert not any("searching" in title for title in progress.titles)
    assert progress.notes.count("2 workers, a cell each, 0 waiting") >= 1
    assert trials(tmp_path / "spread") == trials(tmp_path / "alone") and by_worker(tmp_path / "spread") == 0
    again = Counting()
    assert grid.run_experiment(model, varied, 1, tmp_path / "spread", again, TWO).records == spread.records
    assert again.titles == ["2 cells"]


@pytest.mark.slow
@pytest.mark.parametrize("lives", [1, 3])
def test_a_cell_goes_on_from_its_journal_where_a_worker_died(
    model: RunConfig, one_pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    """Past the lock that the worker left on it; at once, or by the next command where too many died of it."""
    monkeypatch.setattr("diffes.workers.pool.LIVES", lives)
    base, varied = replace(model, max_evals=100), {"strategy": ["random"]}
    name = f"{cells.key_of(replace(base, strategy='random').to_json())}.journal"
    journal = tmp_path / "spread" / cells.JOURNALS / name
    killed: list[Any] = []

    def kill() -> None:
        while not journal.exists() or journal.read_text().count('"params"') < 4:
            time.sleep(0.01)
        killed.append(one_pool._workers[0])
        ray.kill(killed[0])
        journal.with_name(f"{name}.lock").touch()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    spread = grid.run_experiment(base, varied, 2, tmp_path / "spread", Counting(), TWO)
    thread.join()
    assert one_pool._workers[0] is not killed[0]
    assert len(spread.records) == (1 if lives == 1 else 2)
    if lives == 1:
        assert spread.failed[0].error.startswith("DiffesError: 1 workers ended during the cell of seed 0 with random, ")
        spread = grid.run_experiment(base, varied, 2, tmp_path / "spread", Counting())
    alone = grid.run_experiment(base, varied, 2, tmp_path / "alone", Counting())
    assert [facts(record) for record in spread.records] == [facts(record) for record in alone.records]
    found, expected = (trials(tmp_path / folder)[name] for folder in ("spread", "alone"))
    assert sorted(map(str, found)) == sorted(map(str, expected))  # a batch that was cut has an order of its own


def test_a_cell_that_fails_in_a_worker_is_noted_as_in_one_process(
    model: RunConfig, one_pool: Pool, tmp_path: Path
) -> None:
    bad = replace(model, strategy="random", seed=0)
    journal = tmp_path / cells.JOURNALS / f"{cells.key_of(bad.to_json())}.journal"
    found = []
    for options in (TWO, ALONE):
        journal.parent.mkdir(exist_ok=True)
        journal.write_text("ten years")
        (tmp_path / cells.CELLS).unlink(missing_ok=True)
        found.append(grid.run_experiment(model, {"strategy": ["random"]}, 2, tmp_path, Counting(), options))
    assert found[0].failed == found[1].failed and len(found[0].failed) == 1
    assert found[0].failed[0].error.startswith(f"DiffesError: {journal} is not a journal of evaluations.")
    assert [facts(record) for record in found[0].records] == [facts(record) for record in found[1].records]


@pytest.mark.slow
@pytest.mark.parametrize("cause", [False, True])
def test_a_full_disk_ends_the_command(model: RunConfig, one_pool: Pool, tmp_path: Path, cause: bool) -> None:
    """Also where it is only the cause of what was raised, which Ray does not hand on."""
    journal = tmp_path / cells.JOURNALS / f"{cells.key_of(replace(model, strategy='random').to_json())}.journal"
    journal.parent.mkdir()
    if cause:
        journal.symlink_to(tmp_path / "nowhere" / "at all")
    else:
        journal.mkdir()
    with pytest.raises(diffes.DiffesError if cause else OSError, match="not a journal" if cause else "Is a directory"):
        grid.run_experiment(model, {"strategy": ["random"]}, 2, tmp_path, Counting(), TWO)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_what_this_process_alone_knows_is_run_here(model: RunConfig, one_pool: Pool, tmp_path: Path) -> None:
    """A mutation of a notebook, which may keep what it likes in it; its evaluations are spread over the workers."""
    seen: list[int] = []

    @diffes.mutation("of_a_notebook")
    def of_a_notebook(genome: Any, *, space: Any, rng: Any) -> tuple[Any]:
        seen.append(len(genome))
        genome[:] = space.repair(space.sample(rng), rng)
        return (genome,)

    varied = {"strategy": ["evolution:mu=2,lam=2,mutation=of_a_notebook", "random"]}
    try:
        cheap = replace(model, cost="level", budget=0.5)
        alone = grid.run_experiment(cheap, varied, 2, tmp_path / "alone", Counting())
        before = len(seen)
        spread = grid.run_experiment(cheap, varied, 2, tmp_path / "spread", Counting(), TWO)
    finally:
        MUTATIONS.unregister("of_a_notebook")
    assert spread.failed == () and len(seen) == 2 * before > 0
    assert [facts(record) for record in spread.records] == [facts(record) for record in alone.records]
    for record in spread.records:
        ours = "notebook" in record.settings["strategy"]
        assert (by_worker(tmp_path / "spread", f"{cells.key_of(record.settings)}.journal") > 0) == ours


def test_which_cells_workers_run_whole(model: RunConfig) -> None:
    group = [replace(model, seed=seed) for seed in range(5)]
    assert cells.whole_in_workers(group, TWO) == group[:4]
    assert cells.whole_in_workers(group, WorkerOptions(workers=6)) == []
    assert cells.whole_in_workers(group, ALONE) == []
    assert cells.whole_in_workers(group, WorkerOptions(workers=2, evaluation_timeout=9)) == []
    assert cells.whole_in_workers(group, WorkerOptions(workers=2, ray_address="auto")) == []
    mixed = [replace(group[0], asynchronous=True), *group[1:3]]
    assert cells.whole_in_workers(mixed, TWO) == group[1:3]
    level_switch = MUTATIONS.get("level_switch")
    try:
        diffes.mutation("level_switch")(level_switch)
        assert cells.whole_in_workers(group, TWO) == group[:4]  # it is still the same
        diffes.mutation("level_switch")(lambda genome, *, space, rng: (genome,))
        assert cells.whole_in_workers(group, TWO) == []
    finally:
        MUTATIONS.unregister("level_switch")
