"""Searches, fronts, comparisons and ablations as functions, for notebooks: what the commands of the same names do."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

from diffusers import DiffusionPipeline

from diffes.adapters import ModelAdapter, adapter_for
from diffes.config import COMPARED, FRONT, LARGE, OF_LARGE, RunConfig, WorkerOptions, settings_of
from diffes.errors import DiffesError
from diffes.figures import tables
from diffes.forms import FrontRecord, PlanPoint
from diffes.progress import Progress, RichProgress
from diffes.results.artifact import plan_of, read_front
from diffes.results.folder import Finished
from diffes.results.frames import dataframe
from diffes.results.record import Report
from diffes.results.report import read_report
from diffes.spaces.schedule import Plan
from diffes.study.comparison import Comparison
from diffes.study.front import complete_front
from diffes.study.grid import run_experiment
from diffes.study.run import complete_run

T = TypeVar("T")
IN_MEMORY = "diffes-result-"  # begins the name of a folder that is gone with its result


@dataclass(frozen=True)
class Front:
    """Finished front. A notebook shows its table and what it says.

    Args:
        out: its folder, for `diffes.apply`, `diffes sample` and `diffes export`.
        record: content of its `front.json`.
    """

    out: Path
    record: FrontRecord

    @property
    def points(self) -> list[PlanPoint]:
        """Plans with their measurements."""
        return self.record.points

    def plans(self) -> dict[str, Plan]:
        """Return the plans by kind and budget, as `diffes.apply` and `figures.plots.plans` take them."""
        return {f"{point.kind}, {point.budget:g}": plan_of(self.record, point) for point in self.points}

    def verdicts(self) -> list[str]:
        """Return a sentence for each budget that compares its plans."""
        return tables.verdicts(self.record)

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with a row for each plan.

        Raises:
            DiffesError: pandas is not installed.
        """
        return dataframe([point.model_dump() for point in self.points])

    def _repr_markdown_(self) -> str:
        rows = [tables.COLUMNS, ["---"] * len(tables.COLUMNS), *tables.rows_of(self.points)]
        return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *(f"\n{line}" for line in self.verdicts())])


@overload
def search(out: DiffusionPipeline, **settings: Any) -> Front: ...


@overload
def search(out: str | Path | None = None, **settings: Any) -> Front | Report: ...


def search(
    out: str | Path | DiffusionPipeline | None = None,
    *,
    model: str | DiffusionPipeline = RunConfig.model,
    call: Mapping[str, Any] | str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    workers: int = 1,
    **settings: Any,
) -> Front | Report:
    """Search a plan, or a schedule (genes="levels"), and write a run folder, as `diffes search` does.

    The same call on an unfinished folder goes on where it stopped, and on a finished one returns what is there.

    A pipeline object takes the place of a folder (`search(pipe, calls=8)`), or of the model's name
    (`search("runs/x", model=pipe)`). Of a pipeline of any class, plans of dense calls are searched (genes="steps",
    which is the default there if diffes does not know the class). Guidance is that of the call or, where the call has
    none, the default of the pipeline. Denoisers of more than 300 million parameters get fewer and smaller probes unless
    settings say otherwise (`diffes.config.OF_LARGE`).

    Args:
        out: the folder; a pipeline object, or None, keeps the result as long as it is used, and cannot go on later.
        model: a name, folder or hub id, or a pipeline object.
        call: arguments of the pipeline's call, of any kind with a pipeline object: prompt, height, image and so on.
            Of a list of prompts every second one is held out. With a name: a JSON file of them.
        progress: progress display; bars when left out.
        overwrite: replace what is there.
        workers: number of processes that measure.
        settings: fields of `diffes.RunConfig`.

    Returns:
        The front of one budget, or the report of a schedule.

    Raises:
        DiffesError: a setting is unusable, or the folder holds something else.
    """
    out, adapter, config = _of_pipeline(out, model, call, workers, settings)
    config = config.resolved()
    options: dict[str, Any] = {"overwrite": overwrite, "workers": WorkerOptions(workers)}
    if adapter is not None:
        options["adapter"] = adapter
    if config.genes == "levels":
        if adapter is not None:
            raise DiffesError("schedules of levels are searched for a model by name: give model=FOLDER")
        make = partial(complete_run, config, Path(out), progress or RichProgress(), **options)
        return _made(make, partial(read_report, Path(out)))
    assert config.calls is not None
    made = _front_of(out, config, [config.calls], progress, **options)
    if adapter is not None and out.name.startswith(IN_MEMORY):
        weakref.finalize(made, shutil.rmtree, out, ignore_errors=True)
    return made


