"""Export of a finished run, or of a plan of a front, as a complete folder: base model or its name, JSON, bank, card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffes import files
from diffes.adapters import model_folder, pipeline_class, shipped_models
from diffes.errors import DiffesError
from diffes.figures import card
from diffes.forms import FrontRecord, LayerSplit, ScheduleFacts
from diffes.pruning.bank import WeightBank
from diffes.results import artifact, folder, report
from diffes.spaces.schedule import Plan, Schedule

CARD = "README.md"
FILES = {
    artifact.SCHEDULE, artifact.FRONT, artifact.BANK, artifact.BASE, folder.REPORT, *folder.FIGURES, folder.FRONT, CARD,
}  # fmt: skip


def export(
    run: Path, out: Path, *, calls: float | None = None, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write a folder that `diffes.load` opens on another machine, and that can be pushed to a hub unchanged.

    A base model in a local folder is copied; one that ships with diffes or comes from a hub is only named. The folder
    appears when it is complete; an error leaves `out` as it was.

    Args:
        run: folder of a finished run, or of a front, of which one plan is exported.
        out: the folder to write.
        calls: for a front, the most that the plan may cost, in dense denoiser calls (see `diffes.apply`).
        dtype: data type of the compensated weights in the bank; as in the run when left out.
        overwrite: replace an earlier export.

    Raises:
        DiffesError: the run is damaged or unfinished, no plan is as cheap as `calls`, or `out` cannot be written.
    """
    found, facts = artifact.chosen(run, calls)
    model = artifact.base_model(run, facts.model)
    base = None if facts.model in shipped_models() else model_folder(model)
    if isinstance(facts, FrontRecord):
        figures = [folder.FRONT]
        rivals = [point for point in artifact.read_front(run).points if point.budget == facts.points[0].budget]
        pipeline = pipeline_class(model)
    else:
        measured, figures = report.read_report(run), list(folder.FIGURES)
        if facts.split is None:  # older runs had none
            figures.remove("split.png")
    for name in figures:
        if not (run / name).is_file():
            raise DiffesError(f"{run / name} is missing; restore it or run the same command again")
    bank, header = WeightBank.open(run / artifact.BANK)
    bank = bank.for_schedule(found)
    _check_place(out, base, overwrite)
    named: dict[str, Any] = {"model": facts.model if base is None else f"./{artifact.BASE}"}
    if facts.split is not None:
        named["split"] = _part_of(facts.split, bank).to_json()
    with _whole(out) as new:
        if base is not None:
            shutil.copytree(base, new / artifact.BASE, ignore=shutil.ignore_patterns("calibration.npz"))
        kept = getattr(torch, dtype) if dtype else None
        files.write_safely(new / artifact.BANK, lambda partial: bank.save(partial, header | named, kept))
        for name in figures:
            shutil.copy2(run / name, new / name)
        if isinstance(facts, FrontRecord) and isinstance(found, Plan):
            front = FrontRecord(**facts.to_json() | named)
            artifact.write_front(new, front)
            text = card.of_plan(out.name, found, front, rivals, pipeline)
        elif isinstance(found, Schedule):
            own = ScheduleFacts(**facts.to_json() | named)
            artifact.write_schedule(new, found, own.to_json())
            report.write_report(new, replace(measured, run=measured.run.named(own.model)))
            text = card.of_run(out.name, found, own, measured)
        (new / CARD).write_text(text, encoding="utf-8")


def _part_of(split: LayerSplit, bank: WeightBank) -> LayerSplit:
    """Return the part of a split of levels over layers that is of the stages and levels that the bank holds."""
    places = {f"stage{stage}.level{level}" for stage, level in bank}
    kept = {place: counts for place, counts in split.kept.items() if place in places}
    return split.model_copy(update={"kept": kept})


def _check_place(out: Path, base: Path | None, overwrite: bool) -> None:
    """Raise if `out` holds anything but an earlier export, or lies in the base model that is copied."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = {path.name for path in out.iterdir()} <= FILES and (out / CARD).is_file() if out.is_dir() else False
        if not (overwrite and ours):
            hint = "pass --overwrite to replace it, or name" if ours else "name"
            raise DiffesError(f"{out} exists and is not empty; {hint} another folder")
    if base is not None and base.resolve() in (out.resolve(), *out.resolve().parents):
        raise DiffesError(f"{out} lies in the folder of the base model, which is copied into it; name another folder")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield an empty folder, and put it in place of `out` once it is filled. An error leaves `out` as it was."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".partial-{out.name}-") as scratch:
            new = Path(scratch) / out.name
            new.mkdir()
            yield new
            if out.is_dir():
                os.replace(out, Path(scratch) / "before")  # removed with the scratch folder at the end
            try:
                os.replace(new, out)
            except OSError:
                if (Path(scratch) / "before").is_dir():
                    os.replace(Path(scratch) / "before", out)
                raise
    except OSError as error:
        raise DiffesError(f"cannot write {out} ({error}); what was there before is untouched") from error
