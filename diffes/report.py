"""What a finished run measured, as rows of a table: for the terminal and for the card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("", "held-out fitness", "spread", "sparsity", "MACs", "speed-up")


def rows(report: Mapping[str, Any], steps: int) -> list[tuple[str, ...]]:
    """Dense, uniform and searched side by side, and the cheapest rival: fewer steps of the dense model."""
    uniform, fewer = report["baselines"]["uniform"], report["baselines"]["fewer_steps"]
    speedup = report["latency"]["speedup"]

    def row(
        name: str, fitness: Mapping[str, Any] | None, sparsity: float, macs: float, speed: float
    ) -> tuple[str, ...]:
        values = [fitness["heldout_mean"], fitness["heldout_std"]] if fitness else []
        scores = ["failed" if value is None else f"{value:.4f}" for value in values] or ["reference", ""]
        return name, *scores, f"{sparsity:.2f}", f"{macs:.1%}", f"{speed:.2f}x"

    return [
        row("dense", None, 0, 1, 1),
        row("uniform", uniform, uniform["nominal_sparsity"], uniform["macs_fraction"], uniform["speedup"]),
        row("searched", report["fitness"], report["nominal_sparsity"], report["macs_fraction"], speedup),
        row(f"dense, {fewer['steps']} of {steps} steps", fewer, 0, fewer["macs_fraction"], fewer["speedup"]),
    ]  # fmt: skip
