"""Real workers on this machine: what two are worth, what kills do, and whether memory stays flat.

`speed`: a search and a calibration with one thread a process, alone and with two workers, in turns; workers are started
before the clock. `cells`: a comparison of eight searches likewise, from its calibration to its table, start of the
workers included. `faults`: one search by the command line whose workers are killed 20 times and whose driver 5 times,
beside the same search left alone. `memory`: resident memory of driver and workers over 5,000 evaluations; `small`: the
same where the workers' caches of sampling states are soon full.

    python benchmarks/workers.py                        # a quarter of an hour on two CPU cores that have nothing else
    python benchmarks/workers.py --parts faults
    python benchmarks/workers.py --smoke                # tiny, into runs/smoke
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from diffes.config import ALONE, RunConfig, WorkerOptions
from diffes.measure.evaluator import CACHE_BYTES
from diffes.problems.workbench import Workbench, prepare, search_on
from diffes.progress import RichProgress
from diffes.results.report import read_report
from diffes.spaces.strategy import Evaluation, Evaluator
from diffes.study.grid import run_experiment
from diffes.workers import Pool

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, Any] = {
    "genes": "levels",
    "model": "fashion-dit", "method": "magnitude", "stages": 10, "steps": 10, "probes": 8, "metric": "latent_mse",
    "heldout": 8, "calibration_samples": 64, "threads": 1, "strategy": "evolution:mu=4,lam=16",
}  # fmt: skip
TWO = WorkerOptions(workers=2)
CACHES = {"memory": CACHE_BYTES, "small": 1 << 24}  # bytes of sampling states that a worker keeps, by part


def speed(evaluations: int, repeats: int) -> dict[str, Any]:
    """Seconds of a search and of a calibration, alone and by two workers, in turns."""
    config = RunConfig(**SETTINGS, max_evals=evaluations)
    bench = prepare(config, RichProgress())
    calibrated = replace(config, method="obs", calibration_samples=256)
    found: dict[str, list[float]] = {}
    schedules = []

    def search(pool: Pool | None) -> None:
        schedules.append(search_on(replace(bench, pool=pool), RichProgress()).best.schedule)

    def calibrate(pool: Pool | None) -> None:
        prepare(calibrated, RichProgress(), pool=pool)

    for what, work, of in (("search", search, config), ("calibration", calibrate, calibrated)):
        with closing(Pool(of, TWO)) as pool:
            work(pool)  # they start
            for _ in range(repeats):
                for name, where in ((f"{what}, alone", None), (f"{what}, 2 workers", pool)):
                    start = time.perf_counter()
                    work(where)
                    found.setdefault(name, []).append(time.perf_counter() - start)
    if len(set(schedules)) > 1:
        raise SystemExit("workers found another schedule")
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratios = {what: medians[f"{what}, alone"] / medians[f"{what}, 2 workers"] for what in ("search", "calibration")}
    return {"evaluations": evaluations, "seconds": found, "times as fast": ratios}


def cells(evaluations: int, repeats: int) -> dict[str, Any]:
    """Seconds of a comparison, alone and by two workers, in turns."""
    config = RunConfig(**SETTINGS | {"heldout": 64}, max_evals=evaluations)
    varied = {"strategy": [config.strategy, "random"]}
    found: dict[str, list[float]] = {"alone": [], "2 workers": []}
    scores = []
    for name, options in (("alone", ALONE), ("2 workers", TWO)) * repeats:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            comparison = run_experiment(config, varied, 4, Path(folder) / "out", RichProgress(), options)
            found[name].append(time.perf_counter() - start)
        scores.append([(record.found, record.searched.heldout_mean) for record in comparison.records])
    if any(each != scores[0] for each in scores):
        raise SystemExit("workers found other schedules")
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {"seconds": found, "times as fast": medians["alone"] / medians["2 workers"]}


def faults(evaluations: int, worker_kills: int, driver_kills: int, seed: int = 0) -> dict[str, Any]:
    """A search whose workers and driver are killed, beside one that is left alone."""
    rng = random.Random(seed)
    config = RunConfig(**SETTINGS, max_evals=evaluations)
    given = {name: value for name, value in config.to_json().items() if value not in (None, False)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / name for name in ("killed", "alone")]
        command = [sys.executable, "-m", "diffes.cli", "search", "--genes", "levels", *options]
        journal = outs[0] / "study.journal"

        def stored() -> int:
            return journal.read_text().count('"worker"') if journal.exists() else 0

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [*command, "--workers", "2", "--out", str(outs[0])],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        events = ["worker"] * worker_kills + ["driver"] * driver_kills
        rng.shuffle(events)
        driver, left = start(), []
        step = evaluations // (len(events) + 2)
        for event in events:
            aim = stored() + rng.randint(step // 2, step)
            while stored() < aim and driver.poll() is None:
                time.sleep(0.02)
            if driver.poll() is not None:
                raise SystemExit(f"the search ended ({driver.returncode}) before all kills; take more evaluations")
            workers = _workers(driver.pid)
            if event == "worker":
                rng.choice(workers).kill()
                continue
            driver.kill()
            driver.wait()
            left.append(len(psutil.wait_procs(workers, timeout=60)[1]))
            driver = start()
        if driver.wait() != 0:
            raise SystemExit("the search failed")
        subprocess.run([*command, "--out", str(outs[1])], check=True, stdout=subprocess.DEVNULL)
        runs = [read_report(out).run for out in outs]
        reports = [
            {"levels": run.found.levels, "fitness": run.searched.heldout_mean, "evaluations": run.evaluations,
             "denoiser_calls": run.denoiser_calls} for run in runs
        ]  # fmt: skip
        return {
            "kills of workers": worker_kills, "kills of the driver": driver_kills,
            "equal": {name: reports[0][name] == reports[1][name] for name in reports[0]},
            "evaluations": reports[0]["evaluations"], "stored": stored(), "workers that outlived a driver": sum(left),
        }  # fmt: skip


def _workers(driver: int) -> list[psutil.Process]:
    """Processes of a driver's workers; at least one, when it is there."""
    while True:
        children = psutil.Process(driver).children(recursive=True)
        found = [child for child in children if child.name().startswith("ray::Worker")]
        if found:
            return found
        time.sleep(0.02)


