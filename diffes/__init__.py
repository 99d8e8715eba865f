"""diffes: stage-wise structural pruning schedules for diffusion models, found by evolutionary search.

`diffes.apply(pipe, "runs/x")` makes a diffusers pipeline run a schedule that was found; `diffes.remove(pipe)` takes it
off again. `diffes.load(FOLDER)` opens an exported run, `diffes.load_pipeline("fashion-dit")` a pipeline that ships with
the package. Searches run from the shell (`diffes search --help`) or on a `diffes.workbench(model="fashion-dit")`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diffes.errors import DiffesError

if TYPE_CHECKING:
    from diffes.adapters import load_pipeline
    from diffes.bench import workbench
    from diffes.pipeline import apply, load, remove
    from diffes.strategy import crossover, mutation

__all__ = [
    "DiffesError", "apply", "crossover", "load", "load_pipeline", "mutation", "remove", "workbench",
]  # fmt: skip
__version__ = version("diffes")

_LAZY = {
    "apply": "diffes.pipeline",
    "crossover": "diffes.strategy",
    "load": "diffes.pipeline",
    "load_pipeline": "diffes.adapters",
    "mutation": "diffes.strategy",
    "remove": "diffes.pipeline",
    "workbench": "diffes.bench",
}


def __getattr__(name: str) -> Any:
    """torch and diffusers are imported when something of theirs is first asked for: schedules need neither."""
    if name not in _LAZY:
        raise AttributeError(f"module 'diffes' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
