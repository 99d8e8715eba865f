"""A finished run as a folder that stands alone: base model or its name, schedule, bank and a card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffes import files
from diffes.adapters import model_folder, shipped_models
from diffes.errors import DiffesError
from diffes.pruning.bank import WeightBank
from diffes.runtime import artifact
from diffes.search.schedule import Schedule
from diffes.study import folder, report
from diffes.study.record import Report

CARD = "README.md"
FILES = {artifact.SCHEDULE, artifact.BANK, folder.REPORT, *folder.FIGURES, artifact.BASE, CARD}


def export(run: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False) -> None:
    """Writes a folder that `diffes.load` opens on another machine, and that can be pushed to a hub as it stands.

    A base model that lies in a local folder is copied along; one that ships with diffes or comes from a hub is named.
    The folder appears when it is whole; an error leaves `out` as it was.

    Args:
        run: folder of a finished run.
        out: the folder to write.
        dtype: of the compensated weights in the bank; as in the run when left out.
        overwrite: replace an earlier export.

    Raises:
        DiffesError: the run is damaged or unfinished, or `out` cannot be written.
    """
    if (run / artifact.FRONT).is_file():
        raise DiffesError(f"{run} is a front of plans, and only runs of one schedule can be exported; copy it as it is")
    schedule, facts = artifact.read_schedule(run)
    measured = report.read_report(run)
    bank, header = WeightBank.open(run / artifact.BANK)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = {path.name for path in out.iterdir()} <= FILES and (out / CARD).is_file() if out.is_dir() else False
        if not (overwrite and ours):
            hint = "pass --overwrite to replace it, or name" if ours else "name"
            raise DiffesError(f"{out} exists and is not empty; {hint} another folder")
    figures = [name for name in folder.FIGURES if "split" in facts or name != "split.png"]  # older runs had none
    for name in figures:
        if not (run / name).is_file():
            raise DiffesError(f"{run / name} is missing; restore it or run `diffes search` again")
    base = None if facts["model"] in shipped_models() else model_folder(artifact.base_model(run, facts))
    if base is not None and base.resolve() in (out.resolve(), *out.resolve().parents):
        raise DiffesError(f"{out} lies in the folder of the base model, which is copied into it; name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".partial-{out.name}-") as scratch:
            new = Path(scratch) / out.name
            new.mkdir()
            if base is not None:
                shutil.copytree(base, new / artifact.BASE, ignore=shutil.ignore_patterns("calibration.npz"))
                facts["model"] = f"./{artifact.BASE}"
            header["model"] = facts["model"]
            kept = getattr(torch, dtype) if dtype else None
            files.write_safely(new / artifact.BANK, lambda partial: bank.save(partial, header, kept))
            artifact.write_schedule(new, schedule, facts)
            files.write_json(new / folder.REPORT, files.read_json(run / folder.REPORT) | {"model": facts["model"]})
            for name in figures:
                shutil.copy2(run / name, new / name)
            (new / CARD).write_text(card(out.name, schedule, facts, measured), encoding="utf-8")
            if out.is_dir():
                os.replace(out, Path(scratch) / "before")  # goes with the scratch folder, once the new one is in place
            try:
                os.replace(new, out)
            except OSError:
                if (Path(scratch) / "before").is_dir():
                    os.replace(Path(scratch) / "before", out)
                raise
    except OSError as error:
        raise DiffesError(f"cannot write {out} ({error}); what was there before is untouched") from error


def card(name: str, schedule: Schedule, facts: Mapping[str, Any], measured: Report) -> str:
    """Model card in Markdown, with the front matter that hubs read."""
    model = facts["model"]
    bundled = model.startswith("./")
    named = "the pipeline in `base/`" if bundled else f"`{model}`"
    base = f"base_model: {model}\n" if not bundled and "/" in model else ""
    table = [report.COLUMNS, ("---",) * len(report.COLUMNS), *report.rows(measured)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    settings, timing = measured.run.settings, measured.timing
    levels = " ".join(map(str, schedule.levels))
    removed = "heads and channels" if facts["kind"] == "width" else "transformer blocks"
    return f"""---
library_name: diffusers
tags: [diffusion, pruning, diffes]
{base}---

# {name}

A stage-wise pruning schedule for {named}, found by [diffes](https://pypi.org/project/diffes/): it removes {removed}
(method `{facts["method"]}`, allocation
`{facts.get("allocation", "equal")}`) to a different degree in each of {len(schedule.stages)} stages of the sampling
trajectory.

```python
import diffes

pipe = diffes.load("{name}")  # this folder; a diffusers pipeline comes back
```

## Measured

Metric `{settings["metric"]}` against the dense model at {facts["steps"]} steps and guidance {facts["guidance"]:g}, on
{settings["heldout"]} held-out probes; speed on {timing.device} ({timing.threads} threads), batch
{timing.batch}, median of {timing.repeats}. MACs are of the whole denoiser. All figures: `{folder.REPORT}`.

{lines}

Levels (0 is dense, {schedule.max_level} is everything prunable), cleanest stage first: {levels}

![schedule](schedule.png)
![what each layer loses in each stage](split.png)
![images](images.png)
"""
