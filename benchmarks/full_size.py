r"""Does a search with OBS run over the published models: how much memory, how long does each part take?

`--part layers`: one layer of every shape of DiT-XL/2-256 and SDXL base 1.0, random weights, correlated inputs. Order
and triangle are made, then levels from them; sizes of banks are arithmetic. `--part search`: DiT-XL/2-256 with random
weights from calibration to an applied result, in this process: statistics, triangles, damage, a search, the bank of
the schedule found, `diffes.apply`, a sampling run. With `--eliminate N` only the first N layers of each shape are
really eliminated, the others take a copy of what came out: memory is the same, and the time of the triangles is to be
multiplied. Seconds are of this process's own processor time, which other processes do not add to, and of the clock.

    python benchmarks/full_size.py                          # all of it: one thread, 12 GB, about an hour of a free core
    python benchmarks/full_size.py --eliminate 1            # the same in a quarter of the time
    python benchmarks/full_size.py --part search --small --probes 16 --guidance 2 --steps 20 --evals 40 --eliminate 1 \
        --memory 0.29                                       # what share of a real search goes to making levels
    python benchmarks/full_size.py --smoke                  # two blocks, a quarter of the width, into runs/smoke
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from obs_calibration import RESULTS, Shape, layer, shapes_of
from published_models import MODELS, adapter_of, device_name, dit, published, unet
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.measure.metrics import make_metric
from diffes.problems.workbench import Workbench
from diffes.pruning import METHODS, build
from diffes.pruning.calibration import CalibrationSet
from diffes.pruning.factors import Factor, LayerStatistics, packed_size
from diffes.pruning.obs import OBS
from diffes.pruning.sensitivity import StageSensitivity
from diffes.results.artifact import BANK
from diffes.results.folder import config_record
from diffes.runtime.apply import apply, remove
from diffes.runtime.router import Router
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES
from diffes.study.run import write_result


def measure_layer(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of one layer: order and triangle, and levels a quarter, a half and three quarters down."""
    n_groups, size, d_out = shape[:3]
    groups, weights, moment = layer(n_groups, size, d_out)
    start = time.process_time()
    factor = OBS().factor(groups, weights, (moment,))
    row: dict[str, Any] = {"factor_s": round(time.process_time() - start, 3)}
    dense = weights.consumers[0].to(dtype)
    for quarter in (1, 2, 3):
        n = groups.n_kept(quarter, 4)
        start = time.process_time()
        factor.consumers((dense,), n)
        row[f"level_{quarter}_of_4_s"] = round(time.process_time() - start, 4)
    return dict(zip(("groups", "size", "d_out", "levels", "tokens"), shape, strict=True)) | row


def layers(stages: int, smoke: bool) -> dict[str, Any]:
    """All shapes, and what the two models take by arithmetic."""
    with torch.device("meta"):
        transformer, network = dit(), unet()
    shrink = 8 if smoke else 1
    models = {"DiT-XL/2-256": transformer, "SDXL base 1.0": network}
    shapes = {name: shapes_of(adapter_of(model), lambda _: 0, shrink) for name, model in models.items()}
    rows = {}
    for shape in dict.fromkeys(shape for counted in shapes.values() for shape in counted):
        rows[shape] = measure_layer(shape, torch.float32)
        print(json.dumps(rows[shape]), flush=True)
    return {
        "stages": stages, "layers": list(rows.values()),
        "models": {name: summed(counted, rows, stages) for name, counted in shapes.items()},
    }  # fmt: skip


def summed(counted: Counter[Shape], rows: dict[Shape, dict[str, Any]], stages: int) -> dict[str, Any]:
    """Bytes of banks in fp16, hours of triangles and seconds of a level of one stage."""
    every = triangles = 0
    seconds: Counter[str] = Counter()
    for shape, n_sets in counted.items():
        n_groups, size, d_out, levels, _ = shape
        kept = sum(n_groups * size * (levels - level) / levels for level in range(1, levels + 1))
        every += int(2 * stages * n_sets * d_out * kept)
        triangles += 2 * stages * n_sets * packed_size(n_groups * size)
        for name, value in rows[shape].items():
            if name.endswith("_s"):
                seconds[name] += value * n_sets
    return {
        "sets": counted.total(), "all_levels_gb": round(every / 1e9, 1), "triangles_gb": round(triangles / 1e9, 1),
        "triangles_h": round(seconds["factor_s"] * stages / 3600, 2),
        **{f"stage_{name}": round(value, 1) for name, value in seconds.items() if name != "factor_s"},
    }  # fmt: skip


