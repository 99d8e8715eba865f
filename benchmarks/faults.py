"""What is lost when a run is disturbed? 100 faults, each in a process of its own, and what is there afterwards.

A run on an untrained pipeline is killed at any moment, meets a full disk, finds its files torn, is started twice, gets
scores that are no numbers, has plug-ins that fail and a clock that jumps. Then the same command runs again,
undisturbed. It has to end with the same evaluations and the same schedule as a run that nothing happened to; where a
fault changes what is measured (scores that are no numbers), the run has to end with a schedule that was measured; and
what is torn beyond mending has to be refused.

    python benchmarks/faults.py            # under ten minutes
    python benchmarks/faults.py --smoke    # one fault of each kind
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffes.config import RunConfig
from diffes.errors import DiffesError
from diffes.measure.metrics import METRICS, latent_mse
from diffes.progress import Silent
from diffes.results import folder
from diffes.results.artifact import BANK, SCHEDULE, read_schedule
from diffes.results.folder import config_record
from diffes.results.lock import held
from diffes.results.report import read_report
from diffes.spaces.operators import MUTATIONS
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.study.run import complete_run
from search_strategies.mutations import level_switch

RESULTS = Path(__file__).parent / "results"
REFUSED = 2  # exit status of a run that was refused, or stopped with an error of its own
NUMBERS = {"killed": 36, "disk full": 18, "torn": 18, "two processes": 6, "no number": 8, "plug-in": 10, "clock": 4}
PLAN: dict[str, Any] = {}  # what goes wrong in this process, and when


@METRICS.register("faulty")
def metric(outputs: torch.Tensor, references: torch.Tensor) -> Any:
    """Negative mean squared error, until its turn comes."""
    return _fail("metric", latent_mse(outputs, references))


@MUTATIONS.register("faulty")
def mutation(genome: Any, *, space: SearchSpace, rng: np.random.Generator) -> Any:
    """`level_switch`, until its turn comes."""
    return _fail("mutation", level_switch(genome, space=space, rng=rng))


def _fail(plugin: str, good: Any) -> Any:
    if PLAN.get("plugin") != plugin:
        return good
    PLAN["calls"] -= 1
    if PLAN["calls"] > 0:
        return good
    if PLAN.get("once"):
        PLAN["plugin"] = None
    return PLAN["how"](good)


def _raises(_: Any) -> Any:
    raise RuntimeError("of a plug-in")


def _leaves(_: Any) -> Any:
    sys.exit(0)


def tiny_pipeline(to: Path) -> None:
    """An untrained DiT of two blocks, in diffusers' folder format."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, in_channels=4, out_channels=8, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4,
        sample_size=8,
    )  # fmt: skip
    for name, module in transformer.named_modules():
        if name.endswith(("to_out.0", "ff.net.2", ".norm1.linear")):
            module.weight.data.mul_(16)  # so that it matters what is pruned
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(to)


@dataclass(frozen=True)
class Bed:
    """What faults are tried on.

    Args:
        config: the settings of every run.
        home: where run folders are.
        whole: the folder of a run that nothing happened to.
        seconds: that it took.
    """

    config: RunConfig
    home: Path
    whole: Path
    seconds: float

    def run(self, out: Path, before: Callable[[], object] = lambda: None) -> int:
        """The run in a process of its own: 0 done, `REFUSED`, 1 a traceback, negative a signal."""
        return finished(start(lambda: (before(), complete_run(self.config, out, Silent()))))

    def evaluations(self, out: Path) -> list[tuple[Any, float, int]]:
        """What the journal of a run has, whatever it took."""
        schedule, _ = read_schedule(self.whole)
        space = SearchSpace.mean_sparsity(schedule.stages, schedule.max_level, 0.5, (1,) * 4)
        found = EvaluationStore(out / folder.JOURNAL, space).evaluations()
        return [(e.schedule.levels, e.fitness, e.denoiser_calls) for e in found]

    def lost(self, out: Path) -> str:
        """What differs from the run that nothing happened to; empty where nothing does."""
        if self.evaluations(out) != self.evaluations(self.whole):
            return "other evaluations"
        if read_schedule(out)[0] != read_schedule(self.whole)[0]:
            return "another schedule"
        if read_report(out).run.searched.heldout_mean != read_report(self.whole).run.searched.heldout_mean:
            return "another score"
        return ""


def start(work: Callable[[], object]) -> int:
    """Does something in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        status = 0
    except (DiffesError, OSError):
        status = REFUSED
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(status)


def finished(child: int) -> int:
    """Waits for a process; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """The process dies at a moment of the run, without a chance to clear up."""

    def alarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, share * bed.seconds))

    status = bed.run(out, alarm)
    return "" if status in (0, -signal.SIGALRM) else f"ended with {status}"


