from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import Counting, options_of, small_config
from torch import Tensor

import diffes
from diffes.config import WorkerOptions
from diffes.errors import DiffesError, PluginError
from diffes.measure.metrics import METRICS
from diffes.problems.plans import Plans
from diffes.problems.workbench import Workbench, prepare, search_on, vary
from diffes.spaces.ledger import SearchResult
from diffes.study.run import complete_run
from diffes.workers import Pool, Worker, pool_of
from diffes.workers.packing import packed

ray = pytest.importorskip("ray", reason='several workers need Ray: pip install "diffes[ray]"')
HASTY = WorkerOptions(workers=2, evaluation_timeout=0.5)
SPEC = "evolution:mu=2,lam=6"


@pytest.fixture(scope="module")
def factored(tiny_folder: Path) -> Workbench:
    """Of OBS, with more triangles than memory has room for: most lie in a file of this process."""
    return prepare(
        small_config(tiny_folder, method="obs", probes=3, max_evals=20, strategy=SPEC, bank_memory=2e-5, cost="macs"),
        Counting(),
    )


@pytest.fixture(scope="module")
def pool(factored: Workbench) -> Iterator[Pool]:
    with pool_of(factored.config, WorkerOptions(workers=2)) as made:
        assert made is not None
        yield made


def facts(result: SearchResult) -> list[Any]:
    return [(e.schedule, e.fitness, e.denoiser_calls, e.fidelity) for e in result.evaluations]