def _of_pipeline(
    out: str | Path | DiffusionPipeline | None,
    model: str | DiffusionPipeline,
    call: Mapping[str, Any] | str | None,
    workers: int,
    settings: Mapping[str, Any],
) -> tuple[Path, ModelAdapter | None, RunConfig]:
    """Return the folder, the adapter of a pipeline object if there is one, and the settings."""
    pipe = next((each for each in (out, model) if isinstance(each, DiffusionPipeline)), None)
    folder = out if isinstance(out, str | Path) else None
    if pipe is None:
        if folder is None:
            raise DiffesError("give out, the folder of the run, or a pipeline object to keep the result in memory")
        if isinstance(call, Mapping):
            raise DiffesError("with the name of a model, call is a JSON file; with a pipeline object, the arguments")
        return Path(folder), None, settings_of({**settings, "model": model, "call": call})
    if workers > 1:
        raise DiffesError(
            f"workers={workers} load the model by its name, and a pipeline object was given: save it "
            "(pipe.save_pretrained), and give the folder as model, or leave workers out"
        )
    if isinstance(out, DiffusionPipeline) and not (model == RunConfig.model or model is out):
        raise DiffesError(f"a pipeline object was given, and model={model!r} beside it: leave one out")
    adapter, given = adapter_for(pipe), dict(settings)
    given["guidance"] = adapter.use_given({} if call is None else call, given.get("guidance"))
    if not adapter.batched:
        given.setdefault("genes", "steps")
    if sum(parameter.numel() for parameter in adapter.denoiser.parameters()) > LARGE:
        given = {**OF_LARGE, **given}
    dtype = str(adapter.dtype).removeprefix("torch.")
    known = dtype if dtype in ("float32", "float16", "bfloat16") else "bfloat16"
    name = pipe.config.get("_name_or_path") or type(pipe).__name__
    config = settings_of({**given, "model": name, "device": str(adapter.device), "dtype": known})
    return Path(tempfile.mkdtemp(prefix=IN_MEMORY)) if folder is None else Path(folder), adapter, config


def front(
    out: str | Path,
    budgets: Sequence[float],
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    workers: int = 1,
    **settings: Any,
) -> Front:
    """Search plans at several budgets in dense calls, and write a folder, as `diffes front` does; see `search`."""
    if settings.get("calls") is not None:
        raise DiffesError(f"calls={settings['calls']} is one budget. In a front, use budgets instead")
    config = settings_of(dataclasses.asdict(FRONT) | settings)
    return _front_of(Path(out), config, budgets, progress, overwrite=overwrite, workers=WorkerOptions(workers))


def _front_of(
    out: Path, config: RunConfig, budgets: Sequence[float], progress: Progress | None, **options: Any
) -> Front:
    make = partial(complete_front, config, budgets, out, progress or RichProgress(), **options)
    return Front(out, _made(make, partial(read_front, out)))


def _made(make: Callable[[], T], read: Callable[[], T]) -> T:
    """Make a result, or read it if its folder holds it."""
    try:
        return make()
    except Finished:
        return read()


def compare(
    out: str | Path,
    strategies: Sequence[str] | None = None,
    *,
    seeds: int = 5,
    progress: Progress | None = None,
    workers: int = 1,
    **settings: Any,
) -> Comparison:
    """Compare strategies at an equal number of denoiser calls, over seeds, as `diffes compare` does.

    Args:
        out: folder of the results; what is finished there is not run again.
        strategies: names, with options after a colon; the first is what the others are tested against. Those of
            `diffes compare` when left out.
        seeds: number of searches of each.
        progress: progress display; bars when left out.
        workers: number of processes that measure.
        settings: fields of `diffes.RunConfig`.

    Raises:
        DiffesError: a setting is unusable, or all cells failed.
    """
    config = settings_of(settings)
    if config.strategy != "auto":
        raise DiffesError(f"strategy={config.strategy!r} is one strategy. In a comparison, use strategies instead")
    if isinstance(strategies, str):
        raise DiffesError(f"strategies are a list of names, got the text {strategies!r}")
    names = list(strategies) if strategies else COMPARED[config.kind]
    return run_experiment(
        config, {"strategy": names}, seeds, Path(out), progress or RichProgress(), WorkerOptions(workers)
    )


def ablate(
    out: str | Path,
    varied: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 3,
    progress: Progress | None = None,
    workers: int = 1,
    **settings: Any,
) -> Comparison:
    """Measure every combination of some settings, over seeds, as `diffes ablate` does; see `compare`.

    Args:
        out: folder of the results.
        varied: values by the name of a setting, for instance {"calls": [4, 6], "solver": ["fitted", "dpmsolver++"]}.
        seeds: number of searches of each combination.
        progress: progress display; bars when left out.
        workers: number of processes that measure.
        settings: fields of `diffes.RunConfig`.
    """
    config = settings_of(settings)
    if not isinstance(varied, Mapping):
        raise DiffesError(f"varied holds values by the name of a setting, like {{'calls': [4, 6]}}, got {varied!r}")
    return run_experiment(config, varied, seeds, Path(out), progress or RichProgress(), WorkerOptions(workers))