class Parts:
    """Seconds of each part, summed over its calls, and the most memory that the process has had by its end."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        clock, own = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        row = self.found.setdefault(name, {"cpu_s": 0.0, "clock_s": 0.0, "calls": 0})
        row["cpu_s"] = round(row["cpu_s"] + time.process_time() - own, 2)
        row["clock_s"] = round(row["clock_s"] + time.perf_counter() - clock, 1)
        row["calls"] += 1
        if torch.cuda.is_initialized():
            row["device_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
        print(name, json.dumps(row), flush=True)

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*args, **options)

        return timed


def first_ones(eliminate: int, parts: Parts) -> Callable[..., Iterator[Factor]]:
    """Eliminates so many layers of each shape, and hands out copies of what came out for the others."""
    done: Counter[tuple[int, int]] = Counter()
    like: dict[tuple[int, int], Factor] = {}
    factors = OBS.factors

    def copied(method: OBS, layers: Iterable[LayerStatistics]) -> Iterator[Factor]:
        waiting = list(layers)
        shape = (waiting[0].groups.n_groups, waiting[0].groups.size)
        n = min(len(waiting), eliminate - done[shape])
        with parts.part("triangles"):
            made = list(factors(method, waiting[:n]))
        done[shape] += n
        like[shape] = (made or [like[shape]])[0]
        (triangle,) = like[shape].triangles
        assert isinstance(triangle, Tensor)
        yield from made
        for each in waiting[n:]:
            yield Factor(each.groups, like[shape].order.clone(), (triangle.clone(),))

    return copied


def search(config: RunConfig, out: Path, make: Callable[[], ModelAdapter], eliminate: int) -> dict[str, Any]:
    """From calibration to a sampling run of the applied result."""
    parts = Parts()
    build.input_moments = parts.of("statistics", build.input_moments)  # type: ignore[attr-defined]
    StageSensitivity.measure = parts.of("sensitivity", StageSensitivity.measure)  # type: ignore[method-assign]
    OBS.factors = first_ones(eliminate, parts)  # type: ignore[method-assign]
    with parts.part("model"):
        adapter = make()
    stages, n = Stages.equal(config.stages, adapter.n_timesteps), config.calibration_samples
    side = adapter.denoiser.config.sample_size
    latents = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(0))
    data = CalibrationSet(latents, adapter.make_probes(n, 0, "calibration").conditions, "noise")
    top = adapter.max_level("width")
    steps = stages.count_steps(adapter.timesteps(config.steps))
    space = SearchSpace.mean_sparsity(stages, top, 0.5, steps)
    with parts.part("calibration, all of it"):
        bank = build.build_bank(
            adapter, METHODS.make(config.method), stages, data, guidance=config.scale, seed=config.seed,
            allocation=config.allocation, only=space.visited, memory=config.bank_bytes,
        )  # fmt: skip
    assert bank.workshop is not None
    evaluator = ScheduleEvaluator(
        Router(adapter, bank), stages, adapter.make_probes(config.probes, config.seed), n_steps=config.steps,
        guidance=config.scale, metric=make_metric("latent_mse", adapter.device),
    )  # fmt: skip
    with parts.part("search"):
        strategy = STRATEGIES.make(config.strategy, space, seed=config.seed)
        result = run_search(strategy, evaluator, max_evals=config.max_evals)
    making = bank.workshop.seconds
    with parts.part("write the result"):
        best = result.best.schedule
        bench = Workbench(config, adapter, space, evaluator.router, evaluator.metric, [])
        write_result(bench, best, out)
    with parts.part("apply, one image"), torch.no_grad():
        apply(adapter.pipe, out)
        adapter.sample(adapter.make_probes(1, 1), config.steps, config.scale)
        remove(adapter.pipe)
    return {
        "parts": parts.found, "triangles": len(adapter.group_sets()) * len(space.visited),
        "blocks": len(adapter.blocks()),
        "stages": config.stages, "stages_visited": len(space.visited),
        "levels": top, "parameters": sum(p.numel() for p in adapter.denoiser.parameters()),
        "settings": {name: getattr(config, name) for name in (
            "allocation", "calibration_samples", "guidance", "steps", "probes", "max_evals", "bank_memory")},
        "schedule": list(best.levels), "bank_bytes": (out / BANK).stat().st_size,
        "workshop": {"memory_bytes": bank.workshop.nbytes, "file_bytes": bank.workshop.filed,
                     "consumers_made": bank.workshop.made, "seconds": round(making, 1),
                     "share_of_search": round(making / parts.found["search"]["clock_s"], 4)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("layers", "search", "all"), default="all")
    parser.add_argument("--model", choices=MODELS, default="dit-xl", help="of the search")
    parser.add_argument("--device", default="cpu", help="of the search")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the search")
    parser.add_argument("--stages", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--evals", type=int, default=3, help="of the search")
    parser.add_argument("--probes", type=int, default=2, help="of the search")
    parser.add_argument("--guidance", type=float, default=1.0, help="of the search")
    parser.add_argument("--small", action="store_true", help="search with two blocks a place")
    parser.add_argument("--images", type=int, default=8, help="calibration latents of a stage")
    parser.add_argument("--eliminate", type=int, default=10**6, help="layers of each shape, of all stages together")
    parser.add_argument("--memory", type=float, default=2.0, help="GB, as --bank-memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="two blocks, two stages, narrow layers")
    args = parser.parse_args()
    if args.smoke:
        args.stages, args.steps, args.images, args.eliminate = 2, 2, 1, 1
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    name = device_name(args.device)
    about = {"threads": 1, "device": name, "dtype": args.dtype, "versions": config_record(RunConfig())["versions"]}
    if args.part != "search":
        data = layers(args.stages, args.smoke) | about
        (args.out / "full_size_layers.json").write_text(json.dumps(data, indent=1) + "\n")
        print(json.dumps(data["models"], indent=1))
    if args.part != "layers":
        hub = {"dit-xl": "facebook/DiT-XL-2-256", "sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
        config = RunConfig(
            genes="levels",
            model=hub[args.model], dtype=args.dtype, stages=args.stages, steps=args.steps, guidance=args.guidance,
            probes=args.probes, max_evals=args.evals, bank_memory=args.memory, calibration_samples=args.images,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            small = args.small or args.smoke
            make = partial(published, args.model, args.device, args.dtype, small)
            found = {"model": args.model} | search(config, Path(folder), make, args.eliminate) | about
        tag = "" if args.device == "cpu" and args.model == "dit-xl" else f"_{args.model}_{args.device}"
        tag += "_small" if args.small else ""
        (args.out / f"full_size_search{tag}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
