"""Databases that keep evaluations: valid URLs, creation by several processes at once, and owners of studies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import optuna
from optuna.storages import RDBStorage

from diffes.errors import DiffesError

OWNER = "run"  # user attribute of a study: the run folder that owns it, or the settings of all who share it
ALIKE = "settings "  # prefix of such settings
WAITS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds; making the tables takes less than their sum
BEING_MADE = ("already exists", "UNIQUE constraint", "uplicate", "database is locked")  # in drivers' messages meanwhile


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Limit Optuna's log to warnings while the block runs."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def check_url(url: str) -> None:
    """Check that a URL is of a database that outlives the process.

    Raises:
        DiffesError: the text is no URL in SQLAlchemy's form, or the database is in memory.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise DiffesError(
            f"--storage {url!r} is not the URL of a database. Write one like sqlite:///study.db, or leave it out to "
            "keep the evaluations in the run folder."
        ) from error
    name = parsed.database or ""
    if parsed.get_backend_name() == "sqlite" and (name in ("", ":memory:") or "memory" in parsed.query.get("mode", "")):
        raise DiffesError(
            f"--storage {url!r} is in memory, so it is lost when the command ends. Name a file: sqlite:///study.db."
        )


def open_database(url: str, waits: Sequence[float] = WAITS) -> RDBStorage:
    """Open a database; make its tables if there are none, even while other processes make them.

    Args:
        url: URL in SQLAlchemy's form.
        waits: seconds before each further attempt while others make the tables.

    Raises:
        DiffesError: the URL is no such database, its driver is missing, or it cannot be reached.
    """
    check_url(url)
    try:
        with quiet_optuna():
            return RDBStorage(url)
    except Exception as error:  # drivers fail in their own ways
        if waits and any(sign in str(error) for sign in BEING_MADE):
            time.sleep(waits[0])
            return open_database(url, waits[1:])
        reason = " ".join(str(error).split())[:300]
        raise DiffesError(
            f"the database {url!r} cannot be opened ({type(error).__name__}: {reason}). Check the URL, which looks "
            "like sqlite:///study.db, and install the driver of the database."
        ) from error


def claimed_study(storage: RDBStorage, study: str, owner: str) -> optuna.Study:
    """Return the study of that name; make it for its owner if there is none. If several make it at once, one is first.

    The caller has to check whether the study belongs to this owner.
    """
    try:
        made = optuna.create_study(storage=storage, study_name=study, direction="maximize")
        made.set_user_attr(OWNER, owner)
        return made
    except optuna.exceptions.DuplicatedStudyError:
        theirs = optuna.load_study(study_name=study, storage=storage)
        for wait in WAITS:  # others may be between the two calls above
            if OWNER in theirs.user_attrs or theirs.get_trials(deepcopy=False):
                break
            time.sleep(wait)
        return theirs


def check_owner(url: str, study: str, owner: str, *, fresh: bool) -> None:
    """Check that this run may write to a study, before there is anything to write.

    Args:
        url: URL of the database.
        study: its name.
        owner: the owner that wants to write.
        fresh: whether the study must have no evaluations yet.

    Raises:
        DiffesError: the database cannot be opened, or its study belongs to another owner or has evaluations.
    """
    storage = open_database(url)
    try:
        with quiet_optuna():
            found = optuna.load_study(study_name=study, storage=storage)
    except KeyError:
        return
    theirs = found.user_attrs.get(OWNER)
    if theirs not in (None, owner) and owner.startswith(ALIKE):
        raise DiffesError(
            f"the study {study!r} in {url} was begun with other settings. All runs of a study need the same settings, "
            "except the strategy, its operators and limits, heldout and the device. Name another --study."
        )
    if theirs not in (None, owner):
        raise DiffesError(
            f"the study {study!r} in {url} belongs to {theirs}, not to {owner}. Name another --out folder."
        )
    if fresh and found.get_trials(deepcopy=False):
        raise DiffesError(
            f"the study {study!r} in {url} already has evaluations. Pass --overwrite to replace them, or name another "
            "--out folder."
        )
