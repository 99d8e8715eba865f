"""Do plans draw what is asked for? Right classes or objects, Fréchet distance and variance of features.

The judges are those of `quality_fashion_dit.py` and `quality_emoji_sdxl.py`; each plan draws as many
images from the same noise through the diffusers pipeline, with the weights that it was found with (calibrated
again: the same seed gives the same). The plans are those of `fronts.py`, seed 0. The dense model at 100 evenly spaced
steps stands beside them. The variance is that of the features, summed: a least-squares fit shrinks images towards their
mean where there are too few calls.

    python benchmarks/quality_plans.py            # 2,000 images of each plan; an hour on two CPU cores
    python benchmarks/quality_plans.py --smoke    # a few images
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import quality_emoji_sdxl as emoji
import quality_fashion_dit as fashion
import torch
from emoji_world import FONT, caption, compose, splits
from fronts import GUIDANCE, keep, read
from fronts import RESULTS as FRONTS
from train_fashion_dit import DATA_DIR

from diffes.adapters import shipped_models
from diffes.config import RunConfig
from diffes.problems.workbench import Workbench, prepare
from diffes.progress import RichProgress
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.plan import trailing
from diffes.spaces.schedule import Plan

RESULTS = Path(__file__).parent / "results"
KINDS = ("dense", "dense-planned", "dense-fitted", "joint")
REFERENCE = 100  # dense steps of what stands beside the plans


class Judge(NamedTuple):
    """What images of a model are measured with."""

    draw: Callable[[Any, int], torch.Tensor]  # the pipeline and its number of calls to uint8 images
    right: Callable[[torch.Tensor], float]  # share of images that show what was asked for
    features: Callable[[torch.Tensor], torch.Tensor]  # of images
    real: torch.Tensor  # features of real images


def fashion_judge(args: argparse.Namespace) -> Judge:
    """Classes of garments, in turn; against real test images."""
    classifier = fashion.cached_classifier(args)
    real, asked = fashion.load_real(classifier, args), fashion.asked_classes(args.n_images)
    return Judge(
        lambda pipe, calls: fashion.generate(pipe, args.n_images, calls, GUIDANCE["fashion-dit"], args.seed),
        lambda images: fashion.agreement(classifier.judge(images).assigned, asked)["overall"],
        lambda images: classifier.judge(images).features,
        real.reference,
    )


def emoji_judge(args: argparse.Namespace) -> Judge:
    """Objects of the prompts of pairs never trained on; against composed scenes of the same prompts."""
    seen, unseen = splits()
    pictures, composed = compose(seen + unseen, args.scenes, args.font, args.seed + 1000)
    judge = emoji.train("object", torch.from_numpy(pictures), emoji.labels(composed, "object"), args)
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(1)).tolist()
    scenes = [unseen[order[i % len(order)]] for i in range(args.n_images)]
    reference = judge.features(torch.from_numpy(compose(scenes, len(scenes), args.font, 102)[0]))
    prompts, wanted = [caption(scene) for scene in scenes], emoji.labels(scenes, "object")
    return Judge(
        lambda pipe, calls: emoji.generate(pipe, prompts, calls, GUIDANCE["emoji-sdxl"], args.seed),
        lambda images: (judge.assigned(images) == wanted).double().mean().item(),
        judge.features,
        reference,
    )


JUDGES = {"fashion-dit": fashion_judge, "emoji-sdxl": emoji_judge}


def row_of(bench: Workbench, judge: Judge, point: dict[str, Any]) -> dict[str, Any]:
    """What the judge says of the images of a plan."""
    pipe, space = bench.adapter.pipe, bench.levels
    facts = {"stages": space.stages.ranges, "max_level": space.max_level, "solver": "dpmsolver++"}
    plan = Plan.from_json(facts | point)
    own, pipe.scheduler = pipe.scheduler, PlanScheduler.of(pipe.scheduler, plan.timesteps, plan.rows)
    try:
        with bench.router.routed(plan):
            images = judge.draw(pipe, len(plan.calls))
    finally:
        pipe.scheduler = own
    features = judge.features(images)
    kept = ("model", "kind", "budget", "n_calls", "latent_mse")
    return {name: point[name] for name in kept} | {
        "right": round(judge.right(images), 4), "frechet": round(fashion.frechet(features, judge.real), 3),
        "variance": round(float(features.var(0).sum()), 2), "images": len(images),
    }  # fmt: skip


def chosen(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """The points of `fronts.py` with seed 0 in MACs, and the reference."""
    wanted = {"model": model, "guidance": GUIDANCE[model], "method": "obs", "seed": 0, "currency": "macs"}
    rows = read(args.points / f"points-{model}.jsonl")
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    rows = [row for row in rows if row["budget"] in args.budgets and row["kind"] in KINDS]
    steps = 2 if args.smoke else REFERENCE
    reference = {"model": model, "kind": "dense reference", "budget": steps, "n_calls": steps, "solver": "dpmsolver++"}
    reference |= {"timesteps": trailing(steps, 1000), "levels": [0] * steps, "latent_mse": 0.0}
    return [reference, *sorted(rows, key=lambda row: (row["budget"], KINDS.index(row["kind"])))]


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each plan."""
    head = "| model | dense calls | plan | calls | latent MSE | right | Fréchet distance | variance of features |"
    lines = [head, "|" + "---|" * 8]
    lines += [
        f"| {row['model']} | {row['budget']:g} | {row['kind']} | {row['n_calls']} | {row['latent_mse']:.4f} "
        f"| {row['right']:.1%} | {row['frechet']:.2f} | {row['variance']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models())
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[2, 3, 4, 6, 8], help="of the points, in dense calls"
    )
    parser.add_argument("--points", type=Path, default=FRONTS, help="folder that `fronts.py` wrote")
    parser.add_argument("--probes", type=int, default=32, help="of the searches that found the points")
    parser.add_argument("--n-images", type=int, default=2000, help="images of each plan, a multiple of 10")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the four Fashion-MNIST idx files")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--work", type=Path, default=Path("runs/quality-fashion-dit"), help="keeps that classifier")
    parser.add_argument("--scenes", type=int, default=16_000, help="that the judge of emoji-sdxl learns from")
    parser.add_argument("--epochs", type=int, default=5, help="of the classifiers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a few images, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.n_images, args.epochs, args.scenes, args.work = 20, 1, 256, args.work / "smoke"
        args.out, args.budgets = (Path("runs/smoke") if args.out == RESULTS else args.out), [4]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quality_plans.jsonl"
    rows = read(path) if not args.smoke else []
    for model in args.models:
        done = {(row["kind"], row["budget"]) for row in rows if row["model"] == model}
        left = [point for point in chosen(args, model) if (point["kind"], point["budget"]) not in done]
        if not left:
            continue
        judge = JUDGES[model](args)
        config = RunConfig(model=model, guidance=GUIDANCE[model], cost="macs", probes=args.probes)
        if args.smoke:
            config = replace(config, calibration_samples=8)
        bench = prepare(config, RichProgress())
        bench.adapter.pipe.set_progress_bar_config(disable=True)
        for point in left:
            keep(row_of(bench, judge, point), rows, path, table_of)
    print(table_of(rows))


if __name__ == "__main__":
    main()
