"""Tables of fronts and what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffes.forms import FrontRecord, PlanPoint

SLOWER = 0.95  # share of the time of another plan; anything below is not noise


def verdicts(front: FrontRecord) -> list[str]:
    """Return a sentence for each budget that compares its plans.

    Plans were chosen on the probes of the final fit; differences in error are those on held-out probes.
    """
    lines, pruned = [], "pruned or reusing calls" if "reuse" in front.kind.split("+") else "pruned calls"
    points = [point for point in front.points if point.latent_mse is not None]
    for budget in sorted({point.budget for point in points}):
        at = {point.kind: point for point in points if point.budget == budget}
        if not {"dense", "dense-planned"} <= set(at):
            continue
        fitted, said = at.get("dense-fitted"), []
        best = at["dense-planned"] if fitted is None else fitted
        if fitted is None:
            said.append(f"searched timesteps have {_against(at['dense'], best)} evenly spaced ones")
        else:
            said.append(
                f"fitted coefficients have {_against(at['dense-planned'], fitted)} 2M at timesteps searched for it, "
                f"and {_against(at['dense'], fitted, '')} 2M at evenly spaced ones"
            )
        if joint := at.get("joint"):
            said.append(_added(joint, best, pruned))
        bar = at["dense-planned"]
        if bar.ranked is not None and (quick := _fastest(points, bar)) is not None:
            name = f"{quick.kind} of {quick.budget:g}" if quick.budget != budget else quick.kind
            said.append(f"fastest at the error of dense-planned: {name}, {quick.ms:.0f} of {bar.ms:.0f} ms")
        for ours, theirs in zip(best.ends, bar.ends, strict=True) if fitted else ():
            said.append(
                f"at guidance {ours.guidance:g} {best.kind} has {ours.latent_mse or math.nan:.5f}, "
                f"{bar.kind} {theirs.latent_mse or math.nan:.5f}"
            )
        lines.append(f"{budget:g} dense calls: {'; '.join(said)}")
    return lines


def _added(joint: PlanPoint, dense: PlanPoint, pruned: str) -> str:
    """Return in words what pruned calls add to a plan of dense calls."""
    if not any(joint.levels):
        return f"{pruned} add nothing, the best plan found is dense"
    gain = _over(dense, joint)
    if gain <= 1:
        return f"{pruned} add nothing on held-out probes ({1 / gain:.2f} times the error of {dense.kind})"
    slower = joint.ms / dense.ms
    return f"{pruned} have {gain:.2f} times less error than {dense.kind} in {slower:.2f} times its milliseconds"


def _against(rival: PlanPoint, point: PlanPoint, error: str = " error") -> str:
    """Return in words how much less error a point has than a rival, or how much more."""
    gain = _over(rival, point)
    return f"{gain:.2f} times less{error} than" if gain >= 1 else f"{1 / gain:.2f} times the error of"


def _over(rival: PlanPoint, point: PlanPoint) -> float:
    """Return the error of a rival over that of a point."""
    return max(rival.latent_mse or 0.0, 1e-12) / max(point.latent_mse or 0.0, 1e-12)


def _fastest(points: Sequence[PlanPoint], bar: PlanPoint) -> PlanPoint | None:
    """Return the fastest of the points that are at least as fit as `bar`; None unless it saves over 5 % of the time."""
    good = [point for point in points if (rank := point.ranked) is not None and rank >= (bar.ranked or 0.0)]
    found = min(good, key=lambda point: point.ms)
    return found if found.ms < SLOWER * bar.ms else None


def rows_of(points: Sequence[PlanPoint]) -> list[tuple[str, ...]]:
    """Return the table of some plans of a front: a row for each."""
    return [
        (
            f"{point.budget:g}", point.kind, f"{point.cost:.2f}", str(point.n_calls),
            _with(point, "latent_mse", 5, point.latent_interval),
            _with(point, "image_mse", 5, point.image_mse_error),
            _with(point, "ssim", 3, point.ssim_error), f"{point.ms:.0f}",
        )
        for point in points
    ]  # fmt: skip


def _with(point: PlanPoint, name: str, digits: int, spread: Any) -> str:
    """Format a number with its standard error or its interval, whose ends have one digit less."""
    if (value := getattr(point, name)) is None:
        return "failed" if point.heldout_mean is None else "-"
    digits = digits if abs(value) < 10 else 1
    if isinstance(spread, list):
        low, high = (f"{each:.{digits - 1}f}" for each in spread)
        return f"{value:.{digits}f} ({low} to {high})"
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


COLUMNS = ("budget", "", "cost", "calls", "latent MSE (95 %)", "image MSE", "SSIM", "ms")
