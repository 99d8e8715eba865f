"""diffes: stage-wise structural pruning schedules for diffusion models, found by evolutionary search.

`diffes.apply(pipe, "runs/x")` applies the schedule of a run to a diffusers pipeline; `diffes.remove(pipe)` removes it.
`diffes.load(FOLDER)` opens an exported run, `diffes.load_pipeline("fashion-dit")` a pipeline that ships with the
package. Searches run from the shell (`diffes search --help`) or on a `diffes.workbench(model="fashion-dit")`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from diffes.errors import DiffesError

if TYPE_CHECKING:
    from diffes.adapters import load_pipeline
    from diffes.config import RunConfig
    from diffes.measure.currencies import cost
    from diffes.measure.metrics import metric
    from diffes.problems.workbench import workbench
    from diffes.pruning import pruning_method
    from diffes.runtime.apply import apply, load, remove
    from diffes.solvers import Solver, solver
    from diffes.solvers.scheduler import PlanScheduler
    from diffes.spaces.operators import crossover, mutation
    from diffes.spaces.strategy import Strategy, strategy
    from diffes.study.fit import fit
    from diffes.study.functions import ablate, compare, front, search

__all__ = [
    "DiffesError", "PlanScheduler", "RunConfig", "Solver", "Strategy", "ablate", "apply", "compare", "cost",
    "crossover", "fit", "front", "load", "load_pipeline", "metric", "mutation", "pruning_method", "remove", "search",
    "solver", "strategy", "workbench",
]  # fmt: skip

try:
    __version__ = version("diffes")
except PackageNotFoundError as error:
    raise ImportError(
        "diffes is not installed. Run `pip install -e .` in the folder of its pyproject.toml: strategies, methods and "
        "models are found through the installed package."
    ) from error

_LAZY = {
    "PlanScheduler": "diffes.solvers.scheduler",
    "RunConfig": "diffes.config",
    "Solver": "diffes.solvers",
    "Strategy": "diffes.spaces.strategy",
    "ablate": "diffes.study.functions",
    "apply": "diffes.runtime.apply",
    "compare": "diffes.study.functions",
    "cost": "diffes.measure.currencies",
    "crossover": "diffes.spaces.operators",
    "fit": "diffes.study.fit",
    "front": "diffes.study.functions",
    "load": "diffes.runtime.apply",
    "load_pipeline": "diffes.adapters",
    "metric": "diffes.measure.metrics",
    "mutation": "diffes.spaces.operators",
    "pruning_method": "diffes.pruning",
    "remove": "diffes.runtime.apply",
    "search": "diffes.study.functions",
    "solver": "diffes.solvers",
    "strategy": "diffes.spaces.strategy",
    "workbench": "diffes.problems.workbench",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because torch and diffusers load slowly and schedules need neither."""
    if name not in _LAZY:
        raise AttributeError(f"module 'diffes' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
