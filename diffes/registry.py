"""Registries of things that are found by name: strategies, mutations, pruning methods, metrics.

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
    """Registry of the things of one kind, by name.

    Args:
        kind: name of the kind in error messages ("strategy").
        group: entry-point group in which installed packages offer more of them ("diffes.strategies").
        base: base class of all of them; None for functions.
    """

    def __init__(self, kind: str, group: str, base: type | None = None) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._registered: dict[str, T] = {}
        self._local: set[str] = set()  # names that mean nothing, or something else, in other processes

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that gives a thing its name. The last one wins, so a notebook cell can be run again."""

        def add(thing: T) -> T:
            self._registered[name] = thing
            if not is_ours(thing) or getattr(thing, "__name__", None) != name:
                self._local.add(name)
            return thing

        return add

    def unregister(self, name: str) -> None:
        """Remove a registered name. Names from entry points stay."""
        self._registered.pop(name, None)
        self._local.discard(name)

    def get(self, name: str) -> T:
        """Return the thing of a name.

        Raises:
            DiffesError: the name is unknown (the message lists the nearest ones), or the thing does not import, or is
                not of this kind.
        """
        if name not in self._registered:
            if name not in self._entry_points():
                _offered.cache_clear()  # its package may have been installed meanwhile
            offered = self._entry_points()
            if name not in offered:
                raise unknown_name(self.kind, name, self.names())
            with guarded(None, f"{self.kind} {name!r} of {offered[name].value}", "be importable"):
                self._registered[name] = offered[name].load()
            self._local.discard(name)  # it is also there if a decorator of that package has registered it
        thing = self._registered[name]
        if self._base is None and not callable(thing):
            raise unexpected(f"{self.kind} {name!r}", "be a function", thing)
        if self._base is not None and not (isinstance(thing, type) and issubclass(thing, self._base)):
            raise unexpected(f"{self.kind} {name!r}", f"be a subclass of {self._base.__qualname__}", thing)
        return thing

    def parse(self, spec: str) -> tuple[T, dict[str, Any]]:
        """Return the thing and the options of a spec: a name, or `name:option=value,option=value`.

        Raises:
            DiffesError: the name is unknown, or the options are not of that form.
        """
        if not isinstance(spec, str):
            raise DiffesError(f"{self.kind} must be a name, got {spec!r}")
        name, _, text = spec.partition(":")
        options: dict[str, Any] = {}
        for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", text) if text else ():
            option, equals, value = part.partition("=")
            if not (equals and option.isidentifier() and value):
                raise DiffesError(
                    f"{self.kind} {spec!r}: {part!r} is not an option. Write name:option=value,option=value."
                )
            try:
                options[option] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
            except (ValueError, SyntaxError):
                options[option] = value
        return self.get(name), options

    def bind(self, spec: str, n_args: int = 0, **kwargs: Any) -> Callable[..., Any]:
        """Bind keyword arguments and the options of a spec to its thing. Return a function of the other arguments.

        Args:
            spec: see `parse`.
            n_args: number of positional arguments that it will be called with.
            kwargs: keyword arguments that the user cannot choose.

        Raises:
            DiffesError: see `parse`; or the thing has no such option.
        """
        thing: Any
        thing, options = self.parse(spec)
        signature = inspect.signature(thing)
        try:
            signature.bind(*[None] * n_args, **kwargs, **options)
        except TypeError as error:
            known = [name for name in signature.parameters if name not in kwargs][n_args:]
            raise DiffesError(f"{self.kind} {spec!r}: {error}. Its options: {', '.join(known) or 'none'}.") from error
        return functools.partial(thing, **kwargs, **options)

    def make(self, spec: str, *args: Any, **kwargs: Any) -> Any:
        """Call the thing of a spec with the given arguments and the options of the spec.

        Raises:
            DiffesError: see `bind`; or the thing refuses its options.
            PluginError: the thing does not come with diffes and raised any other error.
        """
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
            raise DiffesError(f"{self.kind} {spec!r}: an option has the wrong type ({error})") from error

    def is_known_elsewhere(self, spec: str) -> bool:
        """Check whether other processes find the same thing by the name in a spec.

        The same must hold for all names that packages offer, because one of them may be a default. It fails for names
        that were registered in this process only.
        """
        return not self._local or self._local.isdisjoint({spec.partition(":")[0], *self._entry_points()})

    def names(self) -> list[str]:
        """Return all names, sorted, without importing anything."""
        return sorted({*self._registered, *self._entry_points()})

    def _entry_points(self) -> dict[str, EntryPoint]:
        return _offered(self.group, tuple(sys.path))


@functools.cache
def _offered(group: str, _path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return the entry points of the packages on a path, by name. Reading them takes some 25 ms, hence the cache."""
    return {point.name: point for point in entry_points(group=group)}


GROUPS = {  # entry-point groups of what settings name, and what these are called in messages
    "genes": ("genes", "diffes.problems"), "strategy": ("strategy", "diffes.strategies"),
    "method": ("pruning method", "diffes.pruning_methods"), "solver": ("solver of plans", "diffes.solvers"),
    "cost": ("cost", "diffes.costs"), "mutation": ("mutation", "diffes.mutations"),
    "crossover": ("crossover", "diffes.crossovers"),
}  # fmt: skip


def check_names(**specs: str | None) -> None:
    """Check that installed packages offer what settings name, without importing any of it.

    Args:
        specs: a spec, or several joined by "+", by the name of its setting; None and "auto" name nothing.

    Raises:
        DiffesError: a name is unknown.

    Example:
        >>> check_names(strategy="evolution:mu=4", method="obs+deep_reuse", solver=None)
    """
    for setting, given in specs.items():
        kind, group = GROUPS[setting]
        known = _offered(group, tuple(sys.path))
        for spec in (given or "auto").split("+") if setting == "method" else [given or "auto"]:
            name = spec.partition(":")[0]
            if name != "auto" and not name.startswith("deap.") and name not in known:
                raise unknown_name(kind, name, sorted(known))
