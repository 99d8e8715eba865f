"""Does a long search stay as fast and as small as it began? Milliseconds an evaluation and memory, along the search.

First what a search itself takes: strategies with a journal on disk, on an evaluator that takes no time. Then a whole
one on `fashion-dit`, with one probe and few steps.

    python benchmarks/long_run.py            # 5,000 evaluations each
    python benchmarks/long_run.py --smoke    # 40 of each
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from diffes.config import RunConfig
from diffes.figures.plots import save
from diffes.problems.workbench import prepare, search_on
from diffes.progress import RichProgress
from diffes.results.folder import config_record
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Evaluation
from diffes.testing import evaluate

RESULTS = Path(__file__).parent / "results"
SPACE = SearchSpace.mean_sparsity(Stages.equal(10), 8, 0.5)
WINDOWS = 20


class Curve:
    """Notes time and memory as evaluations come in."""

    def __init__(self) -> None:
        self.at = [(time.process_time(), 0.0)]

    def __call__(self, evaluation: Evaluation) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
        self.at.append((time.process_time(), peak))

    def windows(self) -> list[dict[str, float]]:
        """Milliseconds of processor time an evaluation, and the most memory so far, in equal parts of the search."""
        size = max(1, (len(self.at) - 1) // WINDOWS)
        ends = range(size, len(self.at), size)
        return [
            {"evaluations": end, "ms": 1000 * (self.at[end][0] - self.at[end - size][0]) / size, "mb": self.at[end][1]}
            for end in ends
        ]


def of_strategy(name: str, evaluations: int) -> list[dict[str, float]]:
    """A search of nothing but bookkeeping, on a landscape in closed form."""
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        store = EvaluationStore(Path(folder) / "study.journal", SPACE)
        made = STRATEGIES.make(name, SPACE, seed=0)
        run_search(made, evaluate, max_evals=evaluations, store=store, on_evaluation=curve)
    return curve.windows()


def of_model(evaluations: int) -> list[dict[str, float]]:
    """A search on the shipped transformer, its denoiser calls included."""
    config = RunConfig(
        genes="levels",
        method="magnitude", allocation="equal", stages=8, steps=8, guidance=1.0, probes=1, metric="latent_mse",
        max_evals=evaluations,
    )  # fmt: skip
    bench, curve = prepare(config, RichProgress()), Curve()
    with tempfile.TemporaryDirectory() as folder:
        store = EvaluationStore(Path(folder) / "study.journal", bench.space)
        search_on(bench, RichProgress(), store, curve)
    return curve.windows()


def table_of(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: the first and the last fifth of each search."""
    lines = ["| | ms, first fifth | ms, last fifth | MB after a fifth | MB at the end |", "|---|---|---|---|---|"]
    for name, windows in found.items():
        fifth = max(1, len(windows) // 5)
        first, last = (statistics.fmean(w["ms"] for w in part) for part in (windows[:fifth], windows[-fifth:]))
        mb = windows[fifth - 1]["mb"], windows[-1]["mb"]
        lines.append(f"| {name} | {first:.2f} | {last:.2f} | {mb[0]:.0f} | {mb[1]:.0f} |")
    return "\n".join(lines) + "\n"


def figure_of(found: dict[str, list[dict[str, float]]]) -> Figure:
    """Time and memory along each search."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "mb"), ("ms an evaluation", "peak MB"), strict=True):
        for name, windows in found.items():
            axes.plot([w["evaluations"] for w in windows], [w[key] for w in windows], label=name)
        axes.set(xlabel="evaluations", ylabel=label, ylim=(0, None))
    figure.axes[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=5000, help="of each search")
    parser.add_argument("--strategies", nargs="+", default=["evolution", "surrogate"], help="their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="40 evaluations, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.evaluations, args.out = 40, Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], list[dict[str, float]]]] = {
        **{name: partial(of_strategy, name, args.evaluations) for name in args.strategies},
        "fashion-dit, evolution": partial(of_model, args.evaluations),
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, part in parts.items():
        found[name] = part()
        data = {"windows": found, "evaluations": args.evaluations, "versions": config_record(RunConfig())["versions"]}
        (args.out / "long_run.json").write_text(json.dumps(data, indent=1) + "\n")
        (args.out / "long_run.md").write_text(table_of(found))
        save(figure_of(found), args.out / "long_run.png")
    print(table_of(found))


if __name__ == "__main__":
    main()
