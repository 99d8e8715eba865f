"""Time of evaluations by the pipeline's own call, against the version whose adapters repeated each pipeline's loop.

Both versions take turns. The last commit with such loops is b8cc44b:

    git worktree add /tmp/before b8cc44b
    (cd /tmp/before && python -c "from setuptools import setup; setup()" -q egg_info)    # its own entry points
    python benchmarks/pipeline_loop.py --before /tmp/before        # some minutes on one core
    python benchmarks/pipeline_loop.py --smoke                     # this version against itself, once

The evaluations of both are compared, too: they have to be the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CASES = (("fashion-dit", 2.0, 16), ("emoji-sdxl", 1.0, 16), ("emoji-sdxl", 3.0, 16), ("fashion-dit", 2.0, 48))
PLANS, CALLS = 6, 6  # of an evaluation; no two plans begin alike


def serve() -> None:
    """Answer each line of the input, a case, with the seconds of its evaluations and their fitness."""
    import torch

    from diffes.adapters import adapter_for, load_pipeline
    from diffes.measure.metrics import make_metric
    from diffes.measure.plan_evaluator import PlanEvaluator
    from diffes.pruning.bank import WeightBank
    from diffes.runtime.router import Router
    from diffes.spaces.schedule import Plan, Stages

    torch.set_num_threads(1)
    stages, known = Stages.equal(10), dict[str, Any]()
    for line in sys.stdin:
        model, guidance, n = json.loads(line)
        if line not in known:
            adapter = adapter_for(load_pipeline(model))
            adapter.pipe.set_progress_bar_config(disable=True)
            router = Router(adapter, WeightBank({}, "width", max_level=8))
            known[line] = PlanEvaluator(
                router, stages, "fitted", adapter.make_probes(n, 0), guidance=guidance,
                metric=make_metric("latent_mse", adapter.device), reference_steps=20, cache_bytes=0,
            )  # fmt: skip
        draw = random.Random(0)
        calls = [sorted(draw.sample(range(1000), CALLS), reverse=True) for _ in range(PLANS)]
        start = time.perf_counter()
        plans = [Plan(stages, tuple((t, 0) for t in timesteps), 8, "fitted") for timesteps in calls]
        fitness = [known[line].measured(plan)[0] for plan in plans]
        print(json.dumps([time.perf_counter() - start, fitness]), flush=True)


def served(folder: Path) -> subprocess.Popen[str]:
    """A process that serves with the diffes of a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def asked(process: subprocess.Popen[str], case: tuple[str, float, int]) -> list[Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.flush()
    found: list[Any] = json.loads(process.stdout.readline())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, default=HERE, help="a checkout of the version before")
    parser.add_argument("--repeats", type=int, default=9, help="of each case, in turns")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="one case, once, into runs/smoke")
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    cases = CASES[:1] if args.smoke else CASES
    if args.smoke:
        args.repeats, args.out = 1, Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    processes = [served(args.before.resolve()), served(HERE)]
    rows = []
    for case in cases:
        times: list[list[float]] = [[], []]
        answers: list[Any] = [asked(process, case)[1] for process in processes]  # they load the model
        for _ in range(args.repeats):
            for i, process in enumerate(processes):
                times[i].append(asked(process, case)[0])
        rows.append({"case": case, "seconds": times, "same": answers[0] == answers[1]})
    for process in processes:
        process.kill()
    lines = ["| model, guidance, probes | s before: median | s now: median | now over before: median, least | same |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        (model, guidance, n), (before, now) = row["case"], row["seconds"]
        medians = [statistics.median(each) for each in (before, now)]
        ratios = f"{medians[1] / medians[0]:.3f}, {min(now) / min(before):.3f}"
        lines.append(f"| {model}, {guidance:g}, {n} | {medians[0]:.3f} | {medians[1]:.3f} | {ratios} | {row['same']} |")
    (args.out / "pipeline_loop.json").write_text(json.dumps({"plans": PLANS, "calls": CALLS, "rows": rows}) + "\n")
    (args.out / "pipeline_loop.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
