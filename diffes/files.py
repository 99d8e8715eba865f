"""Files that are complete or missing, never partial: written to a temporary name, then moved, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from safetensors import SafetensorError

from diffes.errors import DiffesError
from diffes.forms import AGAIN

SHIPPED = Path(__file__).parent / "models"  # trained pipelines that come with the package
CONFIG = "config.json"  # a folder that holds it is a run, and its missing files are still to be written


def shipped_models() -> list[str]:
    """Return the names of the trained pipelines that come with the package.

    Example:
        >>> shipped_models()
        ['emoji-sdxl', 'fashion-dit']
    """
    return sorted(path.parent.name for path in SHIPPED.glob("*/model_index.json"))


def write_safely(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there when it is complete. An error leaves `path` as it was.

    Raises:
        DiffesError: the disk is full, or the folder cannot be written to.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        try:
            write(partial)
            partial.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DiffesError(
            f"cannot write {path} ({error}). Finished work is kept: make room, and run the same command again."
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_safely(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Parse standard JSON: no NaN, and nested no deeper than a call stack.

    Raises:
        ValueError: the text is not such JSON.
    """
    return from_json(text, allow_inf_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a run folder.

    Raises:
        DiffesError: the file is missing, truncated, or not a JSON object.
    """
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        hint = (
            "the run is unfinished: run the same `diffes search` again to go on"
            if path.with_name(CONFIG).exists()
            else ("this is no run folder of diffes")
        )
        raise DiffesError(f"{path} is missing; {hint}") from error
    except (ValueError, OSError) as error:
        raise DiffesError(f"{path} is damaged ({error}); {AGAIN}") from error
    if not isinstance(data, dict):
        raise DiffesError(f"{path} does not hold a JSON object; {AGAIN}")
    return data


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with a digest of its content, `checksum`."""
    write_json(path, {**data, "checksum": checksum(data)})


def check_seal(path: Path, data: Mapping[str, Any]) -> None:
    """Check that the content of a sealed file is what was written.

    Raises:
        DiffesError: its digest differs.
    """
    if data.get("checksum") != checksum(data):
        raise DiffesError(f"{path} was changed after it was written (its checksum differs); {AGAIN}")


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(data: Mapping[str, Any]) -> str:
    """Return the hex digest of everything in a JSON object but its own `checksum`."""
    content = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
