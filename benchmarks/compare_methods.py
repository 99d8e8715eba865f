"""How good is each pruning method, on each shipped pipeline, uniform and searched?

Every cell is one search (model x method x budget x seed) with probes of its own, scored on held-out probes that no
search sees, beside the uniform schedule of the same budget and the dense model at the number of steps that costs the
same MACs. Finished cells are lines of `cells.jsonl` and are not run again.

    python benchmarks/compare_methods.py            # about an hour on two CPU cores
    python benchmarks/compare_methods.py --smoke    # tiny, one seed of each
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffes.adapters import shipped_models
from diffes.config import RunConfig
from diffes.progress import RichProgress
from diffes.pruning import METHODS
from diffes.results.record import FEWER_STEPS, UNIFORM, RunRecord
from diffes.study.grid import grid, run_cells

RESULTS = Path(__file__).parent / "results" / "compare_methods"


def table(records: Sequence[RunRecord], metric: str) -> str:
    """Markdown, one line for each model, budget and method."""
    lines = [
        f"| model | budget | method | uniform, held-out {metric} | searched, mean ± std over seeds | seeds | searched "
        "ahead | MACs, uniform | MACs, searched | dense at as many MACs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(tuple(record.settings[name] for name in ("model", "budget", "method")), []).append(record)  # type: ignore[arg-type]
    for (model, budget, method), cells in sorted(groups.items()):
        uniform, fewer = cells[0].rivals[UNIFORM], cells[0].rivals[FEWER_STEPS]
        found = [mean for cell in cells if (mean := cell.searched.heldout_mean) is not None]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        ahead = sum(uniform.heldout_mean is None or score > uniform.heldout_mean for score in found)
        macs = statistics.mean(cell.searched.macs_fraction for cell in cells)
        values = (
            model, budget, method, f"{uniform.heldout_mean:.4f}", f"{statistics.mean(found):.4f} ± {spread:.4f}",
            len(cells), f"{ahead} of {len(cells)}", f"{uniform.macs_fraction:.1%}", f"{macs:.1%}",
            f"{fewer.steps} steps: {fewer.heldout_mean:.4f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--methods", nargs="+", default=METHODS.names(), help="specs, as of `diffes search --method`")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-evals", type=int, default=40)
    parser.add_argument("--strategy", default="evolution")
    parser.add_argument("--metric", default="ssim")
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--allocation", choices=("sensitivity", "equal"), default="sensitivity", help="of levels over layers"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(
        genes="levels", metric=args.metric, heldout=args.heldout, max_evals=args.max_evals, strategy=args.strategy
    )
    config = replace(config, allocation=args.allocation)
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, metric="latent_mse")
        config = replace(config, max_evals=2)
        args.budgets, args.seeds = [0.5], 1
        args.out = Path("runs/smoke/compare_methods") if args.out == RESULTS else args.out
    cells = grid(config, {"model": args.models, "method": args.methods, "budget": args.budgets}, args.seeds)
    records = run_cells(cells, args.out, RichProgress(), equal_calls=False)
    text = table(records, config.metric)
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
