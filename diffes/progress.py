"""Progress of long work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

console = Console()
log = logging.getLogger(__name__)


class Progress(Protocol):
    """What long work tells of its progress."""

    def task(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """Starts a bar; the function it gives, `advance(note, amount=1)`, moves it on and shows a note."""


class Silent:
    """`Progress` that nobody sees, of a process that works for another."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda note, amount=1: None


class RichProgress:
    """`Progress` as bars in the terminal or the notebook; one line a finished task where there is neither.

    A task inside another one has its bar below it, which goes away when it is done. Every task is logged as it begins
    and when it is done.
    """

    def __init__(self) -> None:
        self._bars: Bars | None = None

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        start = time.monotonic()
        log.info("%s: begins", title)
        with self._bar(title, total) as advance:
            yield advance
        log.info("%s: done, %.1f s", title, time.monotonic() - start)

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        if self._bars is not None:
            outer = self._bars
            task = outer.add_task(f"  {title:<30}", total=total, note="")
            try:
                yield lambda note, amount=1: outer.update(task, advance=amount, note=note)
            finally:
                outer.remove_task(task)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        # what libraries print meanwhile goes its own way: in a notebook, redirected bars of tqdm come back for ever
        with Bars(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as self._bars:
            bars = self._bars
            task = bars.add_task(f"{title:<32}", total=total, note="")
            try:
                yield lambda note, amount=1: bars.update(task, advance=amount, note=note)
            finally:
                self._bars = None
