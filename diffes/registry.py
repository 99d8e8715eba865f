"""Things found by name: strategies, mutations, pruning methods, metrics.

A name comes from a decorator in the running process or from an entry point of any installed package, ours included:
built-in strategies and mutations are entry points in this project's own `pyproject.toml`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from diffes.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing.

    Args:
        kind: what the things are, as error messages say it ("strategy").
        group: entry-point group in which installed packages offer more of them ("diffes.strategies").
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that gives a thing its name; the last one of a name wins, so a notebook cell can be run again."""

        def add(thing: T) -> T:
            self._registered[name] = thing
            return thing

        return add

    def unregister(self, name: str) -> None:
        """Takes a registered name back; names from entry points stay."""
        self._registered.pop(name, None)

    def get(self, name: str) -> T:
        """The thing of that name.

        Raises:
            DiffesError: nobody offers the name; the message lists the nearest ones.
        """
        if name not in self._registered:
            offered = self._entry_points()
            if name not in offered:
                raise unknown_name(self.kind, name, self.names())
            self._registered[name] = offered[name].load()
        return self._registered[name]

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported for it."""
        return sorted({*self._registered, *self._entry_points()})

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}