def disk_full(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """No file can grow beyond a size: from almost nothing to that of the largest file."""
    largest = max(path.stat().st_size for path in bed.whole.rglob("*") if path.is_file())
    limit = int(100 * (largest / 100) ** share)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status = bed.run(out, full)
    return "" if status in (0, REFUSED) else f"ended with {status}"


def torn(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """A file is cut off somewhere: the journal of an unfinished run, or a file of a finished one."""
    shutil.copytree(bed.whole, out)
    name = (folder.JOURNAL, SCHEDULE, BANK)[int(rng.integers(3))]
    content = (out / name).read_bytes()
    (out / name).write_bytes(content[: max(1, int(share * len(content)))])
    if name != folder.JOURNAL:
        try:
            read_schedule(out)
        except DiffesError:
            shutil.copy2(bed.whole / name, out / name)
            return ""
        return f"{name} is torn, and was taken"
    (out / folder.REPORT).unlink()
    return ""


def two_processes(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """The same command is started again while it runs."""
    first = start(lambda: complete_run(bed.config, out, Silent()))
    time.sleep(max(0.05, share * bed.seconds))
    running = os.waitpid(first, os.WNOHANG)[0] == 0
    second = bed.run(out)
    if not running:
        return ""
    status = finished(first)
    return "" if (status, second) == (0, REFUSED) else f"ended with {status} and {second}"


def no_number(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """A score is NaN or infinite."""
    value = (math.nan, math.inf, -math.inf)[int(rng.integers(3))]
    turn = 2 + int(share * bed.config.max_evals)
    plan = {"plugin": "metric", "calls": turn, "once": True, "how": lambda good: good * 0 + value}
    status = bed.run(out, lambda: PLAN.update(plan))
    if status:
        return f"ended with {status}"
    found = {levels: fitness for levels, fitness, _ in bed.evaluations(out)}
    best = found[read_schedule(out)[0].levels]
    return "" if best == max(found.values()) and math.isfinite(best) else f"the best is {best}"


def plug_in(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """A metric or a mutation raises, leaves, or returns nothing."""
    how = (_raises, _leaves, lambda good: None)[int(rng.integers(3))]
    plan = {"plugin": ("metric", "mutation")[int(rng.integers(2))], "calls": 1 + int(9 * share), "how": how}
    status = bed.run(out, lambda: PLAN.update(plan))
    return "" if status == REFUSED else f"ended with {status}"


def clock(bed: Bed, out: Path, share: float, rng: np.random.Generator) -> str:
    """Whoever asks for the time is told another one each time, years before or after."""
    now = datetime.datetime.now

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now(tz) + datetime.timedelta(days=int(rng.integers(-9999, 9999)))

    def jump() -> None:
        told = time.time
        time.time = lambda: told() + float(rng.uniform(-1e8, 1e8))
        datetime.datetime = Jumping  # type: ignore[misc]

    status = bed.run(out, jump)
    return "" if status == 0 else f"ended with {status}"


KINDS: dict[str, Callable[[Bed, Path, float, np.random.Generator], str]] = {
    "killed": killed, "disk full": disk_full, "torn": torn, "two processes": two_processes, "no number": no_number,
    "plug-in": plug_in, "clock": clock,
}  # fmt: skip


def outcome(bed: Bed, kind: str, out: Path, share: float, rng: np.random.Generator) -> str:
    """One fault, then the same command again; empty where all is as it has to be."""
    wrong = KINDS[kind](bed, out, share, rng)
    if wrong or kind == "no number":
        return wrong
    if not (out / folder.REPORT).exists() and (status := bed.run(out)):
        return f"the same command again ended with {status}"
    with held(out):  # nobody holds it any more
        left = [path.name for path in out.iterdir() if path.name.startswith(".partial")]
    return f"left {left}" if left else bed.lost(out)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown: faults by kind, and what was not as it has to be."""
    lines = ["| fault | how often | as it has to be | else |", "|---|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        wrong = [row["wrong"] for row in rows if row["kind"] == kind]
        bad = "; ".join(f"{text} ({n})" for text, n in Counter(filter(None, wrong)).items())
        lines.append(f"| {kind} | {len(wrong)} | {wrong.count('')} | {bad} |")
    lines.append(f"| all | {len(rows)} | {sum(not row['wrong'] for row in rows)} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="which faults")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="one of each kind, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # threads do not come along into the processes
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        tiny_pipeline(home / "tiny")
        config = RunConfig(
            genes="levels",
            model=str(home / "tiny"), method="magnitude", allocation="equal", stages=4, steps=4, guidance=1.0,
            metric="faulty", mutation="faulty", strategy="evolution:mu=2,lam=4,initial=4", max_evals=16, probes=2,
            heldout=2, device="cpu",
        )  # fmt: skip
        assert Stages.equal(4).count_steps([750, 500, 250, 0]) == (1,) * 4  # one step a stage, as `Bed` counts them
        bed = Bed(config, home, home / "whole", 0.0)
        assert bed.run(home / "warm") == 0
        begun = time.perf_counter()
        assert bed.run(bed.whole) == 0
        bed = Bed(config, home, bed.whole, time.perf_counter() - begun)
        rows: list[dict[str, Any]] = []
        for kind in args.kinds:
            n = 1 if args.smoke else NUMBERS[kind]
            for i in range(n):
                share, out = (i + 0.5) / n, home / f"{kind}{i}".replace(" ", "-")
                try:
                    wrong = outcome(bed, kind, out, share, np.random.default_rng(i))
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}".replace(str(home), "")[:200]
                rows.append({"kind": kind, "at": share, "wrong": wrong})
                print(f"{kind} at {share:.2f}: {wrong or 'as it has to be'}", flush=True)
                shutil.rmtree(out, ignore_errors=True)
    data = {"faults": rows, "seconds_of_a_run": bed.seconds, "versions": config_record(RunConfig())["versions"]}
    (args.out / "faults.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / "faults.md").write_text(table_of(rows))
    print(table_of(rows))


if __name__ == "__main__":
    main()
