"""The card of an exported folder, Markdown with the front matter that hubs read: what it is, its use, measurements."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffes.adapters import shipped_models
from diffes.runtime.artifact import BASE
from diffes.runtime.solver import solver_named
from diffes.search.schedule import Plan, Schedule
from diffes.study import folder, front, report
from diffes.study.record import Report

CURRENCIES = {"macs": "MACs", "latency": "measured time"}


def of_run(name: str, schedule: Schedule, facts: Mapping[str, Any], measured: Report) -> str:
    """Card of a run.

    Args:
        name: of the exported folder.
        schedule: what was found.
        facts: of its `schedule.json`.
        measured: its report.
    """
    settings, timing = measured.run.settings, measured.timing
    return f"""{_head(name, facts)}
A stage-wise pruning schedule for {_base(facts)}, found by [diffes](https://pypi.org/project/diffes/):
{_done(facts)}, to a different degree in each of {len(schedule.stages)} stages of the sampling trajectory.

```python
import diffes

pipe = diffes.load("{name}")  # this folder; a diffusers pipeline comes back
```

## Measured

Metric `{settings["metric"]}` against the dense model at {facts["steps"]} steps and guidance {facts["guidance"]:g}, on
{settings["heldout"]} held-out probes; speed on {timing.device} ({timing.threads} threads), batch
{timing.batch}, median of {timing.repeats}. MACs are of the whole denoiser. All figures: `{folder.REPORT}`.

{_table(report.COLUMNS, report.rows(measured))}

Levels (0 is dense, {schedule.max_level} is everything prunable), cleanest stage first: {_listed(schedule.levels)}

![schedule](schedule.png)
![what each layer loses in each stage](split.png)
![images](images.png)
"""


def of_plan(name: str, plan: Plan, facts: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]], pipeline: Any) -> str:
    """Card of a plan; where all its calls are dense it also says how diffusers alone runs it.

    Args:
        name: of the exported folder.
        plan: what is in it.
        facts: of its `front.json`, whose one point is the plan's.
        rivals: points of every kind that the front has at the plan's budget, its own among them.
        pipeline: class of the base model's pipeline.
    """
    (point,), reference = facts["points"], facts["reference"]
    solver, settings = solver_named(plan.solver)
    chosen = ", ".join(f"{key}={value}" for key, value in settings.items())
    dense = not any(plan.levels)
    thin = "all of them dense" if dense else f"and how thin at each: {_done(facts)}"
    alone = _without_diffes(name, plan, facts, pipeline) if dense else ""
    timed = " of {batch} images on {device} ({threads} threads)".format(**facts["timing"]) if "timing" in facts else ""
    return f"""{_head(name, facts)}
A plan for {_base(facts)}, found by [diffes](https://pypi.org/project/diffes/): which {len(plan.calls)} timesteps call
the denoiser, {thin}. It costs {point["cost"]:.2f} dense calls by {CURRENCIES[facts["currency"]]}.

```python
import diffes
import torch

pipe = diffes.load("{name}")  # this folder; a diffusers pipeline comes back
{_call(pipeline, facts, f"num_inference_steps={len(plan.calls)}")}
```

`num_inference_steps` is the plan's own number of calls, and the scheduler is the plan's; others are refused.
{alone}
## Measured

Metric `{facts["metric"]}` and latent MSE on held-out probes against the dense model at {reference["steps"]} steps of
`{reference["solver"]}`, guidance {facts["guidance"]:g}; ms is the median time of a run{timed}.
This folder holds the `{point["kind"]}` plan; beside it is what else the front has at the same budget.

{_table(front.COLUMNS, front.rows_of({"points": rivals}))}

- solver: `{plan.solver}`, diffusers' {solver.__name__} with {chosen}
- timesteps: {_listed(plan.timesteps)}
- levels (0 is dense, {plan.max_level} is everything prunable): {_listed(plan.levels)}

![the front: error against cost](front.png)
"""


def _without_diffes(name: str, plan: Plan, facts: Mapping[str, Any], pipeline: Any) -> str:
    """Section with code that gives the same images; a pipeline that takes no timesteps gets them by its scheduler."""
    solver, settings = solver_named(plan.solver)
    given = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
    model = f"{name}/{BASE}" if _bundled(facts) else facts["model"]
    if facts["model"] in shipped_models():
        opened, imports = (
            "load_pipeline",
            f"from diffes import load_pipeline  # it ships {model}\nfrom diffusers import",
        )
    else:
        opened, imports = "DiffusionPipeline.from_pretrained", "from diffusers import DiffusionPipeline,"
    by_scheduler, steps = "", "timesteps=timesteps"
    if "timesteps" not in inspect.signature(pipeline.__call__).parameters:
        steps = "num_inference_steps=len(timesteps)"
        by_scheduler = f"""
set_timesteps = pipe.scheduler.set_timesteps  # {pipeline.__name__} takes no timesteps, its scheduler does
pipe.scheduler.set_timesteps = lambda _, device=None: set_timesteps(timesteps=timesteps, device=device)"""
    return f"""
## Without diffes

All calls are dense: the base model and a scheduler of diffusers give the same images (on a GPU after
`pipe.to("cuda")`, where `diffes.load` puts it by itself).

```python
import torch
{imports} {solver.__name__}

timesteps = {list(plan.timesteps)}
pipe = {opened}("{model}", dtype=torch.{facts["dtype"]})
pipe.scheduler = {solver.__name__}.from_config(
    pipe.scheduler.config,
{given}){by_scheduler}
{_call(pipeline, facts, steps)}
```
"""


def _call(pipeline: Any, facts: Mapping[str, Any], steps: str) -> str:
    """Python that makes images with a pipeline; `steps` is the argument that says how many, or at which timesteps."""
    classes = "class_labels" in inspect.signature(pipeline.__call__).parameters
    conditions = "[0, 1]" if classes else '["a big fox on a purple background"]'
    return f"""images = pipe(
    {conditions}, guidance_scale={facts["guidance"]!r}, {steps},
    generator=torch.Generator().manual_seed(0),
).images"""


def _head(name: str, facts: Mapping[str, Any]) -> str:
    model = facts["model"]
    base = f"base_model: {model}\n" if not _bundled(facts) and "/" in model else ""
    return f"""---
library_name: diffusers
tags: [diffusion, pruning, diffes]
{base}---

# {name}
"""


def _bundled(facts: Mapping[str, Any]) -> bool:
    """Whether the base model lies in the folder."""
    return str(facts["model"]).startswith("./")


def _base(facts: Mapping[str, Any]) -> str:
    return f"the pipeline in `{BASE}/`" if _bundled(facts) else f"`{facts['model']}`"


def _done(facts: Mapping[str, Any]) -> str:
    """What levels do."""
    of_kind = {
        "width": "heads and channels are removed",
        "depth": "transformer blocks are removed",
        "reuse": "outputs of an earlier call are taken again",
    }
    done = " or ".join(of_kind[kind] for kind in facts["kind"].split("+"))
    return f"{done} (method `{facts['method']}`, allocation `{facts.get('allocation', 'equal')}`)"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
