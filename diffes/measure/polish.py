"""Polish of a plan after its greedy fit: Gauss-Newton on the final latents over all coefficients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.spaces.schedule import Plan

STEP = 1e-3  # of a finite difference, in units of the largest coefficient of its row
DAMPING = 1e-3  # of the normal equations, relative to their diagonal
SHORTER = (1.0, 0.5, 0.25)  # lengths of a step that are tried
PROBES = 32  # number of probes for the derivatives; half as many or twice as many work nearly as well


def polished(evaluator: PlanEvaluator, plan: Plan) -> Plan:
    """Return the plan after a step of damped Gauss-Newton on the final latents, where that lowers the error.

    Every coefficient is moved a little in turn, and the run goes on from there. For n coefficients this takes about n /
    2 runs on at most 32 of the probes. A step is kept only if it lowers the error over all probes.

    Args:
        evaluator: evaluator with the probes and their reference.
        plan: plan with coefficients.
    """
    tried = [plan, *(_changed(plan, change) for change in _newton(evaluator, plan))]
    errors = [(error, each) for each in tried if math.isfinite(error := _error(evaluator, each))]
    return min(errors, key=lambda pair: pair[0], default=(0.0, plan))[1]


def _error(evaluator: PlanEvaluator, plan: Plan) -> float:
    return float((evaluator.latents(plan).float() - evaluator.final_reference.float()).square().mean())


def _newton(evaluator: PlanEvaluator, plan: Plan) -> list[dict[tuple[int, int], float]]:
    """Return the changes of coefficients, by call and place, for steps of several lengths."""
    rows, n = plan.coefficients, len(evaluator.probes)
    assert rows is not None
    fidelity = min(PROBES, n) / n
    start = evaluator.latents(plan, fidelity).float()
    places = [(i, k) for i, row in enumerate(rows) for k in range(len(row))]
    columns = []
    for i, k in places:
        size = STEP * max(map(abs, rows[i]))
        moved = evaluator.latents(_changed(plan, {(i, k): size}), fidelity).float()
        columns.append((moved - start).flatten() / size)
    jacobian = torch.stack(columns).double()
    error = (start - evaluator.final_reference[: len(start)].float()).flatten().double()
    squares, target = (jacobian @ jacobian.T).cpu().numpy(), -(jacobian @ error).cpu().numpy()
    if not (np.isfinite(squares).all() and np.isfinite(target).all()):  # the plan fails: there is nothing to polish
        return []
    # least squares, because a coefficient of a term that is zero everywhere leaves the equations singular
    step = np.linalg.lstsq(squares + DAMPING * np.diag(squares.diagonal()), target)[0]
    return [dict(zip(places, (length * step).tolist(), strict=True)) for length in SHORTER]


def _changed(plan: Plan, changes: dict[tuple[int, int], float]) -> Plan:
    """Return the plan with some of its coefficients changed by the given amounts."""
    rows = plan.coefficients or ()
    changed = (tuple(c + changes.get((i, k), 0.0) for k, c in enumerate(row)) for i, row in enumerate(rows))
    return replace(plan, coefficients=tuple(changed))
