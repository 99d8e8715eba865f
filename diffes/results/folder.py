"""Run folder: its files, its settings, and the checks before a run may use it."""

from __future__ import annotations

import csv
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

from deap import tools
from pydantic import create_model

from diffes.config import LATER, RunConfig
from diffes.errors import DiffesError
from diffes.files import CONFIG, check_seal, read_json, write_json, write_safely, write_sealed
from diffes.forms import ConfigFile, CostsFile, Form, checked
from diffes.results.artifact import BANK, SCHEDULE
from diffes.results.artifact import FRONT as PLANS
from diffes.results.lock import clear_leftovers, is_unused, missing, remove_empty
from diffes.spaces.ledger import LOGGED
from diffes.spaces.space import Table

JOURNAL, REPORT, COSTS, LOGBOOK = "study.journal", "report.json", "costs.json", "logbook.csv"
FIGURES = ("schedule.png", "split.png", "convergence.png", "images.png")
FRONT = "front.png"  # from strategies that search a front, and from `diffes front`
JOURNALS = "journals"  # from `diffes front`
CALIBRATION = "calibration"  # finished stages, until the run is finished
FRONT_FILES = (FRONT, PLANS, "table.npz", "plans.png")  # older versions wrote the table
LONGEST = 40  # at least the length of the longest file name in a run folder
LIMITS = ("max_evals", "max_calls", "time_limit")  # limits of a search, which continues when they are raised
FILES = (CONFIG, JOURNAL, COSTS, LOGBOOK, SCHEDULE, BANK, *FIGURES, REPORT)

_TYPES: dict[str, Any] = {name: (hint | None, None) for name, hint in get_type_hints(RunConfig).items()}
_TYPES["guidance"] = (float | list[float] | None, None)
Settings = create_model("Settings", __base__=Form, **_TYPES)  # settings in `config.json`; older files have fewer


class Finished(DiffesError):
    """Error: the folder holds a finished run of the same settings."""


