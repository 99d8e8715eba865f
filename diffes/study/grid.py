"""Many searches side by side: any settings varied, over seeds, each cell measured on held-out probes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from diffes.errors import DiffesError, unknown_name
from diffes.files import checksum, parse_json, read_json, write_json
from diffes.forms import Cell, CellCosts, checked
from diffes.progress import Progress
from diffes.search.store import EvaluationStore
from diffes.study.comparison import Comparison, Failure
from diffes.study.config import ALONE, LATER, RunConfig, WorkerOptions
from diffes.study.equal_cost import calls_of, config_of, denser
from diffes.study.heldout import HeldOut, record_of
from diffes.study.lock import clear_leftovers, held, is_unused
from diffes.study.record import RunRecord
from diffes.study.settings import check_settings
from diffes.study.workbench import Workbench, prepare, search_on, vary
from diffes.study.workers import check_asynchronous, pool_of

log = logging.getLogger(__name__)
CELLS, COSTS, JOURNALS = "cells.jsonl", "costs.json", "journals"
SHARED = {  # settings that differ between cells of one calibrated model
    "strategy", "mutation", "crossover", "budget", "cost", "metric", "max_evals", "max_calls", "probes", "heldout",
    "seed", "storage", "asynchronous", "study",
}  # fmt: skip
CALLS_OF = {"probes", "steps", "guidance"}  # settings on which the calls of an evaluation depend
UNSEEN = {"seed", "storage", "study", "device", "bank_memory"}  # settings that no table needs to tell apart

_UNPRICED: dict[str, Any] = {  # settings that costs do not depend on
    name: getattr(RunConfig(), name) for name in SHARED - {"cost", "probes"}
}

_ONLY_CALIBRATED: dict[str, Any] = {
    "strategy": "uniform", "mutation": None, "crossover": None, "cost": "level", "budget": 0.5,
    "asynchronous": False, "study": None,
}  # fmt: skip


def parse_variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """What `diffes ablate` is to vary.

    Args:
        texts: `option=value,value,...`; an option may come again. A value with options of its own, which has a colon
            in it, is taken whole: `method=obs:damping=0.1,weighting=log`.

    Returns:
        Values by the name of the setting, in the order given.

    Raises:
        DiffesError: there is no such setting, or a value is not of its type.
    """
    hints = get_type_hints(RunConfig)
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not values:
            raise DiffesError(f"{text!r} varies nothing; write option=value,value, for instance stages=2,5,10")
        if name not in hints or name == "seed":
            raise unknown_name("option to vary", name, set(hints) - {"seed"})
        parts = [values] if ":" in values else values.split(",")
        found.setdefault(name, []).extend(_convert(name, part, hints[name]) for part in parts)
    if not found:
        raise DiffesError(
            "nothing to vary: write option=value,value, for instance stages=2,5,10 metric=ssim,latent_mse"
        )
    return found


def _convert(name: str, text: str, hint: Any) -> Any:
    types = [t for t in get_args(hint) if t is not type(None)] if isinstance(hint, UnionType) else [hint]
    choices = get_args(types[0])
    if choices and text not in choices:
        raise DiffesError(f"{name} must be one of {', '.join(map(str, choices))}, got {text!r}")
    if types[0] is bool:
        choices = ("true", "false")
        if text.lower() not in choices:
            raise DiffesError(f"{name} must be one of {', '.join(choices)}, got {text!r}")
        return text.lower() == "true"
    try:
        return text if choices else types[0](text)
    except ValueError as error:
        raise DiffesError(f"{name} must be a {types[0].__name__}, got {text!r}") from error


def grid(base: RunConfig, varied: Mapping[str, Sequence[Any]], seeds: int) -> list[RunConfig]:
    """Every combination of the values varied, times seeds from `base.seed` on; those of one calibrated model together.

    Where combinations differ in what an evaluation costs, all may spend the denoiser calls of `base`.

    Raises:
        DiffesError: a value is out of its range, or there are no seeds or values.
    """
    if seeds < 1:
        raise DiffesError(f"seeds must be at least 1, got {seeds}")
    if empty := [name for name, values in varied.items() if not values]:
        raise DiffesError(f"there is nothing to run: {empty[0]} has no values; give at least one")
    if CALLS_OF & set(varied) and "max_evals" not in varied and "max_calls" not in varied:
        base = replace(base, max_calls=calls_of(base))
    combinations = [
        replace(base, **dict(zip(varied, values, strict=True))) for values in itertools.product(*varied.values())
    ]
    combinations.sort(key=lambda config: [varied[name].index(getattr(config, name)) for name in _outer(varied)])
    return [replace(config, seed=base.seed + i) for config in combinations for i in range(seeds)]


def _outer(varied: Mapping[str, Sequence[Any]]) -> list[str]:
    return [name for name in varied if name not in SHARED]


def run_experiment(
    base: RunConfig,
    varied: Mapping[str, Sequence[Any]],
    seeds: int,
    out: Path,
    progress: Progress,
    workers: WorkerOptions = ALONE,
) -> Comparison:
    """Runs the cells of a grid and writes what is found into `out`, with what earlier commands found there.

    A cell that fails is noted, and tried again by the next command; the others go on. Where costs of what is compared
    differ by more than 0.5 %, the searches are made again at a budget above, so that values at the budget itself lie
    between two measured ones; each search may spend the same denoiser calls.

    Raises:
        DiffesError: as `grid` and `run_cells`, or all cells failed.
        OSError: as `run_cells`.
    """
    cells = grid(base, varied, seeds)
    with held(out):
        done, failed = _cells_in(out, cells, progress, workers=workers)
        if not done:
            raise DiffesError(f"all {len(failed)} cells failed, the first with: {failed[0].error}")
        comparison = _comparison(varied, cells, done, failed)
        ours = {_key(cell.to_json()) for cell in cells}
        again = [
            config for r in comparison.to_interpolate() if _key((config := config_of(r.settings)).to_json()) in ours
        ]
        if again:
            done, more = _cells_in(out, again, progress, above=True, seed=base.seed, workers=workers)
            comparison = _comparison(varied, cells, done, [*failed, *more])
        comparison.write(out)
    return comparison


def _comparison(
    varied: Mapping[str, Sequence[Any]],
    cells: Sequence[RunConfig],
    done: Mapping[str, RunRecord],
    failed: Sequence[Failure],
) -> Comparison:
    """What was found, the cells of this command first, by all settings in which any two of them differ."""
    keys = dict.fromkeys([*(_key(cell.to_json()) for cell in cells), *done])
    records = [done[key] for key in keys if key in done]
    settings = [*(record.settings for record in records), *(each.settings for each in failed)]
    others = [field.name for field in dataclasses.fields(RunConfig) if field.name not in {*varied, *UNSEEN}]
    names = [*varied, *(name for name in others if len({each[name] for each in settings}) > 1)]
    return Comparison(tuple(names), tuple(records), tuple(failed))


def run_cells(
    cells: Sequence[RunConfig], out: Path, progress: Progress, *, equal_calls: bool = True
) -> list[RunRecord]:
    """Runs the cells that are not in `out` yet, one after the other; what is finished is safe.

    A cell that was interrupted goes on from its own journal. One that fails does not stop the others.

    Args:
        cells: settings; those of one calibrated model should follow each other.
        out: folder of the results.
        progress: shows the cell within all of them, and the search within the cell.
        equal_calls: every cell may spend the denoiser calls of `calls_of`, however many schedules those measure; else
            it stops at its own `max_evals` or `max_calls`.

    Returns:
        A record for each cell, in their order.

    Raises:
        DiffesError: a setting is unusable, or `out` cannot be written, is in use, or holds something else; or, once
            the others are done, a cell failed.
        OSError: likewise.
    """
    with held(out):
        done, failed = _cells_in(out, cells, progress, equal_calls=equal_calls)
    if failed:
        raise DiffesError(f"{len(failed)} of {len(cells)} cells failed, the first with: {failed[0].error}")
    return [done[_key(cell.to_json())] for cell in cells]


def _cells_in(
    out: Path,
    cells: Sequence[RunConfig],
    progress: Progress,
    *,
    equal_calls: bool = True,
    above: bool = False,
    seed: int | None = None,
    workers: WorkerOptions = ALONE,
) -> tuple[dict[str, RunRecord], list[Failure]]:
    """Runs cells in a folder that this process holds.

    Args:
        cells: as of `run_cells`.
        out: likewise.
        progress: likewise.
        equal_calls: likewise.
        above: the cells are done; run each again at the budget above.
        seed: of the calibration; that of the first cell when left out, whichever cells are left to do.
        workers: who measures.

    Returns:
        All records in the folder, by key, and the cells that failed.
    """
    for cell in cells:
        check_settings(cell)
        if cell.study is not None:
            raise DiffesError(f"each search here has a journal of its own: leave --study {cell.study} out")
        check_asynchronous(cell, workers)
        if equal_calls and cell.time_limit is not None:
            raise DiffesError(
                f"all searches here spend equally many denoiser calls, which --time-limit {cell.time_limit:g} would "
                "cut; leave it out, and set --max-calls or --max-evals"
            )
    _open(out)
    done = {_key(record.settings): record for record in _read(out / CELLS)}
    costs: dict[str, Any] = read_json(out / COSTS) if (out / COSTS).exists() else {}
    checked(CellCosts, costs, out / COSTS)
    failed: list[Failure] = []
    bench: Workbench | None = None
    heldout: HeldOut | None = None
    pools = ExitStack()
    with progress.task(f"{len(cells)} cells" + " at the budget above" * above, len(cells)) as advance, pools:
        for cell in cells:
            key = _key(cell.to_json())
            if above or key not in done:
                try:
                    if bench is None or _differ(bench.config, cell):
                        bench = None  # two calibrated models at a time may be too many
                        pools.close()
                        calibration = cells[0].seed if seed is None else seed
                        settings = replace(cell, **_ONLY_CALIBRATED, seed=calibration)
                        bench = prepare(settings, progress, pool=pools.enter_context(pool_of(settings, workers)))
                    priced = _key(replace(cell, **_UNPRICED).to_json())
                    bench = vary(bench, cell, progress, costs.get(priced))
                    if priced not in costs:
                        costs[priced] = bench.costs
                        write_json(out / COSTS, costs)
                    if above:
                        bench = vary(bench, denser(cell, bench.space), progress, costs[priced])
                    if heldout is None or not heldout.serves(bench):
                        heldout = HeldOut(bench)
                    record = run_cell(bench, heldout, out / JOURNALS, progress, equal_calls=equal_calls)
                    record = replace(done[key], above=record) if above else record
                    with (out / CELLS).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record.to_json()) + "\n")
                    done[key] = RunRecord.from_json(record.to_json())
                except Exception as error:
                    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
                        raise  # no room or no access: the next cell would not fare better
                    log.exception("a cell failed: %s", cell)
                    failed.append(Failure(cell.to_json(), " ".join(f"{type(error).__name__}: {error}".split())))
                    bench = bench if isinstance(error, DiffesError) else None  # whatever state it is in
            advance("")
    return done, failed


def run_cell(
    bench: Workbench, heldout: HeldOut, journals: Path, progress: Progress, *, equal_calls: bool = True
) -> RunRecord:
    """One search and what it found, beside uniform pruning and fewer dense steps at the same cost."""
    store = EvaluationStore(journals / f"{_key(bench.config.to_json())}.journal", bench.space)
    limited = bench
    if equal_calls:
        limited = replace(bench, config=replace(bench.config, max_evals=10**9, max_calls=calls_of(bench.config)))
    return record_of(bench, heldout, search_on(limited, progress, store))


def _key(settings: Mapping[str, Any]) -> str:
    # settings that came later had their defaults, and levels were equal in all layers
    known = dataclasses.asdict(RunConfig()) | {"allocation": "equal"} | dict(settings)
    for name, default in LATER.items():
        if known[name] == default:  # so that keys of before are found
            del known[name]
    return checksum(known)[:16]


def _differ(one: RunConfig, other: RunConfig) -> bool:
    return any(getattr(one, f.name) != getattr(other, f.name) for f in dataclasses.fields(one) if f.name not in SHARED)


def _open(out: Path) -> None:
    if not is_unused(out) and not (out / CELLS).exists() and not (out / JOURNALS).exists():
        raise DiffesError(f"--out {out} is not empty and holds no comparison of diffes; name another folder")
    clear_leftovers(out)
    (out / JOURNALS).mkdir(parents=True, exist_ok=True)


def _read(path: Path) -> list[RunRecord]:
    """Records of finished cells; a line that a kill cut off is dropped, so that its cell runs again."""
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        path.write_text(whole, encoding="utf-8")
    try:
        rows = [parse_json(line) for line in whole.splitlines()]
        records = [RunRecord.from_json(checked(Cell, row, f"line {i}", "")) for i, row in enumerate(rows, 1)]
        return [replace(record, settings=config_of(record.settings).to_json()) for record in records]
    except (KeyError, TypeError, ValueError) as error:
        raise DiffesError(f"{path} is damaged ({error}); restore it, or move it away to run its cells again") from error
