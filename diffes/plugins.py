"""Third-party code: its errors are reported under its name, with its own traceback and without that of diffes."""

from __future__ import annotations

import reprlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from diffes.errors import DiffesError, PluginError

OURS = ("diffes", "search_strategies")


@contextmanager
def guarded(thing: object, what: str, wanted: str) -> Iterator[None]:
    """Name a plug-in in the errors that it raises inside the block. Errors of our own code are left as they are.

    Args:
        thing: what the block calls: a function, a class or an instance of it.
        what: name of the plug-in in messages: "strategy HillClimb".
        wanted: what it must do: "return a list of proposals".

    Raises:
        DiffesError: the plug-in raised a `DiffesError`; its name is put in front.
        PluginError: the plug-in raised anything else, or called `sys.exit`.
    """
    if is_ours(thing):
        yield
        return
    try:
        yield
    except PluginError:
        raise
    except DiffesError as error:
        raise DiffesError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:200]
        told = type(error).__name__ + (f": {said}" if said else "")
        raise PluginError(f"{what} failed ({told}); it must {wanted}", own_trace(error)) from error


def is_ours(thing: object) -> bool:
    """Check whether a function, class or object comes with this package."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in OURS


def own_trace(error: BaseException) -> str:
    """Return the traceback of an error from the first frame outside this package on; empty if there is none."""
    place = error.__traceback__
    while place is not None and str(place.tb_frame.f_globals.get("__name__")).split(".")[0] in OURS:
        place = place.tb_next
    return "" if place is None else "".join(traceback.format_exception(type(error), error, place))


def unexpected(what: str, wanted: str, found: object) -> DiffesError:
    """Build the error for a plug-in that returned something else than it must."""
    return DiffesError(f"{what} must {wanted}, got {reprlib.repr(found)}")
