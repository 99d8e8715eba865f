"""Errors that a user of diffes can fix. Messages say what was wrong, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffesError(ValueError):
    """Bad input. The message is one paragraph; the command line prints it without a traceback and exits with code 2."""


class DiffesWarning(UserWarning):
    """Warning for a user of diffes; the command line prints its message."""


class PluginError(DiffesError):
    """Error that a third-party plug-in raised.

    Attributes:
        trace: traceback of the plug-in, without that of diffes; the command line shows it below the message.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def unknown_name(kind: str, name: str, known: Iterable[str]) -> DiffesError:
    """Build the error for an unknown name, with the nearest known names first."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return DiffesError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


def at_least(name: str, value: int, least: int, most: int = 10**6) -> int:
    """Return the value if it is a whole number from `least` to `most`. Beyond `most` a search might never end.

    Raises:
        DiffesError: it is not; the message names the parameter.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise DiffesError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise DiffesError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise DiffesError(f"{name} must be at most {most}, got {value}")
    return value
