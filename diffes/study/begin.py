"""Beginning of every run: the folder is checked, the model calibrated, and what that cost is kept."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig, WorkerOptions
from diffes.problems.workbench import Workbench, prepare
from diffes.progress import Progress
from diffes.pruning.calibrate import Keep
from diffes.results import folder
from diffes.runtime.threads import choose_threads
from diffes.workers import pool_of


def with_threads(config: RunConfig, record: Path) -> RunConfig:
    """Return the settings with a number of torch threads, on which the last digits of results depend.

    A number in the settings stays. Work that continues keeps the number that it began with. Other work takes a number
    that suits the machine as it is now.

    Args:
        config: the settings.
        record: file of earlier work, `config.json` of a run or `cells.jsonl` of a comparison; it may be missing.
    """
    if config.threads is not None:
        return config
    try:
        text = record.read_text(encoding="utf-8")
        settings = json.loads(text.splitlines()[0] if record.suffix == ".jsonl" else text)["settings"]
        return replace(config, threads=settings.get("threads"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or a damaged one
        return replace(config, threads=choose_threads())


def _nothing(resumes: bool) -> None: ...


@contextmanager
def begun(
    out: Path,
    config: RunConfig,
    progress: Progress,
    *,
    overwrite: bool,
    workers: WorkerOptions,
    extra: Mapping[str, Any] | None = None,
    finished: str = folder.REPORT,
    searched: RunConfig | None = None,
    check: Callable[[bool], None] = _nothing,
    on_begin: Callable[[bool], None] = _nothing,
    adapter: ModelAdapter | None = None,
) -> Iterator[Workbench]:
    """Open a run folder that this process holds, calibrate, and yield the workbench with its workers.

    What was in the folder is untouched until the model is loaded and every setting is checked. Finished stages of a
    calibration, and measured costs, are kept and used again.

    Args:
        out: the folder.
        config: the settings.
        progress: progress display.
        overwrite: replace what is there.
        workers: worker settings.
        extra: settings beside those of every run.
        finished: the file that only a finished run has.
        searched: settings of the workbench, where they differ from those of the run.
        check: called before the model is loaded, with whether a run continues.
        adapter: adapter of a pipeline that is loaded already; by the settings when left out.
        on_begin: called before the first file is written, with whether a run continues.

    Raises:
        DiffesError: bad settings, or `out` cannot be used.
    """
    settings = searched or config
    resumes = folder.open_run(out, config, overwrite=overwrite, extra=extra, finished=finished)
    known = folder.known_costs(out) if resumes else None
    check(resumes)

    @functools.cache
    def begin() -> Path:
        on_begin(resumes)
        return folder.begin_run(out, config, resumes=resumes, extra=extra, finished=finished)

    with pool_of(settings, workers) as pool:
        bench = prepare(settings, progress, known, pool=pool, keep=Keep(begin, resumes), adapter=adapter)
        begin()
        folder.write_costs(out, config.cost, bench.costs)
        yield bench
