"""What does routing cost beside a model that is thin for good? And a change of level, by what stays ready?

One denoiser call at half of the levels, kinds taking turns: dense; statically thin (the layers cut, no hook on the
model); routed, in the stage of the last call; routed, coming from another level, so that every layer changes, with thin
layers ready on the device (`resident="all"`) and made when they are needed (`"stream"`). Each follows a call of the
other level, as in a run. The limit of a change in `stream` is what the thin tensors' bytes take to copy. And what does
the device hold in `stream`, relative to the dense model, at mean sparsity 0.3 and 0.5?

    python benchmarks/routing.py                       # both shipped models, batches 1 and 16; two minutes
    python benchmarks/routing.py --models dit-xl       # DiT-XL/2-256, random weights, 8 GB, batches 1 and 2
    python benchmarks/routing.py --models dit-xl sdxl --device cuda --dtype float16
    python benchmarks/routing.py --smoke
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from published_models import MODELS, device_name, published

from diffes.adapters import ModelAdapter, adapter_for, load_pipeline, shipped_models
from diffes.config import RunConfig
from diffes.measure.currencies import interleaved_ms
from diffes.pruning import METHODS
from diffes.pruning.build import build_bank
from diffes.results.folder import config_record
from diffes.runtime.parts import WidthPart
from diffes.runtime.resident import Resident
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

RESULTS = Path(__file__).parent / "results"
KINDS = ("dense", "static", "routed, same level", "routed, all", "routed, stream")
STAGES = Stages.equal(2)
FIRST, SECOND = 900, 100  # timesteps of the two stages
SPARSITIES = (0.3, 0.5)


def device_bytes(adapter: ModelAdapter, router: Router) -> int:
    """Bytes on the device: of all memory that the model's parameters lie in, and of dense tensors beside it. Where the
    device is the CPU, dense consumers do not count: beside a GPU they wait in host memory, as the bank does."""
    tensors = list(adapter.denoiser.parameters())
    for part in router._parts.values():
        if isinstance(part, WidthPart):
            waiting = [held.dense for held in part._away if held.dense.device.type != "cpu"]
            tensors += [*waiting, *(held.dense for held in part._by_row)]
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(each.nbytes() for each in memory.values() if each.device == adapter.device)


def measure(adapter: ModelAdapter, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a call, by kind, and of a copy of as many bytes as the thin layers have; by sparsity, what the
    device holds in `stream`, relative to the dense model."""
    magnitude = METHODS.make("magnitude")
    bank = build_bank(adapter, magnitude, STAGES, None, guidance=1.0, seed=0, allocation="equal")
    half = bank.max_level // 2
    schedule = Schedule(STAGES, (half, half + 1), bank.max_level)  # stage 0 is the cleanest
    routers = {mode: Router(adapter, bank, resident=mode) for mode in ("all", "stream")}
    ready = Resident(None)
    parts = [WidthPart(adapter, groups, ready) for groups in adapter.group_sets()]
    probes = adapter.make_probes(batch, 0)
    latents = adapter.noise(probes)

    def call(timestep: int) -> torch.Tensor:
        return adapter.denoise_once(latents, torch.full((batch,), timestep), probes.conditions)

    def dense() -> None:
        for router in routers.values():
            router.remove()
        for part in parts:
            part.load_dense()

    def static(level: int) -> None:
        stage = 0 if level == half else 1
        for part in parts:
            part.load_pruned(bank[stage, level][part.groups.name])

    def before_static() -> None:
        dense()
        static(half + 1)
        call(FIRST)
        static(half)

    def before_routed(mode: str, *timesteps: int) -> None:
        dense()
        routers[mode].install(schedule)
        for timestep in timesteps:
            call(timestep)

    def before_dense() -> None:
        dense()
        call(FIRST)

    before: list[Callable[[], object]] = [
        before_dense, before_static, partial(before_routed, "all", FIRST, SECOND),
        partial(before_routed, "all", FIRST), partial(before_routed, "stream", FIRST),
    ]  # fmt: skip
    static(half)
    n_bytes = ready.nbytes
    before_static()
    expected = call(SECOND)
    before_routed("stream", FIRST)
    assert torch.equal(call(SECOND), expected), "a routed call is not what the thin model predicts"
    ms = interleaved_ms([partial(call, SECOND)] * len(KINDS), repeats, adapter.device, before)
    dense()
    stream, held, dense_bytes = routers["stream"], {}, sum(p.nbytes for p in adapter.denoiser.parameters())
    for sparsity in SPARSITIES:
        level = round(sparsity * bank.max_level)
        with stream.routed(Schedule(STAGES, (level, level), bank.max_level)):
            call(FIRST)
            held[str(sparsity)] = round(device_bytes(adapter, stream) / dense_bytes, 3)
    tensors = [torch.ones(n_bytes // 64, dtype=torch.uint8, device=adapter.device) for _ in range(64)]
    copied = interleaved_ms([lambda: [tensor.clone() for tensor in tensors]], repeats, adapter.device)[0]
    return dict(zip(KINDS, (round(each, 3) for each in ms), strict=True)) | {
        "batch": batch, "level": half, "thin_mb": round(n_bytes / 1e6, 2), "copy_ms": round(copied, 3),
        "held": held,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the table: times, then ratios."""
    static, same, ready, stream = (row[kind] for kind in KINDS[1:])
    cells = [
        row["model"], row["device"], str(row["batch"]), *(f"{row[kind]:.2f}" for kind in KINDS),
        f"{ready / static:.3f}x", f"{(ready + same) / 2 / static:.3f}x", f"{stream / static:.3f}x",
        f"{stream - same:.2f}", f"{row['copy_ms']:.2f}",
        *(f"{row['held'][str(each)]:.3f}x" if "held" in row else "" for each in SPARSITIES),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["model", "device", "batch", *(f"{kind}, ms" for kind in KINDS)]
    head += ["change at every call / static", "at every second", "stream / static", "change in stream, ms"]
    head += ["copy of its bytes, ms", *(f"device in stream / dense at {each}" for each in SPARSITIES)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(line, rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped_models(), help="shipped ones, dit-xl, sdxl")
    parser.add_argument("--batches", type=int, nargs="+", help="1 and 16; of dit-xl and sdxl 1 and 2")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.batches, args.repeats = [1], 1
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "routing.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    name = device_name(args.device)
    rows = [row for row in rows if (row["model"], row["device"]) not in {(model, name) for model in args.models}]
    facts = {
        "device": name,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "versions": config_record(RunConfig())["versions"],
    }
    for model in args.models:
        if model in MODELS:
            adapter = published(model, args.device, args.dtype, args.smoke)
        else:
            adapter = adapter_for(load_pipeline(model, device=args.device, dtype=getattr(torch, args.dtype)))
        with torch.no_grad():
            for batch in args.batches or ([1, 2] if model in MODELS else [1, 16]):
                rows.append({"model": model, **measure(adapter, batch, args.repeats), "repeats": args.repeats, **facts})
                print(line(rows[-1]), flush=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                (args.out / "routing.md").write_text(table_of(rows))


if __name__ == "__main__":
    main()
