"""Progress displays for long work."""

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
    """Progress display for long work."""

    def task(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """Start a bar, and give a function `advance(note, amount=1)` that advances it and shows a note."""

    def say(self, text: str) -> None:
        """Show a line."""


class Silent:
    """Progress display that shows nothing, for a process that works for another."""

    def say(self, text: str) -> None: ...

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda note, amount=1: None


class RichProgress:
    """Progress display with bars in the terminal or notebook; elsewhere, with one line for each finished task.

    The bar of a task inside another one is below it, and disappears when the task is done. Every task is logged when it
    begins and when it is done.
    """

    def __init__(self) -> None:
        self._bars: Bars | None = None

    def say(self, text: str) -> None:
        console.print(text, highlight=False, markup=False)

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
        # output of libraries is not redirected: in a notebook, redirected bars of tqdm would be redrawn for ever
        with Bars(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as self._bars:
            bars = self._bars
            task = bars.add_task(f"{title:<32}", total=total, note="")
            try:
                yield lambda note, amount=1: bars.update(task, advance=amount, note=note)
            finally:
                self._bars = None
