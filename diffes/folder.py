"""The run folder: which files it has, how they are written without loss, and how they are read without trust."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.schedule import Schedule

CONFIG, JOURNAL, SCHEDULE, BANK, REPORT, COSTS = (
    "config.json", "study.journal", "schedule.json", "bank.safetensors", "report.json", "costs.json",
)  # fmt: skip
FIGURES = ("schedule.png", "convergence.png", "images.png")
FRONT = "front.png"  # of strategies that search one
FILES = (CONFIG, JOURNAL, SCHEDULE, BANK, *FIGURES, REPORT)
SCHEDULE_VERSION = 1
BASE = "base"  # of an exported folder: its copy of the base model


def write_safely(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file beside `path` and moves it there when it is whole; an error leaves `path` as it was.

    Raises:
        DiffesError: the disk is full, or the place cannot be written to.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        try:
            write(partial)
            partial.chmod(0o644)  # safetensors makes files that only their owner may read
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DiffesError(
            f"cannot write {path} ({error}); what is finished is kept: run the same command again once there is room"
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented JSON with a final newline."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_safely(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        DiffesError: the file is missing, truncated or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = (
            "the run is unfinished: run the same `diffes search` again to go on"
            if path.with_name(CONFIG).exists()
            else ("this is no run folder of diffes")
        )
        raise DiffesError(f"{path} is missing; {hint}") from error
    except (ValueError, OSError) as error:
        raise DiffesError(f"{path} is damaged ({error}); restore it or run `diffes search` again") from error
    if not isinstance(data, dict):
        raise DiffesError(f"{path} holds no JSON object; restore it or run `diffes search` again")
    return data


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(data: Mapping[str, Any]) -> str:
    """Hex digest of everything in a JSON object but its own `checksum`."""
    content = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_schedule(folder: Path, schedule: Schedule, facts: Mapping[str, Any]) -> None:
    """Writes `schedule.json` after its bank, with digests of both."""
    data = {"format_version": SCHEDULE_VERSION, **schedule.to_json(), **facts}
    data["bank_sha256"] = file_sha256(folder / BANK)
    data["checksum"] = checksum(data)
    write_json(folder / SCHEDULE, data)


def read_schedule(folder: Path) -> tuple[Schedule, dict[str, Any]]:
    """The schedule of a run and all that `schedule.json` says, checked against its digest and its bank's.

    Raises:
        DiffesError: there is none, or it or its bank was truncated or altered.
    """
    if not folder.is_dir():
        raise DiffesError(f"{folder} is no folder; pass the --out folder of a `diffes search`")
    data = read_json(folder / SCHEDULE)
    if data.get("checksum") != checksum(data):
        raise DiffesError(
            f"{folder / SCHEDULE} was altered after it was written (its checksum differs); restore it or run "
            "`diffes search` again"
        )
    if data["format_version"] > SCHEDULE_VERSION:
        raise DiffesError(
            f"{folder / SCHEDULE} has format version {data['format_version']}, this diffes reads up to "
            f"{SCHEDULE_VERSION}: install a newer diffes"
        )
    bank = folder / BANK
    if not bank.is_file():
        raise DiffesError(f"{bank} is missing; restore it or run `diffes search` again")
    if file_sha256(bank) != data["bank_sha256"]:
        raise DiffesError(
            f"{bank} is not the file that {SCHEDULE} was written with: it was truncated or altered; restore it or run "
            "`diffes search` again"
        )
    return Schedule.from_json(data), data


def base_model(folder: Path, facts: Mapping[str, Any]) -> str:
    """The name, path or hub id of the model that a schedule was made for; relative paths are the folder's own."""
    model = str(facts["model"])
    return str(folder / model) if model.startswith("./") else model


def config_record(config: RunConfig) -> dict[str, Any]:
    """Settings and the versions they ran with."""
    packages = ("diffes", "torch", "diffusers", "deap", "optuna", "pyiqa", "numpy", "safetensors")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"settings": config.to_json(), "versions": versions}


def open_run(folder: Path, config: RunConfig, *, overwrite: bool) -> bool:
    """Checks that a run may go into `folder`, before any work is done and without touching what is there.

    Returns:
        True when an unfinished run of the same settings is there to go on with.

    Raises:
        DiffesError: the folder cannot be written to, or holds something else, a finished run, or an unfinished one of
            other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise DiffesError(f"--out {folder} is a file; name a folder")
    resumes = False
    if folder.is_dir() and any(folder.iterdir()):
        if not _is_run(folder):
            raise DiffesError(f"--out {folder} is not empty and holds no run of diffes; name another folder")
        try:
            resumes = _check_same_run(folder, config)
        except DiffesError:
            if not overwrite:
                raise
    existed = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test") as test:
            test.write(b"\0" * 4096)
            test.flush()
        if not existed:
            folder.rmdir()  # bad settings should leave nothing behind
    except OSError as error:
        raise DiffesError(f"cannot write to --out {folder} ({error}); name another folder") from error
    return resumes


def _is_run(folder: Path) -> bool:
    """Whether `config.json` is one of ours: models have files of that name too."""
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict):
        return False
    settings, versions = record.get("settings"), record.get("versions")
    return isinstance(settings, dict) and isinstance(versions, dict) and "diffes" in versions


def _check_same_run(folder: Path, config: RunConfig) -> bool:
    if (folder / REPORT).exists():
        raise DiffesError(
            f"--out {folder} holds a finished run; pass --overwrite to replace it, or name another folder"
        )
    before = read_json(folder / CONFIG)
    now = config_record(config)
    changed = [
        f"{name} was {before[part].get(name)!r} and is {value!r}"
        for part in ("settings", "versions")
        for name, value in now[part].items()
        if before[part].get(name) != value
    ]
    if changed:
        raise DiffesError(
            f"--out {folder} holds an unfinished run that this one cannot go on with ({'; '.join(changed)}); name "
            "another folder, or pass --overwrite to replace it"
        )
    return True


def begin_run(folder: Path, config: RunConfig, *, resumes: bool) -> None:
    """Clears the files of an earlier run, unless it is gone on with, and writes `config.json`."""
    folder.mkdir(exist_ok=True)
    if not resumes:
        for name in (REPORT, SCHEDULE, *FIGURES, FRONT, BANK, COSTS, JOURNAL, f"{JOURNAL}.lock"):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / CONFIG, config_record(config))
