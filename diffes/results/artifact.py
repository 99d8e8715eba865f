"""Results of a run: `schedule.json`, or the `front.json` of many plans, and a bank."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffes.errors import DiffesError
from diffes.files import CONFIG, check_seal, file_sha256, read_json, shipped_models, write_sealed
from diffes.forms import AGAIN, Artifact, FrontRecord, PlanPoint, ScheduleFacts, checked
from diffes.spaces.schedule import Plan, Schedule

SCHEDULE, FRONT, BANK = "schedule.json", "front.json", "bank.safetensors"
SCHEDULE_VERSION, FRONT_VERSION = 1, 2
VERSIONS = {SCHEDULE: SCHEDULE_VERSION, FRONT: FRONT_VERSION}
POINT = {"timesteps", "levels", "solver", "coefficients"}  # fields of a point that belong to its plan
BASE = "base"  # an exported folder's copy of the base model
A = TypeVar("A", bound=Artifact)
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def write_schedule(folder: Path, schedule: Schedule, facts: Mapping[str, Any]) -> None:
    """Write `schedule.json` after its bank, with digests of both."""
    _write(folder, SCHEDULE, {**schedule.to_json(), **facts})


def read_schedule(folder: Path) -> tuple[Schedule, ScheduleFacts]:
    """Return the schedule of a run and the content of `schedule.json`, checked against the digests of both files.

    Raises:
        DiffesError: there is none, or it or its bank was truncated or altered.
    """
    facts = _read(folder, SCHEDULE, ScheduleFacts)
    try:
        return Schedule.from_json(facts.to_json()), facts
    except DiffesError as error:
        raise DiffesError(f"{folder / SCHEDULE} is damaged ({error}); {AGAIN}") from error


def write_front(folder: Path, front: FrontRecord) -> None:
    """Write `front.json` after its bank, with digests of both."""
    _write(folder, FRONT, front.to_json())


def read_front(folder: Path) -> FrontRecord:
    """Return the content of `front.json`, checked against the digests of both files; errors as `read_schedule`."""
    return _read(folder, FRONT, FrontRecord)


def chosen(folder: Path, calls: float | None) -> tuple[Schedule | Plan, ScheduleFacts | FrontRecord]:
    """Return the schedule or plan that a folder offers to run, and the facts of its JSON: its one schedule, or a plan
    of its front. For a plan, `points` holds only the point of this plan.

    Args:
        folder: of a run, of a front, or an exported one.
        calls: highest cost of a plan; the best plan within is taken, by its mean over the probes of the final fit.

    Raises:
        DiffesError: the folder is damaged or holds neither, or no plan is that cheap.
    """
    if calls is not None and (isinstance(calls, bool) or not isinstance(calls, numbers.Real) or not calls > 0):
        raise DiffesError(f"calls must be a number above 0, in dense denoiser calls, got {calls!r}")
    if not (folder / FRONT).is_file():
        if calls is not None:
            raise DiffesError(f"{folder} holds one schedule and no plans to choose from. Leave out calls={calls:g}.")
        return read_schedule(folder)
    front = read_front(folder)
    points = [point for point in front.points if point.heldout_mean is not None]
    if not points:
        raise DiffesError(f"{folder} has no plan to run, because all of them failed on held-out probes")
    best = best_within(points, calls)
    if best is None:
        costs = [point.cost for point in points]
        raise DiffesError(
            f"no plan of {folder} costs {calls} dense calls or less. Set calls to {min(costs):.2f} or more; the most "
            f"expensive plan costs {max(costs):.2f}."
        )
    try:
        plan = plan_of(front, best)
    except DiffesError as error:
        raise DiffesError(f"{folder / FRONT} is damaged ({error}); {AGAIN}") from error
    return plan, front.model_copy(update={"points": [best]})


def plan_of(front: FrontRecord, point: PlanPoint) -> Plan:
    """Return the plan of a point of a front. In format 1 the solver is the front's and makes the coefficients."""
    shared = front.model_dump(include={"stages", "max_level", "solver"})
    return Plan.from_json(shared | point.model_dump(include=POINT, exclude_none=True))


def best_within(points: Sequence[PlanPoint], calls: float | None) -> PlanPoint | None:
    """Return the best point of a front that costs at most `calls` dense calls (see `PlanPoint.ranked`).

    None if no point is as cheap, or all that are failed.
    """
    known = [(point.ranked, point) for point in points if point.ranked is not None]
    within = [(rank, point) for rank, point in known if calls is None or point.cost <= calls * (1 + 1e-6)]
    return max(within, key=lambda pair: pair[0], default=(0.0, None))[1]


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    data = {"format_version": VERSIONS[name], **content}
    data["bank_sha256"] = file_sha256(folder / BANK)
    write_sealed(folder / name, data)


def _read(folder: Path, name: str, form: type[A]) -> A:
    if not folder.is_dir():
        raise DiffesError(f"{folder} is not a folder. Pass the --out folder of a `diffes search`.")
    data = read_json(folder / name)
    check_seal(folder / name, data)
    if isinstance(version := data.get("format_version"), int) and version > VERSIONS[name]:
        raise DiffesError(
            f"{folder / name} has the format version {version}, and this diffes reads versions up to {VERSIONS[name]}. "
            "Install a newer diffes."
        )
    found = checked(form, data, folder / name)
    bank = folder / BANK
    if not bank.is_file():
        raise DiffesError(f"{bank} is missing; {AGAIN}")
    if file_sha256(bank) != found.bank_sha256:
        raise DiffesError(f"{bank} was truncated or changed since {name} was written; {AGAIN}")
    return found


def base_model(folder: Path, named: str) -> str:
    """Return the name, path or hub id of the model that a folder names. Relative paths start at the folder.

    A folder from somebody else decides what is loaded, so it may only name a model that it contains, that ships with
    diffes, or that is on a hub. A path to elsewhere is accepted only from a run on this machine, which has a
    `config.json`.

    Raises:
        DiffesError: it names something else.
    """
    if named.startswith("./"):
        if (folder / named).resolve().is_relative_to(folder.resolve()):
            return str(folder / named)
    elif Path(named).is_absolute():
        if (folder / CONFIG).is_file():
            return named
    elif named in shipped_models() or (re.fullmatch(HUB_ID, named) and not Path(named).exists()):
        return named
    raise DiffesError(
        f"{folder} was made for the model {named!r}. It is not in the folder (./{BASE}), it does not ship with diffes, "
        "and it is not the id of a hub (OWNER/NAME). Load the pipeline yourself, then call diffes.apply(pipe, FOLDER)."
    )
