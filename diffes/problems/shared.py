"""Cache of expensive objects of one calibrated model: evaluators with their references, rivals that were measured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

KEPT = 8  # of a kind; a comparison of plans needs the evaluators of a search, of a final fit and of held-out probes


class Shared:
    """Cache of the last few objects of each kind.

    Example:
        >>> cache = Shared(kept=1)
        >>> cache.get("a", 1, lambda: "x"), cache.get("a", 1, lambda: "y"), cache.get("a", 2, lambda: "z")
        ('x', 'x', 'z')
        >>> cache.get("b", 1, lambda: "u"), cache.get("a", 1, lambda: "v")
        ('u', 'v')
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._made: dict[str, OrderedDict[Hashable, Any]] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the object of a kind and key; make it if it is not kept."""
        made = self._made.setdefault(kind, OrderedDict())
        if key not in made:
            made[key] = make()
        made.move_to_end(key)
        while len(made) > self._kept:
            made.popitem(last=False)
        return made[key]
