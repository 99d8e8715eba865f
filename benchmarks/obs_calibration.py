"""How long does OBS take to calibrate the published models, and how much of that did eliminating in blocks save?

One layer of every shape that DiT-XL/2-256 and SDXL base 1.0 have, random weights, correlated inputs. `OBS.factor` is
timed as a whole. The elimination it replaced is below as `one_by_one`: all its columns of one level cost the same, so
a few are timed at every level's width and the rest is arithmetic. The two take turns; medians, of the
time of one thread on its core, which other processes do not add to. Hours are these seconds
times sets times stages. Beside them those of the statistics' products `x^T x`, from the seconds of 1024 tokens; the
denoiser's own calls are not in it.

    python benchmarks/obs_calibration.py            # one thread, 4 GB of memory, 4 minutes of a free core
    python benchmarks/obs_calibration.py --smoke    # a quarter of the width, into runs/smoke
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from published_models import adapter_of, dit, unet
from torch import Tensor

from diffes.adapters import GroupSet, ModelAdapter
from diffes.config import RunConfig
from diffes.pruning import LayerWeights
from diffes.pruning.obs import OBS, damped
from diffes.results.folder import config_record

RESULTS = Path(__file__).parent / "results"
Shape = tuple[int, int, int, int, int]  # groups, inputs per group, outputs, levels, tokens of an image


def one_by_one(weight: Tensor, inverse: Tensor, size: int, n_dropped: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `eliminate` was before: each group updates the whole of `W` and `H^-1`; also returns who is left."""
    n = weight.shape[1] // size
    alive = torch.ones(n, dtype=torch.bool)
    for _ in range(n_dropped):
        if size == 1:
            loss = weight.square().sum(0) / inverse.diagonal()
        else:
            blocks = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            columns = weight.view(-1, n, size).permute(1, 2, 0)
            loss = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
        group = int(torch.where(alive, loss, torch.inf).argmin())
        span = slice(group * size, (group + 1) * size)
        factor = torch.linalg.solve(inverse[span, span], inverse[span])
        weight.addmm_(weight[:, span].clone(), factor, alpha=-1)
        inverse.addmm_(inverse[:, span].clone(), factor, alpha=-1)
        inverse[span] = inverse[:, span] = weight[:, span] = 0
        inverse[span, span] = torch.eye(size, dtype=inverse.dtype)
        alive[group] = False
    left = alive.repeat_interleave(size)
    return weight[:, left], inverse[left][:, left], alive


