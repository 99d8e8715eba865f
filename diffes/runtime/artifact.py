"""What a run leaves to be used: `schedule.json` and its bank, in a run folder or an exported one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffes.errors import DiffesError
from diffes.files import checksum, file_sha256, read_json, write_json
from diffes.search.schedule import Schedule

SCHEDULE, BANK = "schedule.json", "bank.safetensors"
SCHEDULE_VERSION = 1
BASE = "base"  # of an exported folder: its copy of the base model


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