def search(bench: Workbench, pool: Pool | None = None, **options: Any) -> SearchResult:
    return search_on(replace(bench, pool=pool), Counting(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [SPEC, "evopress"])
def test_workers_find_and_count_what_one_process_does(factored: Workbench, pool: Pool, strategy: str) -> None:
    bench = vary(factored, replace(factored.config, strategy=strategy), Counting())
    assert factored.router.bank.workshop is not None and factored.router.bank.workshop.filed
    alone, spread = search(bench), search(bench, pool)
    assert facts(spread) == facts(alone)
    assert spread.logbook == alone.logbook
    assert alone.paid_calls is None and spread.paid_calls is not None
    assert spread.paid_calls >= spread.denoiser_calls
    assert {e.measured.worker for e in spread.evaluations if e.measured} <= {"worker 0", "worker 1"}


def test_an_asynchronous_search_measures_what_one_process_does(factored: Workbench, pool: Pool) -> None:
    """What it asks for depends on who is faster; what is measured does not."""
    bench = vary(factored, replace(factored.config, asynchronous=True), Counting())
    found = search(bench, pool)
    assert len({e.schedule for e in found.evaluations}) == 20
    evaluator = bench.evaluator(bench.config.probes, bench.config.seed)
    alone = {e.schedule: e.fitness for e in evaluator([e.schedule for e in found.evaluations])}
    assert {e.schedule: e.fitness for e in found.evaluations} == alone
    assert {e.measured.worker for e in found.evaluations if e.measured} <= {"worker 0", "worker 1"}
    assert str(pool).startswith("2 workers, ") and str(pool).endswith(" calls/s, 0 waiting")
    with pytest.raises(DiffesError, match="asynchronous needs several workers, and workers is 1"):
        bench.search(progress=Counting())
    with pytest.raises(
        DiffesError, match=r"'evopress' wants whole generations; asynchronous ones: evolution, surrogate"
    ):
        vary(bench, replace(bench.config, strategy="evopress"), Counting())


@pytest.mark.slow
def test_workers_calibrate_what_one_process_does(factored: Workbench, pool: Pool) -> None:
    """To the bit, and with as many denoiser calls; levels that are made when they are asked for included."""
    alone, spread = factored, prepare(factored.config, Counting(), pool=pool)
    assert facts(search_on(spread, Counting())) == facts(search_on(alone, Counting()))
    ours, theirs = spread.router.bank, alone.router.bank
    assert sorted(ours) == sorted(theirs) and (ours.calls, ours.kind) == (theirs.calls, theirs.kind)
    for key, entry in theirs.items():
        assert entry.keys() == ours[key].keys()
        for name, weights in entry.items():
            assert torch.equal(weights.kept, ours[key][name].kept)
            pairs = zip(weights.consumers, ours[key][name].consumers, strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    assert spread.costs == alone.costs
    assert (ours.nbytes, len({id(w) for e in ours.values() for w in e.values()})) == (
        theirs.nbytes, len({id(w) for e in theirs.values() for w in e.values()}),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["obs", "obs+block_reuse"])
def test_plans_are_searched_by_workers(factored: Workbench, pool: Pool, method: str) -> None:
    """Each fits the coefficients of the plans that it measures: the same to the bit, and for as many calls."""
    bench = factored if method == "obs" else prepare(replace(factored.config, method=method), Counting())
    found, fitted = [], []
    for where in (None, pool):
        plans = Plans(replace(bench, pool=where), nodes=9, reference_steps=10)
        results = [plans.search(3.5, genes, progress=Counting()) for genes in ("joint", "levels")]  # type: ignore[arg-type]
        found.append([facts(result) for result in results])
        fitted.append([[e.coefficients for e in result.evaluations] for result in results])
    assert found[0] == found[1] and fitted[0] == fitted[1]
    joint, levels = fitted[0]
    assert all(joint) and not any(levels)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_evaluation_repeated(factored: Workbench, pool: Pool) -> None:
    killed: list[int] = []

    def kill(_: Any) -> None:
        if not killed:
            killed.append(0)
            ray.kill(pool._workers[0])

    assert facts(search(factored, pool, on_evaluation=kill)) == facts(search(factored))
    assert killed


def test_what_an_evaluation_raises_is_raised_here(factored: Workbench, pool: Pool) -> None:
    @METRICS.register("shaky")
    def shaky(outputs: Tensor, references: Tensor) -> Tensor:
        if outputs.shape[0] and not torch.equal(outputs, references):
            raise RuntimeError("out of luck")
        return outputs.flatten(1).mean(1)

    try:
        bench = vary(factored, replace(factored.config, metric="latent_cosine"), Counting())
        bench = replace(bench, metric=replace(bench.metric, name="shaky", function=shaky))
        with pytest.raises(PluginError, match=r"metric 'shaky' failed .RuntimeError: out of luck"):
            search(bench, pool)
    finally:
        METRICS.unregister("shaky")
    assert facts(search(factored, pool)) == facts(search(factored))


def test_a_failed_score_stays_one(factored: Workbench, pool: Pool) -> None:
    @METRICS.register("blind")
    def blind(outputs: Tensor, references: Tensor) -> Tensor:
        scores = -(outputs - references).square().flatten(1).mean(1)
        return torch.where(scores < scores.new_tensor(-1e-4), torch.nan, scores)

    try:
        bench = replace(factored, metric=replace(factored.metric, name="blind", function=blind))
        levels = [(0, 0, 0, 0), (4, 4, 4, 4)]
        schedules = [factored.space.any_schedule(each) for each in levels]
        found = {e.schedule: e.fitness for e in replace(bench, pool=pool).search_evaluator()(schedules)}
        assert found[schedules[0]] == 0 and found[schedules[1]] == -torch.inf
    finally:
        METRICS.unregister("blind")


def test_workers_are_sent_an_image_metric_of_this_process(factored: Workbench, pool: Pool) -> None:
    @diffes.metric("of_first", space="image", higher_is_better=False)
    def of_first(outputs: Tensor, references: Tensor, conditions: Sequence[Any]) -> Tensor:
        return (outputs - references).square().flatten(1).mean(1) * torch.tensor(
            [c == conditions[0] for c in conditions]
        )

    try:
        bench = vary(factored, replace(factored.config, metric="of_first"), Counting())
        assert facts(search(bench, pool)) == facts(search(bench))
        lock = Lock()
        held = replace(bench, metric=replace(bench.metric, function=lambda *_: lock))  # type: ignore[arg-type]
        with pytest.raises(PluginError, match=r"metric 'of_first' failed .TypeError: .*it must be one that pickle can"):
            search(held, pool)
    finally:
        METRICS.unregister("of_first")


def test_a_device_that_is_full_gets_fewer_probes_at_a_time(
    factored: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the cached states go, then half of the probes; what is scored stays."""
    evaluator = factored.evaluator(4, 0)
    schedule, other = factored.uniform(), factored.space.any_schedule([1, 1, 1, 1])
    expected = [float(evaluator.scores(each).mean()) for each in (schedule, other)]
    worker = Worker(factored.config, torch.get_num_threads())
    bank, sent = packed(factored.router.bank), (packed(evaluator.detached()), lambda _: factored.metric)

    class Reference:
        def __init__(self, thing: object) -> None:
            self.thing = thing

        def hex(self) -> str:
            return str(id(self))

    monkeypatch.setattr("diffes.workers.worker.the_ray", lambda: SimpleNamespace(get=lambda reference: reference.thing))
    worker.attach([Reference(bank)], [Reference(sent)])
    assert worker.measure(schedule, 1.0)[0] == expected[0]
    step, asked = worker._adapter.step, []

    def full(state: Any, part: Any, guidance: float) -> Any:
        """There is no room for more than two, once the run has come half of its way."""
        asked.append(len(part))
        if len(part) > 2 and state.scheduler.timesteps[-2] >= 0 and len(asked) % 4 == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(state, part, guidance)

    monkeypatch.setattr(worker._adapter, "step", full)
    fitness, paid, _, rows = worker.measure(other, 1.0)
    assert rows is None
    assert fitness == pytest.approx(expected[1], rel=1e-4)
    assert max(asked) == 4 and asked[-1] == 2 and paid >= len(asked)
    monkeypatch.setattr(worker._adapter, "step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(DiffesError, match=r"no room for a single image at a time .full."):
        worker.measure(factored.space.any_schedule([2, 1, 1, 1]), 1.0)


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_goes_on_and_no_worker_stays(tiny_folder: Path, tmp_path: Path) -> None:
    config = small_config(tiny_folder, max_evals=24, strategy=SPEC, threads=1)
    out = tmp_path / "spread"
    command = [
        sys.executable,
        "-m",
        "diffes.cli",
        "search",
        "--genes",
        "levels",
        *options_of(config),
        "--out",
        str(out),
    ]
    driver = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL)
    journal = out / "study.journal"
    while driver.poll() is None and (not journal.exists() or journal.read_text().count('"worker"') < 5):
        time.sleep(0.05)
    started = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    found = [process for process in started if "ray::Worker" in " ".join(process.cmdline())]
    driver.kill()
    driver.wait()
    assert found and not psutil.wait_procs(found, timeout=60)[1]
    paid = journal.read_text().count('"worker"')
    again, alone = (complete_run(config, folder, Counting()) for folder in (out, tmp_path / "alone"))
    assert journal.read_text().count('"worker"') == paid < again.run.evaluations
    assert again.run.found == alone.run.found
    assert (again.run.evaluations, again.run.denoiser_calls) == (alone.run.evaluations, alone.run.denoiser_calls)
    assert again.run.searched.heldout_mean == alone.run.searched.heldout_mean


def test_options_and_a_missing_ray_are_refused_with_the_way_out(
    factored: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DiffesError, match="workers must be at least 1, got 0"):
        WorkerOptions(workers=0)
    with pytest.raises(DiffesError, match="ray_address is of several workers"):
        WorkerOptions(ray_address="auto")
    with pytest.raises(DiffesError, match="gpus_per_worker must be above 0 and at most 64, got -1"):
        WorkerOptions(workers=2, gpus_per_worker=-1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DiffesError, match=r'pip install "diffes\[ray\]"'):
        factored.search(SPEC, workers=2, progress=Counting())


@pytest.mark.slow
def test_an_evaluation_that_hangs_is_given_up_after_some_workers(
    factored: Workbench, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one: the other worker of the pool still hangs then."""

    @METRICS.register("endless")
    def endless(outputs: Tensor, references: Tensor) -> Tensor:
        if not torch.equal(outputs, references):
            time.sleep(10_000)
        return outputs.flatten(1).mean(1)

    monkeypatch.setattr("diffes.workers.pool.LIVES", 1)
    monkeypatch.setattr(pool, "options", HASTY)
    try:
        bench = replace(factored, metric=replace(factored.metric, name="endless", function=endless))
        with pytest.raises(DiffesError, match=r"1 workers ended .* it took longer than evaluation_timeout, 0.5 s"):
            search(bench, pool)
    finally:
        METRICS.unregister("endless")


@pytest.mark.slow
def test_ctrl_c_ends_all_workers(factored: Workbench, pool: Pool) -> None:
    """The last test of the file: the pool is closed then."""

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    def running() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [child for child in children if child.name().startswith("ray::Worker")]

    assert running()
    with pytest.raises(KeyboardInterrupt), closing(pool):
        search(factored, pool, on_evaluation=interrupt)
    assert not psutil.wait_procs(running(), timeout=60)[1]
