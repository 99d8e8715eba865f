"""How many denoiser calls does `surrogate` need to be where the reference evolution ends?

For every seed the paper's evolution (mu = 4, lambda = 16, 50 generations) runs first, then `surrogate` on the same
probes with a share of the denoiser calls that it took. What they found is scored on held-out probes that neither saw.
Finished cells are lines of `cells.jsonl` and are not run again; a search that was interrupted goes on from its journal.

    python benchmarks/sample_efficiency.py --models fashion-dit --share 0.2         # about an hour on one CPU core
    python benchmarks/sample_efficiency.py --models emoji-sdxl --evaluations 400    # likewise, half of the generations
    python benchmarks/sample_efficiency.py --smoke                                  # tiny, two seeds
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
from diffes.results.record import UNIFORM, RunRecord
from diffes.study.grid import run_cells

RESULTS = Path(__file__).parent / "results"
REFERENCE = "evolution:mu=4,lam=16"


def run_model(config: RunConfig, seeds: int, share: float, out: Path) -> list[RunRecord]:
    """The reference for every seed, then `surrogate` with a share of the calls that it took."""
    progress = RichProgress()
    cells = [replace(config, strategy=REFERENCE, seed=seed) for seed in range(seeds)]
    reference = run_cells(cells, out, progress, equal_calls=False)
    cells = [
        replace(config, strategy="surrogate", seed=seed, max_calls=round(share * record.denoiser_calls))
        for seed, record in enumerate(reference)
    ]
    return [*reference, *run_cells(cells, out, progress, equal_calls=False)]


def line(model: str, reference: Sequence[RunRecord], ours: Sequence[RunRecord]) -> str:
    """Markdown: medians over seeds, and what share of the calls was enough."""
    pairs = list(zip(reference, ours, strict=True))
    passed = [
        min((calls for calls, best in our.curve if best >= theirs.curve[-1][1]), default=float("inf"))
        / theirs.denoiser_calls
        for theirs, our in pairs
    ]
    never = sum(share == float("inf") for share in passed)
    share = statistics.median(passed)
    heldout = [[record.searched.heldout_mean or 0.0 for record in records] for records in (reference, ours)]
    cells = (
        model, len(pairs), f"{statistics.median(record.rivals[UNIFORM].heldout_mean or 0.0 for record in ours):.4f}",
        f"{statistics.median(heldout[0]):.4f}", f"{statistics.median(heldout[1]):.4f}",
        f"{sum(our >= theirs for theirs, our in zip(*heldout, strict=True))} of {len(pairs)}",
        f"{statistics.median(record.denoiser_calls for record in reference):,.0f}",
        f"{statistics.median(record.denoiser_calls for record in ours):,.0f}",
        f"{f'{share:.0%}' if share < 1 else 'not within its share'} (median; not at all: {never})",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


HEAD = [
    "| model | seeds | uniform, held out | reference, held out | surrogate, held out | at least the reference "
    "| calls, reference | calls, surrogate | share of the calls at which it passes the reference on the search's "
    "probes |",
    "|---|---|---|---|---|---|---|---|---|",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=816, help="of the reference")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the reference's calls, for surrogate")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--allocation", choices=("sensitivity", "equal"), default="sensitivity", help="of levels over layers"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(
        genes="levels", steps=10, guidance=1.0, probes=8, max_evals=args.evaluations, allocation=args.allocation
    )
    if args.smoke:
        config = replace(config, stages=4, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=40)
        args.seeds = 2
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    for model in args.models:
        out = args.out / f"sample_efficiency_{model.replace('-', '_')}"
        records = run_model(replace(config, model=model), args.seeds, args.share, out)
        text = line(model, records[: args.seeds], records[args.seeds :])
        (out / "table.md").write_text("\n".join([*HEAD, text]) + "\n")
        print("\n".join([*HEAD, text]))


if __name__ == "__main__":
    main()
