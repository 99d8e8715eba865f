"""Time of denoiser calls by torch threads: one against all cores, on a free and on a busy machine.

python benchmarks/threads.py            # ten minutes or more
python benchmarks/threads.py --smoke    # one call of each small model
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from published_models import adapter_of, dit

from diffes.adapters.base import ModelAdapter
from diffes.adapters.loading import adapter_for, load_pipeline
from diffes.adapters.macs import macs_per_call
from diffes.config import RunConfig
from diffes.results.folder import config_record
from diffes.runtime.threads import usable_cores

RESULTS = Path(__file__).parent / "results"
SHIPPED = ("fashion-dit", "emoji-sdxl")
LARGER = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6}  # half of DiT-S/2, random weights
CALLS = 5  # of a block
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass"  # ends with its parent


@contextlib.contextmanager
def other_work(processes: int) -> Iterator[None]:
    """Keep as many cores busy as there are processes."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def in_turns(run: Callable[[], object], threads: list[int], repeats: int, calls: int) -> list[list[float]]:
    """Milliseconds of a call for each number of threads, `repeats` blocks each; the first call of a block warms up."""
    found: list[list[float]] = [[] for _ in threads]
    for _ in range(repeats):
        for number, taken in zip(threads, found, strict=True):
            torch.set_num_threads(number)
            run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            taken.append(1000 * (time.perf_counter() - start) / calls)
    return found


def call_of(adapter: ModelAdapter, batch: int) -> Callable[[], object]:
    """A denoiser call on a batch."""
    probes = adapter.make_probes(batch, 0)
    return partial(adapter.denoise_once, adapter.noise(probes), torch.full((batch,), 500), probes.conditions)


def jobs(smoke: bool) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Yield each timed call: its name, its millions of multiply-accumulates, and a function that makes it."""
    for model in SHIPPED if smoke else (*SHIPPED, "half of DiT-S/2"):
        adapter = adapter_for(load_pipeline(model)) if model in SHIPPED else adapter_of(dit(**LARGER))
        macs = macs_per_call(adapter) / 1e6
        for batch in (1, 16):
            yield f"{model}, {batch} rows a call", macs * batch, call_of(adapter, batch)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | million MACs | other processes | ms, 1 thread: least, median | ms, all cores: least, median "
        "| 1 thread over all cores: least, median |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, many = row["ms"]
        ratios = f"{min(one) / min(many):.2f}, {statistics.median(one) / statistics.median(many):.2f}"
        cells = [f"{min(each):.4g}, {statistics.median(each):.4g}" for each in (one, many)]
        lines.append(f"| {row['what']} | {row['macs']:,.0f} | {row['others']} | {cells[0]} | {cells[1]} | {ratios} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="blocks of calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="one of each, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.out = 1, Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    cores, rows = usable_cores(), list[dict[str, Any]]()
    facts = {"cores": cores, "versions": config_record(RunConfig())["versions"]}
    with torch.no_grad():
        for what, macs, run in jobs(args.smoke):
            for others in (0, cores):
                with other_work(others):
                    found = in_turns(run, [1, max(cores, 2)], args.repeats, 1 if args.smoke else CALLS)
                rows.append({"what": what, "macs": macs, "others": others, "ms": found})
                (args.out / "threads.json").write_text(json.dumps(facts | {"rows": rows}) + "\n")
                (args.out / "threads.md").write_text(table_of(rows))
                print(table_of(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