def layer(n_groups: int, size: int, d_out: int) -> tuple[GroupSet, LayerWeights, Tensor]:
    """Random weights of unequal columns, and the fp32 second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    d = n_groups * size
    x = torch.randn(d + 512, d // 4, generator=generator) @ torch.randn(d // 4, d, generator=generator) / d**0.5
    x += 0.3 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(d_out, d, generator=generator) * (0.1 + torch.rand(d, generator=generator))
    groups = GroupSet("layer", n_groups, size, (), ("out",))
    return groups, LayerWeights((), (weight,)), x.T @ x / len(x)


def seconds(run: Callable[..., object], *args: Any) -> float:
    start = time.process_time()
    run(*args)
    return time.process_time() - start


def one_by_one_seconds(weight: Tensor, inverse: Tensor, size: int, widths: Sequence[int], columns: int) -> float:
    """All levels of `one_by_one`, extrapolated from a few groups of each."""
    total = 0.0
    for wide, thin in itertools.pairwise(widths):
        d, timed = wide * size, min(columns, wide - thin)
        w, h = weight[:, :d].double(), inverse[:d, :d].clone()
        copies = seconds(one_by_one, w, h, size, 0)
        all_of_it = seconds(one_by_one, w, h, size, timed)
        total += copies + (all_of_it - copies) / max(timed, 1) * (wide - thin)
    return total


def invert(hessian: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def measure(shape: Shape, columns: int, repeats: int) -> dict[str, Any]:
    """Seconds of one layer: the medians of what takes turns."""
    n_groups, size, d_out, levels, _ = shape
    groups, weights, moment = layer(n_groups, size, d_out)
    widths = [groups.n_kept(level, levels) for level in range(levels + 1)]
    tokens = torch.randn(1024, n_groups * size)
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        hessian = damped(moment, 0.01)
        start = time.process_time()
        inverse = torch.linalg.inv(hessian)
        parts = {"inverse_before": time.process_time() - start}
        parts["eliminate_before"] = one_by_one_seconds(weights.consumers[0], inverse, size, widths, columns)
        del inverse
        parts["inverse"] = seconds(invert, hessian)
        parts["prune"] = seconds(OBS().factor, groups, weights, (moment,))
        parts["moment_of_1024_tokens"] = seconds(torch.mm, tokens.T, tokens)
        for name, value in parts.items():
            found.setdefault(name, []).append(value)
    row: dict[str, Any] = {name: round(median(values), 4) for name, values in found.items()}
    row["prune_before"] = round(row["inverse_before"] + row["eliminate_before"], 4)
    row["speedup"] = round(row["prune_before"] / row["prune"], 2)
    row["speedup_of_elimination"] = round(row["eliminate_before"] / (row["prune"] - row["inverse"]), 2)
    return dict(zip(("groups", "size", "d_out", "levels", "tokens"), shape, strict=True)) | row


def agreement(n: int) -> dict[str, Any]:
    """Both ways through all 20 levels of an n-wide layer: kept sets, and the largest relative difference of weights."""
    groups, single, moment = layer(n, 1, n // 4)
    weights = LayerWeights((), (single.consumers[0].double(),))
    widths = [groups.n_kept(level, 20) for level in range(20)]
    w, h, kept = weights.consumers[0].clone(), torch.linalg.inv(damped(moment, 0.01)), torch.arange(n)
    same, difference = True, 0.0
    for width, thin in zip(widths, OBS().prune(groups, weights, (moment,), widths), strict=True):
        w, h, alive = one_by_one(w, h, 1, len(kept) - width)
        kept = kept[alive]
        same = same and kept.tolist() == thin.kept.tolist()
        if same:
            difference = max(difference, float((thin.consumers[0] - w).norm() / w.norm()))
    return {"width": n, "same_kept_sets": same, "largest_difference": difference}


def shapes_of(adapter: ModelAdapter, tokens: Callable[[int], int], shrink: int) -> Counter[Shape]:
    """How many sets of each shape a model has; `tokens` of an image by outputs of the projection."""
    top, found = adapter.max_level("width"), Counter[Shape]()
    for groups in adapter.group_sets():
        d_out = adapter.denoiser.get_submodule(groups.consumers[0]).out_features
        n_groups = groups.n_groups if groups.size > 1 else groups.n_groups // shrink
        found[n_groups, groups.size // shrink or 1, d_out // shrink, top, tokens(d_out)] += 1
    return found


def table_of(data: dict[str, Any]) -> str:
    lines = ["| consumer | levels | before, s | in blocks, s | its inverse, s | speed-up | of the elimination |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in data["layers"]:
        inputs = f"{row['groups']}" if row["size"] == 1 else f"{row['groups']} heads of {row['size']}"
        lines.append(
            f"| {inputs} to {row['d_out']} | {row['levels']} | {row['prune_before']:.2f} | {row['prune']:.2f} "
            f"| {row['inverse']:.2f} | {row['speedup']:.1f}x | {row['speedup_of_elimination']:.1f}x |"
        )
    lines += ["", f"| model, {data['stages']} stages | sets | before, h | in blocks, h "
              f"| products of the statistics of {data['images']} images, h |", "|---|---|---|---|---|"]  # fmt: skip
    for name, hours in data["hours"].items():
        lines.append(f"| {name} | {hours['sets']} | {hours['before']} | {hours['prune']} | {hours['statistics']} |")
    both = data["agreement"]
    lines += ["", f"Both ways over all levels of a layer {both['width']} wide: kept sets "
              f"{'the same' if both['same_kept_sets'] else 'DIFFERENT'}, weights within "
              f"{both['largest_difference']:.0e} (relative, fp64)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument("--images", type=int, default=256, help="calibration images of a stage")
    parser.add_argument("--columns", type=int, default=4, help="groups of each level timed one by one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a quarter of the width, once")
    args = parser.parse_args()
    if args.smoke:
        args.columns, args.repeats = 2, 1
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    torch.set_num_threads(1)
    with torch.device("meta"):
        transformer, network = dit(), unet()
    shrink = 4 if args.smoke else 1
    models = {
        "DiT-XL/2-256": shapes_of(adapter_of(transformer), lambda _: 256, shrink),
        "SDXL base 1.0, 1024 px": shapes_of(adapter_of(network), lambda d_out: (128 * 320 // d_out) ** 2, shrink),
    }
    rows = {}
    for shape in dict.fromkeys(shape for shapes in models.values() for shape in shapes):
        rows[shape] = measure(shape, args.columns, args.repeats)
        print(json.dumps(rows[shape]), flush=True)
    hours: dict[str, dict[str, Any]] = {}
    for name, shapes in models.items():
        total = Counter[str]()
        for shape, n_sets in shapes.items():
            row, runs = rows[shape], n_sets * args.stages / 3600
            total["before"] += runs * row["prune_before"]
            total["prune"] += runs * row["prune"]
            total["statistics"] += runs * row["moment_of_1024_tokens"] * shape[-1] * args.images / 1024
        hours[name] = {"sets": shapes.total(), **{key: round(value, 2) for key, value in total.items()}}
    data = {
        "layers": list(rows.values()), "hours": hours, "agreement": agreement(256 if args.smoke else 1536),
        "stages": args.stages, "images": args.images, "columns": args.columns, "repeats": args.repeats, "threads": 1,
        "device": "cpu", "versions": config_record(RunConfig())["versions"],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "obs_calibration.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / "obs_calibration.md").write_text(table_of(data))
    print(table_of(data))


if __name__ == "__main__":
    main()
