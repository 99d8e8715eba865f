"""Do multiply-accumulates that a level saves arrive as time on the published models? Calls timed by level and method.

DiT-XL/2-256 and SDXL base 1.0 at 1024 px, random weights (time does not depend on them), levels taking turns, the
change of weights included. On a GPU each call is also recorded as one CUDA graph: what the device itself takes, where
it waits for no launches. With `--compile`, the dense model and half a width are compiled as well, by each way
that is named: every transformer block for itself (`blocks`), or the denoiser as a whole.

    python benchmarks/call_times.py --device cuda --dtype float16 --compile blocks reduce-overhead   # needs 20 GB
    python benchmarks/call_times.py --models dit-xl --batches 2          # half an hour on a CPU, 8 GB
    python benchmarks/call_times.py --smoke                              # two blocks a place, into runs/smoke
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from published_models import MODELS, device_name, published
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig
from diffes.measure.currencies import clock_of, interleaved_ms, macs_by_level
from diffes.pruning import GroupWeights
from diffes.pruning.bank import WeightBank
from diffes.results.folder import config_record
from diffes.runtime.router import Router
from diffes.spaces.schedule import Plan, Stages

RESULTS = Path(__file__).parent / "results"
BATCHES = {"dit-xl": [2, 8, 32], "sdxl": [2, 8]}  # rows of a call: an image with guidance is two
LEVELS = 4  # of which the last, with nothing left, is not measured
COMPILED = (0, LEVELS // 2)  # levels that are compiled: dense, a half
STAGES = Stages.equal(2)
FIRST, SECOND = 900, 100  # their timesteps
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {}, "whole": {}, "reduce-overhead": {"mode": "reduce-overhead"}, "max-autotune": {"mode": "max-autotune"},
    "cudagraphs": {"backend": "cudagraphs"}, "eager": {"backend": "eager"},
}  # fmt: skip


def banks_of(adapter: ModelAdapter) -> dict[str, WeightBank]:
    """By what levels do, a bank whose level k leaves (or computes) 1 - k/4 of all groups, the first ones."""
    sets = {"width": adapter.prunable("width"), "depth": adapter.prunable("depth")}
    sets |= {each.name: [each] for each in adapter.prunable("reuse")}
    banks = {}
    for name, parts in sets.items():
        kind = name if name in ("width", "depth") else "reuse"
        entries: dict[tuple[int, int], dict[str, GroupWeights]] = {}
        for level in range(1, LEVELS):
            kept = {part.name: torch.arange(part.n_kept(level, LEVELS), dtype=torch.int32) for part in parts}
            if name == "up_layers":  # the outermost ones, which come last
                kept = {part.name: torch.arange(part.n_groups - len(kept[part.name]), part.n_groups) for part in parts}
            entries |= {(s, level): {each: GroupWeights(k.int()) for each, k in kept.items()} for s in (0, 1)}
        banks[name] = WeightBank(entries, kind, max_level=LEVELS - 1)
    return banks


def plan_of(level: int) -> Plan:
    """A dense call, and one at a level."""
    return Plan(STAGES, ((FIRST, 0), (SECOND, level)), LEVELS - 1, solver="")


class Calls:
    """Calls of a routed model on one batch."""

    def __init__(self, adapter: ModelAdapter, bank: WeightBank, batch: int) -> None:
        self.adapter = adapter
        self.router = Router(adapter, bank, resident="all")
        self.batch = batch
        self.probes = adapter.make_probes(batch, 0)
        self.latents = adapter.noise(self.probes)
        self.clock = clock_of(adapter, plan_of(0))

    def call(self, timestep: int = SECOND) -> Tensor:
        self.clock.index = self.clock.plan.index(timestep)
        with self.adapter.counted_by(self.clock):
            return self.adapter.denoise_once(self.latents, torch.full((self.batch,), timestep), self.probes.conditions)

    def enter(self, level: int) -> None:
        """Up to the call at a level."""
        self.router.install(plan_of(level), keep=True)
        self.call(FIRST)

    def recorded(self, level: int) -> Callable[[], object]:
        """The forward of a call at a level as one CUDA graph, without hooks: what the device takes for it."""
        seen: dict[str, Any] = {}

        def note(_module: object, args: Any, kwargs: Any) -> None:
            seen.update(args=args, kwargs=kwargs, memory=self.router.memory)

        denoiser, stream = self.adapter.denoiser, torch.cuda.Stream()
        self.enter(level)
        with denoiser.register_forward_pre_hook(note, with_kwargs=True):
            self.call()
        self.router.memory = seen["memory"]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                denoiser.forward(*seen["args"], **seen["kwargs"])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = denoiser.forward(*seen["args"], **seen["kwargs"])
        weights = [parameter.data for parameter in denoiser.parameters()]

        def replay(_alive: object = (kept, weights, seen)) -> None:
            graph.replay()

        return replay

    def milliseconds(self, levels: Sequence[int], repeats: int) -> dict[str, list[float]]:
        """Of calls at levels in turns, as they are, and recorded where there is a GPU."""
        enter = [partial(self.enter, level) for level in levels]
        try:
            found = {"ms": interleaved_ms([self.call] * len(levels), repeats, self.adapter.device, enter)}
            if self.adapter.device.type == "cuda":
                graphs = [self.recorded(level) for level in levels]
                found["recorded"] = interleaved_ms(graphs, 4 * repeats, self.adapter.device)
            return {name: [round(each, 3) for each in ms] for name, ms in found.items()}
        finally:
            self.router.remove()


def measure(adapter: ModelAdapter, bank: WeightBank, batch: int, repeats: int) -> dict[str, Any]:
    """Shares of the dense call's MACs, and milliseconds, by level."""
    calls = Calls(adapter, bank, batch)
    macs = macs_by_level(calls.router, STAGES, [0], LEVELS - 1)[0]
    return {"macs": [round(each / macs[0], 4) for each in macs]} | calls.milliseconds(range(LEVELS), repeats)


