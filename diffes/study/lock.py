"""One process a run folder: a lock that the operating system takes back from an owner that died."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from diffes.errors import DiffesError

LOCK = ".lock"
LEFTOVERS = (".partial-", ".write-test", LOCK)  # starts of names of what a killed process leaves behind


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes, and other searches of this one, out of a run folder until the block ends.

    The folder is made where there is none, and taken away again where nothing was put into it. An owner that was
    killed holds nothing: its lock file stays and is taken over.

    Raises:
        DiffesError: the folder is in use, and by whom; or it is a file, or cannot be written to.
    """
    path, made = folder / LOCK, False
    lock = FileLock(path, timeout=0)
    try:
        if folder.exists() and not folder.is_dir():
            raise DiffesError(f"--out {folder} is a file; name a folder")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise DiffesError(
            f"--out {folder} is in use by {_holder(path)}; wait until it is done, stop it, or name another folder"
        ) from None
    except OSError as error:
        raise DiffesError(f"cannot write to --out {folder} ({error}); name another folder") from error
    try:
        with suppress(OSError):  # a full disk is met, and told, by what is written next
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            path.write_text(f"process {os.getpid()} on {platform.node() or 'this machine'} since {now}", "utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it looks again
        lock.release()
        if made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def _holder(path: Path) -> str:
    try:
        return path.read_text("utf-8")[:200] or "another process"
    except (OSError, ValueError):
        return "another process"


def is_unused(folder: Path) -> bool:
    """Whether nothing is in a folder but what a killed process of ours left behind, or there is no folder."""
    return not folder.is_dir() or all(path.name.startswith(LEFTOVERS) for path in folder.iterdir())


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed process of ours left behind in a folder that this one holds; its lock stays."""
    for path in folder.iterdir():
        if path.is_file() and path.name.startswith(LEFTOVERS) and path.name != LOCK:
            path.unlink(missing_ok=True)
