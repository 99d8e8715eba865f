"""Do plans draw what is asked for? Class accuracy and Fréchet distance of every plan of a front of `fashion-dit`.

The judge and the distance are those of `quality_fashion_dit.py`; each plan draws as many images, from the same noise,
through the diffusers pipeline. The dense model at the reference's number of steps stands beside them.

    diffes front --budgets 3 4 6 8 && python benchmarks/quality_plans.py --run runs/fashion-dit-obs-front-macs-s0
    python benchmarks/quality_plans.py --run RUN --smoke    # a few images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import quality_fashion_dit as quality
from train_fashion_dit import DATA_DIR

from diffes.adapters import adapter_for, load_pipeline
from diffes.pruning.bank import WeightBank
from diffes.runtime.artifact import BANK, read_front
from diffes.runtime.router import Router
from diffes.runtime.solver import scheduler_for
from diffes.search.plan import trailing
from diffes.search.schedule import Plan

RESULTS = Path(__file__).parent / "results"


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the judge says of the images of each plan at the budgets asked for, and of the dense reference."""
    data = read_front(args.run)
    classifier = quality.cached_classifier(args)
    real = quality.load_real(classifier, args)
    asked = quality.asked_classes(args.n_images)
    pipe = load_pipeline("fashion-dit", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    adapter, own = adapter_for(pipe), pipe.scheduler
    router = Router(adapter, WeightBank.open(args.run / BANK)[0])
    steps = data["reference"]["steps"] if not args.smoke else 2
    reference = {"kind": "dense reference", "budget": steps, "timesteps": trailing(steps, adapter.n_timesteps)}
    points = [p for p in data["points"] if args.budgets is None or p["budget"] in args.budgets]
    rows = []
    for point in [reference | {"levels": [0] * steps, "latent_mse": 0.0}, *points]:
        shared = {name: data[name] for name in ("stages", "max_level", "solver")}
        plan = Plan.from_json({**shared, "timesteps": point["timesteps"], "levels": point["levels"]})
        pipe.scheduler = scheduler_for(own, plan.solver, plan.timesteps)
        with router.routed(plan):
            images = quality.generate(pipe, args.n_images, len(plan.calls), data["guidance"], args.seed)
        judged = classifier.judge(images)
        rows.append(
            {
                "kind": point["kind"], "budget": point["budget"], "n_calls": len(plan.calls),
                "latent_mse": point["latent_mse"],
                "accuracy": quality.agreement(judged.assigned, asked)["overall"],
                "frechet": round(quality.frechet(judged.features, real.reference), 3),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that `diffes front` or `diffes search` wrote")
    parser.add_argument("--budgets", type=float, nargs="+", help="of the front; all when left out")
    parser.add_argument("--n-images", type=int, default=2000, help="images of each plan, a multiple of 10")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the four Fashion-MNIST idx files")
    parser.add_argument("--work", type=Path, default=Path("runs/quality-fashion-dit"), help="keeps the classifier")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a few images, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.n_images, args.epochs, args.work = 20, 1, args.work / "smoke"
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args)
    (args.out / "quality_plans.jsonl").write_text(
        "".join(json.dumps(row | {"images": args.n_images}) + "\n" for row in rows)
    )
    lines = ["| dense calls | plan | calls | latent MSE | right class | Fréchet distance |", "|" + "---|" * 6]
    lines += [
        f"| {row['budget']:g} | {row['kind']} | {row['n_calls']} | {row['latent_mse']:.4f} | {row['accuracy']:.1%} "
        f"| {row['frechet']:.2f} |"
        for row in rows
    ]
    (args.out / "quality_plans.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