def config_record(config: RunConfig, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings, with those of a front (`extra`), and the versions of the libraries."""
    packages = ("diffes", "torch", "diffusers", "deap", "optuna", "pyiqa", "numpy", "safetensors")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"settings": {**config.to_json(), **(extra or {})}, "versions": versions}


def open_run(
    folder: Path,
    config: RunConfig,
    *,
    overwrite: bool,
    extra: Mapping[str, Any] | None = None,
    finished: str = REPORT,
) -> bool:
    """Check that a run may use `folder`, before any work is done and without changing its content.

    Args:
        folder: the folder.
        config: the settings.
        overwrite: whether its content may be replaced.
        extra: settings of a front.
        finished: the file that only a finished run has.

    Returns:
        True if the folder holds a run of the same settings that can continue: an unfinished one, or any whose limits
        are raised.

    Raises:
        Finished: the folder holds a finished run of the same settings.
        DiffesError: the folder cannot be written to, or holds something else, or a run of other settings.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise DiffesError(f"--out {folder} is a file. Name a folder.")
    except OSError as error:  # its name is too long
        raise DiffesError(f"cannot write to --out {folder} ({error}). Name another folder.") from error
    resumes = False
    if not is_unused(folder):
        if not _is_run(folder):
            raise DiffesError(f"--out {folder} has files that are not a run of diffes. Name another folder.")
        try:
            resumes = _check_same_run(folder, config_record(config, extra), finished)
        except DiffesError:
            if not overwrite:
                raise
    check_writable(folder)
    return resumes


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which may not exist yet. Leave nothing behind.

    Raises:
        DiffesError: they cannot.
    """
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test", suffix="-" * LONGEST) as test:
            test.write(b"\0" * 4096)
            test.flush()
        remove_empty(made)  # bad settings should leave nothing behind
    except OSError as error:
        raise DiffesError(f"cannot write to --out {folder} ({error}). Name another folder.") from error


def _is_run(folder: Path) -> bool:
    """Check whether `config.json` was written by diffes: models have files of that name too."""
    try:
        return "diffes" in _config_of(folder).versions
    except DiffesError:
        return False


def _config_of(folder: Path) -> ConfigFile:
    return checked(ConfigFile, read_json(folder / CONFIG), folder / CONFIG)


def _check_same_run(folder: Path, now: Mapping[str, Any], finished: str) -> bool:
    config = _config_of(folder)
    checked(Settings, config.settings, folder / CONFIG)
    before = {"settings": _as_now(config.settings), "versions": config.versions}
    changes = {
        name: (before[part].get(name), value)
        for part in ("settings", "versions")
        for name, value in now[part].items()
        if before[part].get(name) != value
    }
    raised = [name for name, (was, is_now) in changes.items() if name in LIMITS and _above(is_now, was)]
    changed = [f"{name} was {was!r} and is {now!r}" for name, (was, now) in changes.items() if name not in raised]
    over = {finished, REPORT, PLANS}  # files of finished runs, of whatever was searched
    if any((folder / name).exists() for name in over) and (changed or not raised):
        why = f" ({'; '.join(changed)})" if changed else ""
        raise (DiffesError if changed else Finished)(
            f"--out {folder} holds a finished run{why}. Raise --max-evals to continue it, pass --overwrite to replace "
            "it, or name another folder."
        )
    if changed:
        raise DiffesError(
            f"--out {folder} holds an unfinished run with other settings ({'; '.join(changed)}). To continue it, "
            f"change nothing but {', '.join(LIMITS)}, and only to higher values. Or name another folder, or pass "
            "--overwrite to replace the run."
        )
    return True


def _as_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an older version in today's form. Fronts had a budget of schedules, which nothing used."""
    unused: dict[str, Any] = {"budget": None} if "budgets" in settings else {}
    renamed = {"allocation": "sensitivity"} if settings.get("allocation") == "damage" else {}
    return LATER | dict(settings) | unused | renamed


def _above(limit: float | None, other: float | None) -> bool:
    """Check whether a limit allows more than another; None is no limit."""
    return other is not None and (limit is None or limit > other)


def begin_run(
    folder: Path,
    config: RunConfig,
    *,
    resumes: bool,
    extra: Mapping[str, Any] | None = None,
    finished: str = REPORT,
) -> Path:
    """Remove the files of an earlier run, unless it continues, and write `config.json`.

    The file that marks a finished run is removed first, and `config.json` is replaced last, so that the folder is a
    valid run at any moment.

    Returns:
        The folder of its calibration, which may not exist yet.
    """
    folder.mkdir(exist_ok=True)
    clear_leftovers(folder)
    (folder / finished).unlink(missing_ok=True)
    if not resumes:
        for name in (*FILES, *FRONT_FILES, f"{JOURNAL}.lock"):
            if name != CONFIG:
                (folder / name).unlink(missing_ok=True)
        for name in (JOURNALS, CALIBRATION):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / CONFIG, config_record(config, extra))
    return folder / CALIBRATION


def end_run(folder: Path) -> None:
    """Remove the calibration, which only an unfinished run needs."""
    shutil.rmtree(folder / CALIBRATION, ignore_errors=True)


def write_costs(folder: Path, cost: str, costs: Table) -> None:
    """Write `costs.json`: the name of the currency, and the cost (S, H + 1) of a call in each stage at each level."""
    write_sealed(folder / COSTS, {"cost": cost, "costs": costs})


def known_costs(folder: Path) -> Table | None:
    """Read the costs that an earlier process measured; None if there are none.

    Raises:
        DiffesError: the file is damaged, or was altered after it was written.
    """
    if not (folder / COSTS).exists():
        return None
    data = read_json(folder / COSTS)
    found = checked(CostsFile, data, folder / COSTS)
    if found.checksum is not None:
        check_seal(folder / COSTS, data)
    return found.costs


def write_logbook(folder: Path, logbook: tools.Logbook) -> None:
    """Write `logbook.csv`, with a line for each generation."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOGGED)
            writer.writeheader()
            writer.writerows(logbook)

    write_safely(folder / LOGBOOK, write)
