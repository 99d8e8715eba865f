"""Card of an exported folder: description, use and measurements in Markdown, with the front matter that hubs read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffes.figures import tables
from diffes.figures.plain_loop import is_written_out, plain_loop, rows_of
from diffes.forms import Artifact, FrontRecord, PlanPoint, ScheduleFacts
from diffes.results import folder, report
from diffes.results.artifact import BASE
from diffes.results.record import Report
from diffes.spaces.schedule import Plan, Schedule

CURRENCIES = {"macs": "MACs", "latency": "measured time"}


def of_run(name: str, schedule: Schedule, facts: ScheduleFacts, measured: Report) -> str:
    """Write the card of a run.

    Args:
        name: name of the exported folder.
        schedule: the schedule found.
        facts: content of its `schedule.json`.
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

Metric `{settings["metric"]}` against the dense model at {facts.steps} steps and guidance {facts.guidance:g}, on
{settings["heldout"]} held-out probes; speed on {timing.device} ({timing.threads} threads), batch
{timing.batch}, median of {timing.repeats}. MACs are of the whole denoiser. All figures: `{folder.REPORT}`.

{_table(report.COLUMNS, report.rows(measured))}

Levels (0 is dense, {schedule.max_level} is everything prunable), cleanest stage first: {_listed(schedule.levels)}

![schedule](schedule.png)
![what each layer loses in each stage](split.png)
![images](images.png)
"""


def of_plan(name: str, plan: Plan, front: FrontRecord, rivals: Sequence[PlanPoint], pipeline: Any) -> str:
    """Write the card of a plan, with a loop of plain torch that runs it.

    Args:
        name: name of the exported folder.
        plan: the plan in the folder.
        front: its front, with the plan's point only.
        rivals: points of every kind that the front has at the plan's budget, the plan's own included.
        pipeline: class of the base model's pipeline.
    """
    (point,), reference = front.points, front.reference
    dense = not any(plan.levels)
    pruned = "all of them dense" if dense else f"and how much of the network each computes: {_done(front)}"
    on = front.timing
    timed = f" of {on.batch} images on {on.device} ({on.threads} threads)" if on else ""
    model = f"{name}/{BASE}" if _bundled(front) else front.model
    alone = "All calls are dense, so torch and diffusers alone give such images" if dense else "Written out, a run is"
    flows = front.prediction_type == "flow_prediction"
    calls = zip(plan.timesteps, point.sigmas, plan.levels, rows_of(plan, point.sigmas, flows), strict=True)
    lines = "\n".join(
        f"| {timestep} | {sigma:.6g} | {level} | {', '.join(f'{each:.6g}' for each in row)} |"
        for timestep, sigma, level, row in calls
    )
    return f"""{_head(name, front)}
A plan for {_base(front)}, found by [diffes](https://pypi.org/project/diffes/): which {len(plan.calls)} timesteps call
the denoiser, {pruned}. It costs {point.cost:.2f} dense calls by {CURRENCIES[front.currency]}.

```python
import diffes
import torch

pipe = diffes.load("{name}")  # this folder; a diffusers pipeline comes back
{_call(pipeline, front)}
```

The scheduler is the plan's, and makes its {len(plan.calls)} calls whatever `num_inference_steps` says.

{_written_out(plan, front, model, name, pipeline, alone)}## Measured

On {front.heldout or "the"} held-out probes, against the dense model at {reference.steps} steps of
`{reference.solver}` (spacing `{reference.spacing}`, final sigma zero), {_guided(front)}; ms is
the median time of a run{timed}.
This folder holds the `{point.kind}` plan; beside it is what else the front has at the same budget.

{_table(tables.COLUMNS, tables.rows_of(rivals))}

The calls in the order of sampling, by the solver `{plan.solver}`. Sigma is noise over signal; level 0 is dense and
{plan.max_level} is everything prunable; coefficients are of the present latents, then of the clean predictions, newest
first.

| timestep | sigma | level | coefficients |
|---|---|---|---|
{lines}

![the front: error against cost](front.png)
"""


def _written_out(plan: Plan, front: FrontRecord, model: str, name: str, pipeline: Any, alone: str) -> str:
    """Return the section with a loop of plain torch; of pipelines whose calls are not known, what such a loop needs."""
    if not is_written_out(pipeline):
        return """## Without diffes

Step `i` is `x' = row[0] x + row[1] D_i + row[2] D_(i-1) + ...`, with the coefficients below and the clean predictions
`D` that the outputs of the network stand for. The timesteps are what its scheduler tells the network.

"""
    return f"""## In plain torch

{alone}:

```python
{plain_loop(plan, front, model, name, pipeline)}```

"""


def _call(pipeline: Any, front: FrontRecord) -> str:
    """Return Python code that makes images with a pipeline."""
    classes = "class_labels" in inspect.signature(pipeline.__call__).parameters
    conditions = "[0, 1]" if classes else '["a big fox on a purple background"]'
    return f"""images = pipe(
    {conditions}, guidance_scale={front.guidance!r}, generator=torch.Generator().manual_seed(0)
).images"""


def _head(name: str, facts: Artifact) -> str:
    model = facts.model
    base = f"base_model: {model}\n" if not _bundled(facts) and "/" in model else ""
    return f"""---
library_name: diffusers
tags: [diffusion, pruning, diffes]
{base}---

# {name}
"""


def _guided(front: FrontRecord) -> str:
    """Return in words the guidance that a plan was measured at, with its errors at both ends of a range."""
    if (both := front.guidance_range) is None:
        return f"guidance {front.guidance:g}"
    (point,) = front.points
    ends = [f"{end.latent_mse:.5f} at {end.guidance:g}" for end in point.ends if end.latent_mse]
    said = f"; this plan's latent MSE is {' and '.join(ends)}" if ends else ""
    return f"each probe at a guidance of its own from {both[0]:g} to {both[1]:g}{said}"


def _bundled(facts: Artifact) -> bool:
    """Check whether the base model lies in the folder."""
    return facts.model.startswith("./")


def _base(facts: Artifact) -> str:
    return f"the pipeline in `{BASE}/`" if _bundled(facts) else f"`{facts.model}`"


def _done(facts: Artifact) -> str:
    """Return in words what the levels do."""
    of_kind = {
        "width": "heads and channels are removed",
        "depth": "transformer blocks are removed",
        "reuse": "outputs of an earlier call are taken again",
    }
    done = " or ".join(of_kind[kind] for kind in facts.kind.split("+"))
    return f"{done} (method `{facts.method}`, allocation `{facts.allocation}`)"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
