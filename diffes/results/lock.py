"""Lock of a run folder, held by one process at a time. The operating system releases the lock of a dead process."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from diffes.errors import DiffesError

LOCK = ".lock"
LEFTOVERS = (".partial-", ".write-test", LOCK)  # name prefixes of files that a killed process leaves behind


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes, and other searches of this process, out of a run folder until the block ends.

    Create the folder if it is missing; then remove it again if it stays empty. A killed process holds no lock: its lock
    file stays, and the next process takes it over.

    Raises:
        DiffesError: the folder is in use (the message says by whom), is a file, or cannot be written to.
    """
    path, made = folder / LOCK, list[Path]()
    lock = FileLock(path, timeout=0)
    try:
        if folder.exists() and not folder.is_dir():
            raise DiffesError(f"--out {folder} is a file. Name a folder.")
        made = missing(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DiffesError(
            f"--out {folder} is in use by {_holder(path)}. Wait until it ends, stop it, or name another folder."
        ) from None
    except OSError as error:
        raise DiffesError(f"cannot write to --out {folder} ({error}). Name another folder.") from error
    try:
        with suppress(OSError):  # on a full disk the next write fails, with a message
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            path.write_text(f"process {os.getpid()} on {platform.node() or 'this machine'} since {now}", "utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held: a waiting process notices and tries again
        lock.release()
        remove_empty(made)


def missing(folder: Path) -> list[Path]:
    """Return the folders that have to be made for a folder, itself first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that are empty, up to the first one that is not."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _holder(path: Path) -> str:
    try:
        return path.read_text("utf-8")[:200] or "another process"
    except (OSError, ValueError):
        return "another process"


def is_unused(folder: Path) -> bool:
    """Check whether a folder is missing, or holds nothing but files that a killed process of diffes left behind."""
    return not folder.is_dir() or all(path.name.startswith(LEFTOVERS) for path in folder.iterdir())


def clear_leftovers(folder: Path) -> None:
    """Remove files that a killed process left behind in a folder that this process holds. Keep the lock file."""
    for path in folder.iterdir():
        if path.is_file() and path.name.startswith(LEFTOVERS) and path.name != LOCK:
            path.unlink(missing_ok=True)