def memory(evaluations: int, cache_bytes: int) -> dict[str, Any]:
    """MB of driver and workers over a search, whose workers keep so many bytes of sampling states each."""
    config = RunConfig(**SETTINGS | {"steps": min(SETTINGS["steps"], 8), "probes": 2, "max_evals": evaluations})

    def evaluator(bench: Workbench) -> Evaluator:
        return bench.measuring(bench.evaluator(config.probes, config.seed, cache_bytes=cache_bytes))

    bench = replace(prepare(config, RichProgress()), make_evaluator=evaluator)
    rows: list[dict[str, float]] = []
    count = 0
    start = time.perf_counter()
    with closing(Pool(config, TWO)) as pool:

        def note(_: Evaluation) -> None:
            nonlocal count
            count += 1
            if count % max(evaluations // 20, 1) == 0:
                mine = psutil.Process()
                workers = [child for child in mine.children(recursive=True) if child.name().startswith("ray::Worker")]
                rows.append(
                    {
                        "evaluations": count, "seconds": round(time.perf_counter() - start, 1),
                        "driver": mine.memory_full_info().uss / 1e6,
                        "workers": sum(worker.memory_full_info().uss for worker in workers) / 1e6,
                    }
                )  # fmt: skip

        search_on(replace(bench, pool=pool), RichProgress(), on_evaluation=note)
    if count < evaluations:
        raise SystemExit(f"the search ended after {count} evaluations: there are no more schedules")
    return {"rows": rows}


def text_of(data: dict[str, Any]) -> str:
    """Markdown."""
    lines: list[str] = []
    if "speed" in data:
        lines += ["| | alone, s | 2 workers, s | times as fast |", "|---|---|---|---|"]
        seconds = {name: statistics.median(each) for name, each in data["speed"]["seconds"].items()}
        lines += [
            f"| {what} | {seconds[f'{what}, alone']:.1f} | {seconds[f'{what}, 2 workers']:.1f} | {ratio:.2f} |"
            for what, ratio in data["speed"]["times as fast"].items()
        ]
    if "cells" in data:
        alone, two = (statistics.median(data["cells"]["seconds"][name]) for name in ("alone", "2 workers"))
        lines += [f"| comparison | {alone:.1f} | {two:.1f} | {data['cells']['times as fast']:.2f} |"]
    if "faults" in data:
        lines += ["", *(f"- {name}: {value}" for name, value in data["faults"].items())]
    for part, kept in CACHES.items():
        if part not in data:
            continue
        lines += ["", f"States up to {kept / 1e6:.0f} MB a worker:", ""]
        lines += ["| evaluations | s | driver, MB | workers, MB |", "|---|---|---|---|"]
        lines += [
            f"| {row['evaluations']} | {row['seconds']:.0f} | {row['driver']:.0f} | {row['workers']:.0f} |"
            for row in data[part]["rows"]
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("speed", "cells", "faults", *CACHES)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.smoke:
        args.out = Path("runs/smoke")
        SETTINGS.update(steps=4, probes=2, stages=4, calibration_samples=8)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "workers.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        if part == "speed":
            data[part] = speed(*((20, 1) if args.smoke else (400, 3)))
        elif part == "cells":
            data[part] = cells(*((4, 1) if args.smoke else (40, 3)))
        elif part == "faults":
            data[part] = faults(*((60, 1, 1) if args.smoke else (1500, 20, 5)))
        else:
            data[part] = memory(40 if args.smoke else 5000, CACHES[part])
        path.write_text(json.dumps(data) + "\n")
    (args.out / "workers.md").write_text(text_of(data))
    print(text_of(data))


if __name__ == "__main__":
    main()
