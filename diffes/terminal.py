"""Work and terminal output of the commands. `diffes.cli` imports this module when a command runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from diffes import files
from diffes.config import RunConfig, WorkerOptions, in_words
from diffes.errors import DiffesError, DiffesWarning
from diffes.forms import PlanPoint
from diffes.progress import RichProgress, console

log = logging.getLogger(__name__)
QUIET = {"TQDM_DISABLE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


@contextmanager
def session(log_file: Path | None = None) -> Iterator[ModuleType]:
    """Yield this module, with torch and diffusers loaded and messages of other libraries kept off the terminal.

    Args:
        log_file: file to which the log of diffes and the warnings of all libraries are appended; None drops them.

    Raises:
        DiffesError: the log file cannot be written to, or code inside the block called `sys.exit`.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    root, ours = logging.getLogger(), logging.getLogger("diffes")
    handler, level = _handler(log_file), ours.level
    root.addHandler(handler)  # where the root has none, Python prints the warnings of libraries
    ours.setLevel(logging.INFO if log_file else level)
    logging.captureWarnings(True)
    logged = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, DiffesWarning):
            console.print(f"warning: {message}", highlight=False, markup=False)
        logged(message, category, *place, **more)

    warnings.showwarning = show
    try:
        with console.status("loading torch and diffusers"):
            import diffes.study.run  # noqa: F401
        yield sys.modules[__name__]
    except SystemExit as stopped:
        raise DiffesError(
            f"something that was loaded called sys.exit({stopped.code!r}); what is finished is kept"
        ) from stopped
    except BaseException as error:
        log.error("%s: %s", type(error).__name__, error, exc_info=not isinstance(error, DiffesError))
        raise
    finally:
        warnings.showwarning = logged
        logging.captureWarnings(False)
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _handler(log_file: Path | None) -> logging.Handler:
    if log_file is None:
        return logging.NullHandler()
    try:
        handler = logging.FileHandler(log_file, encoding="utf-8")
    except OSError as error:
        raise DiffesError(f"--log-file {log_file} cannot be written ({error}); name a file in a folder") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def search(config: RunConfig, out: Path, overwrite: bool, workers: WorkerOptions) -> None:
    """Search levels, and show the result."""
    from diffes.results import report as reports
    from diffes.study.run import complete_run

    report = complete_run(config, out, RichProgress(), overwrite=overwrite, workers=workers)
    found = report.run
    table = Table(
        title="{model}, {method}, held-out {metric} over {heldout} probes".format(**found.settings),
    )
    for name in reports.COLUMNS:
        table.add_column(name, justify="left" if not name else "right")
    for row in reports.rows(report):
        table.add_row(*row)
    console.print(table)
    console.print(f"levels by stage, cleanest first: {' '.join(map(str, found.found.levels))}")
    spent = f"{found.denoiser_calls:,} denoiser calls and {found.calibration_calls:,} of calibration"
    console.print(f"{found.evaluations} evaluations, {spent}, on torch threads: {found.settings['threads']}")
    if workers.workers > 1 and report.paid_calls is not None:
        console.print(f"{workers.workers} workers paid {report.paid_calls:,} denoiser calls for the search")
    _list(out, "*")
    console.print(f"next: diffes sample {out} --out grid.png", highlight=False)


def front(config: RunConfig, budgets: Sequence[float], out: Path, overwrite: bool, **options: Any) -> None:
    """Search plans at some budgets, and show what they gain."""
    from diffes.figures import tables
    from diffes.study import front as fronts

    found = fronts.complete_front(config, budgets, out, RichProgress(), overwrite=overwrite, **options)
    _show_front(
        found.points,
        f"{config.model}, {config.method}, guidance {in_words(config.guidance)}: {config.heldout} held-out probes, "
        f"against {found.reference.steps} dense steps of {found.reference.solver}; cost by {config.cost}"
        + (f"; torch threads: {found.timing.threads}" if found.timing else ""),
    )
    for line in tables.verdicts(found):
        console.print(line, highlight=False)
    _list(out, "*")
    console.print(f"next: diffes sample {out} --calls {max(budgets):g} --out grid.png", highlight=False)


def fit(run: Path, out: Path, **options: Any) -> None:
    """Fit a plan again, and show what that changed."""
    from diffes.results.artifact import read_front
    from diffes.study.fit import fit_run

    found = fit_run(run, out, progress=RichProgress(), **options)
    points = read_front(out).points  # with their milliseconds
    _show_front(points, f"{len(found.plan.calls)} calls, {options['heldout']} held-out probes")
    _list(out, "*")
    console.print(f"next: diffes sample {out} --out grid.png", highlight=False)


def _show_front(points: Sequence[PlanPoint], title: str) -> None:
    """Print the table of some plans, which fits 80 columns."""
    from diffes.figures import tables

    table = Table(title=title, box=SIMPLE_HEAD)
    for name in tables.COLUMNS:
        table.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for row in tables.rows_of(points):
        table.add_row(*row)
    console.print(table)


def sample(run: Path, conditions: Sequence[int] | Sequence[str] | None, out: Path, **options: Any) -> None:
    """Sample images of a run, and write them to a PNG."""
    from diffes.figures import plots
    from diffes.study.run import sample_images

    images, names = sample_images(run, conditions, **options)
    figure = plots.image_grid({"": images}, names)
    files.write_safely(out, lambda partial: plots.save(figure, partial))
    console.print(f"written to {out}", highlight=False)


def export(run: Path, out: Path, **options: Any) -> None:
    """Export a run to a folder that works without it."""
    from diffes.study.export import export as write_export

    write_export(run, out, **options)
    _list(out, "**/*")
    console.print(f"next: python -c 'import diffes; pipe = diffes.load(\"{out}\")'", highlight=False, markup=False)


def experiment(
    config: RunConfig, varied: Mapping[str, Sequence[Any]], seeds: int, out: Path, workers: WorkerOptions
) -> None:
    """Run a grid of searches, and show its table.

    Raises:
        DiffesError: a setting is unusable; or a cell failed, which is raised after the others are done and shown.
    """
    from diffes.study import grid

    found = grid.run_experiment(config, varied, seeds, out, RichProgress(), workers)
    head, body = found.table(brief=True)
    names = found.varied
    named = f"held-out {config.metric}" if "metric" not in names else "held-out fitness"
    same = "".join(f"; {name}: {value}" for name, value in found.same_rivals().items())
    table = Table(title=named + same, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in head:
        table.add_column(title, justify="left" if title in names else "right", no_wrap=title in names)
    for line in body:
        table.add_row(*line)
    console.print(table)
    for note in found.notes():
        console.print(note, highlight=False, markup=False)
    _list(out, "*")
    if found.failed:
        raise DiffesError(f"cells that failed: {len(found.failed)}, named above; the same command tries them again")


def _list(out: Path, pattern: str) -> None:
    """Print the files that were written to a folder, sorted by name."""
    console.print(f"written to {out}:", highlight=False)
    for path in sorted(path for path in out.glob(pattern) if path.is_file()):
        console.print(f"  {path}  ({path.stat().st_size:,} bytes)", highlight=False)
