"""Code of somebody else: what it raises is told in its name, with its own traceback and none of ours."""

from __future__ import annotations

import reprlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from diffes.errors import DiffesError, PluginError

OURS = ("diffes", "search_strategies")


@contextmanager
def guarded(thing: object, what: str, wanted: str) -> Iterator[None]:
    """Names a plug-in in whatever it raises inside the block; what we wrote ourselves is left to raise as it does.

    Args:
        thing: what is called inside: a function, a class or an object of it.
        what: how a message names it: "strategy HillClimb".
        wanted: what it must do: "return a list of proposals".

    Raises:
        DiffesError: it refused something; its name is put in front.
        PluginError: it raised anything else, or called `sys.exit`.
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
    """Whether a function, class or object comes with this package."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in OURS


def own_trace(error: BaseException) -> str:
    """The traceback of an error from the first line on that is not ours; empty where all of it is."""
    place = error.__traceback__
    while place is not None and str(place.tb_frame.f_globals.get("__name__")).split(".")[0] in OURS:
        place = place.tb_next
    return "" if place is None else "".join(traceback.format_exception(type(error), error, place))


def unexpected(what: str, wanted: str, found: object) -> DiffesError:
    """The error for a plug-in that returned something else than it must."""
    return DiffesError(f"{what} must {wanted}, got {reprlib.repr(found)}")
