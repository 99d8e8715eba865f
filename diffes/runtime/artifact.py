"""What a run leaves to be used: `schedule.json`, or the `front.json` of many plans, and a bank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffes.errors import DiffesError
from diffes.files import checksum, file_sha256, read_json, write_json
from diffes.search.schedule import Plan, Schedule

SCHEDULE, FRONT, BANK = "schedule.json", "front.json", "bank.safetensors"
SCHEDULE_VERSION = 1
BASE = "base"  # of an exported folder: its copy of the base model


def write_schedule(folder: Path, schedule: Schedule, facts: Mapping[str, Any]) -> None:
    """Writes `schedule.json` after its bank, with digests of both."""
    _write(folder, SCHEDULE, {**schedule.to_json(), **facts})


def read_schedule(folder: Path) -> tuple[Schedule, dict[str, Any]]:
    """The schedule of a run and all that `schedule.json` says, checked against its digest and its bank's.

    Raises:
        DiffesError: there is none, or it or its bank was truncated or altered.
    """
    data = _read(folder, SCHEDULE)
    return Schedule.from_json(data), data


def write_front(folder: Path, data: Mapping[str, Any]) -> None:
    """Writes `front.json` after its bank, with digests of both."""
    _write(folder, FRONT, data)


def read_front(folder: Path) -> dict[str, Any]:
    """All that the `front.json` of a front says, checked against its digest and its bank's; errors as
    `read_schedule`."""
    return _read(folder, FRONT)


def chosen(folder: Path, calls: float | None) -> tuple[Schedule | Plan, dict[str, Any]]:
    """What a folder offers to be run, and the facts of its JSON: its schedule, or a plan of its front, whose point is
    then the only one in `points`.

    Args:
        folder: of a run, of a front, or an exported one.
        calls: what a plan may cost; the best within is taken, by its mean over held-out probes.

    Raises:
        DiffesError: the folder is damaged or holds neither, or no plan is that cheap.
    """
    if not (folder / FRONT).is_file():
        if calls is not None:
            raise DiffesError(f"{folder} holds one schedule, not a front of plans: leave calls={calls:g} out")
        return read_schedule(folder)
    data = read_front(folder)
    try:
        points = [point for point in data["points"] if point["heldout_mean"] is not None]
        costs = [float(point["cost"]) for point in points]
        within = [p for p, cost in zip(points, costs, strict=True) if calls is None or cost <= calls * (1 + 1e-6)]
        if not within:
            raise DiffesError(
                f"no plan of {folder} costs {calls} dense calls or less: they cost {min(costs):.2f} to {max(costs):.2f}"
            )
        best = max(within, key=lambda point: point["heldout_mean"])
        shared = {name: data[name] for name in ("stages", "max_level", "solver")}
        return Plan.from_json({**shared, "timesteps": best["timesteps"], "levels": best["levels"]}), data | {
            "points": [best]
        }
    except DiffesError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DiffesError(f"{folder / FRONT} is damaged ({type(error).__name__} {error}): restore it") from error


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    data = {"format_version": SCHEDULE_VERSION, **content}
    data["bank_sha256"] = file_sha256(folder / BANK)
    data["checksum"] = checksum(data)
    write_json(folder / name, data)


def _read(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise DiffesError(f"{folder} is no folder; pass the --out folder of a `diffes search`")
    data = read_json(folder / name)
    if data.get("checksum") != checksum(data):
        raise DiffesError(
            f"{folder / name} was altered after it was written (its checksum differs); restore it or run "
            "`diffes search` again"
        )
    if data["format_version"] > SCHEDULE_VERSION:
        raise DiffesError(
            f"{folder / name} has format version {data['format_version']}, this diffes reads up to "
            f"{SCHEDULE_VERSION}: install a newer diffes"
        )
    bank = folder / BANK
    if not bank.is_file():
        raise DiffesError(f"{bank} is missing; restore it or run `diffes search` again")
    if file_sha256(bank) != data["bank_sha256"]:
        raise DiffesError(
            f"{bank} is not the file that {name} was written with: it was truncated or altered; restore it or run "
            "`diffes search` again"
        )
    return data


def base_model(folder: Path, facts: Mapping[str, Any]) -> str:
    """The name, path or hub id of the model that a schedule was made for; relative paths are the folder's own."""
    model = str(facts["model"])
    return str(folder / model) if model.startswith("./") else model
