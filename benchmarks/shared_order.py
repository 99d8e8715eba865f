"""What does one order of groups for all stages cost, against an order of each stage's own?

With one order, rows of the producing layers would be prefixes of one arrangement in every stage, and a change of stage
would touch consumers only. Here the order comes of the sum over stages of what the layers see (each stage's second
moment at trace 1); what OBS makes up for stays each stage's own. Uniform and searched schedules, levels shared out by
damage, latent MSE on held-out probes. Finished cells are lines of `cells.jsonl` and are not run again.

    python benchmarks/shared_order.py            # about an hour on two CPU cores
    python benchmarks/shared_order.py --smoke    # tiny
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from allocation import tabled
from torch import Tensor

from diffes.adapters import GroupSet, adapter_for, load_pipeline, shipped_models
from diffes.config import RunConfig
from diffes.pruning import METHODS
from diffes.pruning.base import GroupWeights, LayerWeights
from diffes.pruning.build import stage_seed
from diffes.pruning.calibrate import calibration_of
from diffes.pruning.calibration import StagePass, input_moments
from diffes.pruning.factors import Factor, LayerStatistics, pack
from diffes.pruning.obs import OBS, damped
from diffes.pruning.wanda import Wanda
from diffes.results.record import RunRecord
from diffes.spaces.schedule import Stages

RESULTS = Path(__file__).parent / "results" / "shared_order"
SHARED = "_shared_order"  # what a method's name ends with here
POOLED: dict[str, Tensor] = {}  # (d, d) of each layer of the model at hand: its second moments, summed over stages


@METHODS.register("obs" + SHARED)
class SharedOBS(OBS):
    """OBS in the order that it takes on the mean of all stages."""

    def factors(self, layers: Iterable[LayerStatistics]) -> Iterator[Factor]:
        for layer in layers:
            (moment,) = layer.inputs
            (pooled,) = super().factors([replace(layer, inputs=(POOLED[layer.groups.name].to(moment),))])
            places = layer.groups.features(pooled.order.long())
            hessian = damped(moment, self.damping)[places][:, places]
            upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # H = U U^T: dropped inputs come first
            inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
            rows = inverse / inverse.diagonal()[:, None]
            yield Factor(layer.groups, pooled.order, (pack(rows, layer.weights.consumers[0].dtype),))


@METHODS.register("wanda" + SHARED)
class SharedWanda(Wanda):
    """Wanda on the mean of all stages."""

    def prune(
        self, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
    ) -> list[GroupWeights]:
        return super().prune(groups, weights, (POOLED[groups.name].diagonal(),), n_kept)


def pool(config: RunConfig) -> None:
    """Fills `POOLED` for a model."""
    POOLED.clear()
    adapter = adapter_for(load_pipeline(config.model))
    data, stages = calibration_of(config, adapter), Stages.equal(config.stages, adapter.n_timesteps)
    for stage, span in enumerate(stages.ranges):
        run = StagePass(adapter, span, data, config.scale > 1, stage_seed(config.seed, stage))
        for name, (moment,) in input_moments(run, adapter.group_sets(), full=True).items():
            part = moment.double() / moment.double().trace()
            POOLED[name] = POOLED[name] + part if name in POOLED else part


def table(records: Sequence[RunRecord]) -> str:
    """Markdown, one line for each model, method, budget and kind of schedule; means over calibrations."""
    lines = [
        "| model | method | MACs | schedule | own order: latent MSE | shared order: latent MSE | shared / own |",
        "|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str, float, str], dict[str, list[float]]] = {}
    for record in records:
        s, score = record.settings, record.searched.heldout_mean
        assert score is not None
        key = (s["model"], s["method"].removesuffix(SHARED), -s["budget"], s["strategy"])
        kind = "shared" if s["method"].endswith(SHARED) else "own"
        found.setdefault(key, {}).setdefault(kind, []).append(-score)
    for (model, method, budget, strategy), scores in sorted(found.items()):
        if len(scores) < 2:
            continue
        own, shared = scores["own"], scores["shared"]
        kind = "uniform" if strategy == "uniform" else "searched"
        cells = [f"{statistics.mean(each):.5f} ({len(each)})" for each in (own, shared)]
        ratio = statistics.mean(shared) / statistics.mean(own)
        lines.append(f"| {model} | {method} | {-budget:g} | {kind} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines) + "\n\nIn brackets: seeds of calibration and search.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument("--methods", nargs="+", default=["obs", "wanda"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration and the search")
    parser.add_argument("--max-evals", type=int, default=40, help="of the searches, which are of OBS alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(genes="levels", cost="macs", metric="latent_mse", max_evals=args.max_evals)
    if args.smoke:
        config = replace(config, stages=2, steps=4, probes=2, heldout=4, calibration_samples=8, max_evals=2)
        args.models, args.methods, args.budgets, args.seeds = ["fashion-dit"], ["obs"], [0.65], [0]
        args.out = Path("runs/smoke/shared_order") if args.out == RESULTS else args.out
    text = ""
    for model, seed in itertools.product(args.models, args.seeds):
        pool(replace(config, model=model, seed=seed))
        for method, ending in itertools.product(args.methods, ("", SHARED)):
            settings = replace(config, model=model, seed=seed, method=method + ending)
            cells = [replace(settings, strategy="uniform", budget=budget) for budget in args.budgets]
            if method == "obs":
                cells += [replace(settings, budget=budget) for budget in args.budgets]
            text = tabled(cells, args.out, table)
    print(text)


if __name__ == "__main__":
    main()
