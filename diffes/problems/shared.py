"""Cache of expensive objects of one calibrated model: evaluators with their references."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

KEPT = 8  # evaluators; a comparison of plans needs those of a search, of a final fit and of held-out probes at a time


class Shared:
    """Cache of the last few objects, by key.

    Example:
        >>> cache = Shared(kept=1)
        >>> cache.get("a", lambda: 1), cache.get("a", lambda: 2), cache.get("b", lambda: 3), cache.get("a", lambda: 4)
        (1, 1, 3, 4)
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._made: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the object of a key; make it if it is not kept."""
        if key not in self._made:
            self._made[key] = make()
        self._made.move_to_end(key)
        while len(self._made) > self._kept:
            self._made.popitem(last=False)
        return self._made[key]