def compiled(adapter: ModelAdapter, bank: WeightBank, batch: int, repeats: int, way: str) -> dict[str, Any]:
    """As `measure`, compiled, with the seconds that compiling took and how far results are from those before."""
    calls = Calls(adapter, bank, batch)
    torch.compiler.reset()
    expected = []
    for level in COMPILED:
        calls.enter(level)
        expected.append(calls.call().clone())
    blocks = [adapter.denoiser.get_submodule(path) for path in adapter.blocks()]
    modules = blocks if way == "blocks" else [adapter.denoiser]
    for module in modules:
        module.compile(**WAYS[way])
    start = time.perf_counter()
    try:
        worst = 0.0
        for level, eager in zip(COMPILED, expected, strict=True):
            for _ in range(3):  # graphs are recorded in the second call or the third
                calls.enter(level)
                found = calls.call().clone()
            worst = max(worst, float((found - eager).abs().max() / eager.abs().max()))
        seconds = time.perf_counter() - start
        return {"way": way, "compile_s": round(seconds, 1), "error": worst} | calls.milliseconds(COMPILED, repeats)
    finally:
        calls.router.remove()
        for module in modules:
            module._compiled_call_impl = None


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model, batch, method and way."""
    head = ["model", "rows", "device", "levels of", "compiled", "MACs"]
    head += ["ms: dense, 1/4, 1/2, 3/4 (compiled: dense, 1/2)", "of dense", "recorded as a graph, ms", "of dense"]
    head += ["seconds to compile"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["model"], str(row["batch"]), row["device"], row["method"], row.get("way", "")]
        cells.append(" ".join(f"{share:.2f}" for share in row.get("macs", [])))
        for name in ("ms", "recorded"):
            ms = row.get(name, [])
            cells += [" ".join(f"{each:.1f}" for each in ms), " ".join(f"{each / ms[0]:.2f}" for each in ms)]
        lines.append(f"| {' | '.join([*cells, str(row.get('compile_s', ''))])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=["width", "depth", "branches", "up_layers"])
    parser.add_argument("--batches", type=int, nargs="+", help="rows a call; 2 8 32 of dit-xl, 2 8 of sdxl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", nargs="*", choices=sorted(WAYS), default=[])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.batches, args.repeats, args.compile = [1], 1, args.compile or ["eager"]
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "call_times.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    name = device_name(args.device)
    facts = {"device": name, "dtype": args.dtype, "threads": torch.get_num_threads(), "repeats": args.repeats}
    facts |= {"versions": config_record(RunConfig())["versions"]}
    torch._dynamo.config.recompile_limit = 64

    def keep(row: dict[str, Any]) -> None:
        rows.append(row | facts)
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        (args.out / "call_times.md").write_text(table_of(rows))
        print(json.dumps(row), flush=True)

    for model in args.models:
        adapter = published(model, args.device, args.dtype, args.smoke)
        banks = banks_of(adapter)
        with torch.no_grad():
            for batch in args.batches or BATCHES[model]:
                for method in args.methods:
                    if method in banks:
                        found = measure(adapter, banks[method], batch, args.repeats)
                        keep({"model": model, "batch": batch, "method": method} | found)
            for way in args.compile:
                for batch in args.batches or BATCHES[model]:
                    found = compiled(adapter, banks["width"], batch, args.repeats, way)
                    keep({"model": model, "batch": batch, "method": "width"} | found)
        del adapter, banks
    print(table_of(rows))


if __name__ == "__main__":
    main()
