"""Things found by name: strategies, mutations, pruning methods, metrics.

A name comes from a decorator in the running process or from an entry point of any installed package, ours included:
built-in strategies and mutations are entry points in this project's own `pyproject.toml`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from diffes.errors import DiffesError, unknown_name
from diffes.plugins import guarded, is_ours, unexpected

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing.

    Args:
        kind: what the things are, as error messages say it ("strategy").
        group: entry-point group in which installed packages offer more of them ("diffes.strategies").
        base: the class that all of them are subclasses of; None for functions.
    """

    def __init__(self, kind: str, group: str, base: type | None = None) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._registered: dict[str, T] = {}
        self._local: set[str] = set()  # names that other processes do not know, or know as something else

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that gives a thing its name; the last one of a name wins, so a notebook cell can be run again."""

        def add(thing: T) -> T:
            self._registered[name] = thing
            if not is_ours(thing) or getattr(thing, "__name__", None) != name:
                self._local.add(name)
            return thing

        return add

    def unregister(self, name: str) -> None:
        """Takes a registered name back; names from entry points stay."""
        self._registered.pop(name, None)
        self._local.discard(name)

    def get(self, name: str) -> T:
        """The thing of that name.

        Raises:
            DiffesError: nobody offers the name; the message lists the nearest ones. Or what is offered does not import,
                or is something else.
        """
        if name not in self._registered:
            if name not in self._entry_points():
                _offered.cache_clear()  # its package may have been installed meanwhile
            offered = self._entry_points()
            if name not in offered:
                raise unknown_name(self.kind, name, self.names())
            with guarded(None, f"{self.kind} {name!r} of {offered[name].value}", "be importable"):
                self._registered[name] = offered[name].load()
        thing = self._registered[name]
        if self._base is None and not callable(thing):
            raise unexpected(f"{self.kind} {name!r}", "be a function", thing)
        if self._base is not None and not (isinstance(thing, type) and issubclass(thing, self._base)):
            raise unexpected(f"{self.kind} {name!r}", f"be a subclass of {self._base.__qualname__}", thing)
        return thing

    def parse(self, spec: str) -> tuple[T, dict[str, Any]]:
        """The thing and its options of a spec: a name, or `name:option=value,option=value`.

        Raises:
            DiffesError: nobody offers the name, or the options are not of that form.
        """
        if not isinstance(spec, str):
            raise DiffesError(f"a {self.kind} is given by its name, got {spec!r}")
        name, _, text = spec.partition(":")
        options: dict[str, Any] = {}
        for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", text) if text else ():
            option, equals, value = part.partition("=")
            if not (equals and option.isidentifier() and value):
                raise DiffesError(f"{self.kind} {spec!r}: {part!r} is no option; write name:option=value,option=value")
            try:
                options[option] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[option] = value
        return self.get(name), options

    def bind(self, spec: str, n_args: int = 0, **kwargs: Any) -> Callable[..., Any]:
        """The thing of a spec with keyword arguments and the options of the spec filled in, to be called with the rest.

        Args:
            spec: as for `parse`.
            n_args: how many positional arguments it will be called with.
            kwargs: keyword arguments that are not the user's to choose.

        Raises:
            DiffesError: as `parse`, or the thing has no such option.
        """
        thing: Any
        thing, options = self.parse(spec)
        signature = inspect.signature(thing)
        try:
            signature.bind(*[None] * n_args, **kwargs, **options)
        except TypeError as error:
            known = [name for name in signature.parameters if name not in kwargs][n_args:]
            raise DiffesError(f"{self.kind} {spec!r}: {error}; its options are {', '.join(known) or 'none'}") from error
        return functools.partial(thing, **kwargs, **options)

    def make(self, spec: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the thing of a spec with the arguments given and the options of the spec; errors as `bind`."""
        made = self.bind(spec, len(args), **kwargs)
        try:
            with guarded(self.parse(spec)[0], f"{self.kind} {spec!r}", "take these options"):
                return made(*args)
        except DiffesError as error:
            if ":" not in spec or spec in str(error):
                raise
            raise DiffesError(f"{self.kind} {spec!r}: {error}") from error
        except (TypeError, ValueError) as error:
            if ":" not in spec:
                raise
            raise DiffesError(f"{self.kind} {spec!r}: an option is not of its type ({error})") from error

    def is_known_elsewhere(self, spec: str) -> bool:
        """Whether other processes find the same by the name in a spec, and by all names that packages offer, of which
        one may be a default: none was registered in this process alone."""
        return not self._local or self._local.isdisjoint({spec.partition(":")[0], *self._entry_points()})

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported for it."""
        return sorted({*self._registered, *self._entry_points()})

    def _entry_points(self) -> dict[str, EntryPoint]:
        return _offered(self.group, tuple(sys.path))


@functools.cache
def _offered(group: str, _path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """What the packages of a path offer, by name: to read it takes some 25 ms."""
    return {point.name: point for point in entry_points(group=group)}
