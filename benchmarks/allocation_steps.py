"""What does each step of sharing levels out by damage add, and what does it take?

One pruning, uniform schedules at a quarter, a half and three quarters of H, the ways of splitting a level over the
group sets side by side: latent MSE to the dense model on held-out probes, MACs counted, beside the denoiser calls (in
rows; a backward pass counts as two) and processor seconds that the splits of all stages took. Pruning is the same for
all that have the same rungs and is not counted. Each split is also judged by the mean squared change of one guided
prediction on noise and timesteps that none was made from: what it was meant to make small. Finished lines of
`steps.jsonl` are not run again.

    python benchmarks/allocation_steps.py            # half an hour on one CPU core
    python benchmarks/allocation_steps.py --model emoji-sdxl --only equal "gradients, 4 directions" "gradients, 2 rungs"
    python benchmarks/allocation_steps.py --smoke    # tiny, some of them, into runs/smoke
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from diffes.adapters import Condition, GroupSet, ModelAdapter, adapter_for, load_pipeline
from diffes.adapters.macs import macs_by_module, macs_per_group
from diffes.config import HELDOUT_SEED, RunConfig
from diffes.measure.currencies import macs_fraction
from diffes.pruning import METHODS, sensitivity
from diffes.pruning.allocation import Floats, Rungs, allocate
from diffes.pruning.bank import StageWeights, WeightBank
from diffes.pruning.base import GroupWeights
from diffes.pruning.build import at_split, pruned_weights, stage_seed
from diffes.pruning.calibrate import calibration_of
from diffes.pruning.calibration import CalibrationSet, StagePass
from diffes.pruning.factors import Workshop
from diffes.results.folder import config_record
from diffes.runtime.apply import pick_device
from diffes.runtime.router import Router
from diffes.spaces.loop import run_search
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Proposal
from search_strategies.evolution import Evolution

RESULTS = Path(__file__).parent / "results" / "allocation_steps"
EVALUATIONS = 60
FRESH, SINGLE, EVOLVED = 1 << 41, 1 << 42, 1 << 43  # added to the seed: samples of their own
Splits = Mapping[int, Sequence[int]]  # the rung of every set, by level
Predict = Callable[[StageWeights], Tensor]  # with some sets thin


@dataclass(frozen=True)
class Stage:
    """One pruned stage.

    Args:
        adapter: the dense model.
        timesteps: [lo, hi).
        data: clean latents.
        guidance: of the sampling to come, above 1.
        seed: of everything drawn here.
        sets: what each group set can be reduced to.
        thin: what is left of each at each rung.
        levels: those that are asked for.
        samples: noised latents that damage is measured on.
        evaluations: of an evolution at each level.
    """

    adapter: ModelAdapter
    timesteps: tuple[int, int]
    data: CalibrationSet
    guidance: float
    seed: int
    sets: Sequence[Rungs[GroupSet]]
    thin: Mapping[str, Sequence[GroupWeights]]
    levels: Sequence[int]
    samples: int
    evaluations: int

    def predictor(self, n: int, stream: int, *, guided: bool = True) -> tuple[Predict, int]:
        """What predicts n noised samples, and its rows: both branches of each, or one, every second without condition.

        A thin set is its consumer reading the inputs that it keeps, by its thin weights: what goes into the others does
        not matter then.
        """
        adapter, generator = self.adapter, torch.Generator().manual_seed(self.seed + stream)
        chosen = torch.randperm(len(self.data), generator=generator)[:n]
        timesteps = torch.randint(*self.timesteps, (len(chosen),), generator=generator)
        clean = self.data.latents[chosen].to(adapter.device, adapter.dtype)
        noisy = adapter.add_noise(clean, torch.randn(clean.shape, generator=generator), timesteps)
        conditions: list[Condition] = [self.data.conditions[i] for i in chosen.tolist()]
        if guided:
            noisy, timesteps = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
            conditions += [None] * len(chosen)
        else:
            conditions[::2] = [None] * len(conditions[::2])

        @torch.no_grad()
        def predict(thin: StageWeights) -> Tensor:
            with ExitStack() as hooks:
                for groups in adapter.group_sets():
                    if groups.name in thin:
                        consumer = adapter.denoiser.get_submodule(groups.consumers[0])
                        hooks.callback(consumer.register_forward_hook(_reading(groups, thin[groups.name])).remove)
                predicted = adapter.denoise_once(noisy, timesteps, conditions)[:, : noisy.shape[1]].float()
            if not guided:
                return predicted
            conditional, unconditional = predicted.chunk(2)
            return self.guidance * conditional + (1 - self.guidance) * unconditional

        return predict, len(noisy)

    def allocate(self, harms: Sequence[Floats]) -> Splits:
        """The library's programme."""
        splits = allocate(self.sets, harms)
        return {k: splits[k] for k in self.levels}

    def change(self, splits: Splits) -> list[float]:
        """Mean squared change of a guided prediction on fresh noise and timesteps, by level."""
        predict, _ = self.predictor(self.samples, FRESH)
        dense = predict({})
        return [float((predict(at_split(self.thin, splits[k])) - dense).square().mean()) for k in self.levels]


def _reading(groups: GroupSet, left: GroupWeights) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(consumer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        features = groups.features(left.kept.to(consumer.weight.device, torch.long))
        weight = consumer.weight[:, features] if not left.consumers else left.consumers[0].to(consumer.weight)
        return F.linear(inputs[0][..., features], weight, consumer.bias)

    return hook


def equal(stage: Stage) -> tuple[Splits, int]:
    """The same fraction of every set."""
    return {k: [rungs.equal(k) for rungs in stage.sets] for k in stage.levels}, 0


def by_gradients(stage: Stage, directions: int = sensitivity.DIRECTIONS) -> tuple[Splits, int]:
    """The library's way."""
    with patch.multiple(sensitivity, DIRECTIONS=directions, SAMPLES=stage.samples):
        estimate = sensitivity.StageSensitivity(stage.adapter, stage.timesteps, stage.data, stage.guidance, stage.seed)
        return stage.allocate(estimate.measure(stage.sets, stage.thin)), estimate.calls


def by_calls(stage: Stage, *, guided: bool = True, pairs: bool = False) -> tuple[Splits, int]:
    """One set at one rung at a time; with `pairs`, what sets do together counts as well."""
    predict, rows = stage.predictor(stage.samples * (1 if guided else 2), SINGLE, guided=guided)
    dense, changes = predict({}), []
    for rungs in stage.sets:
        name = rungs.groups.name
        thin = [(predict({name: left}) - dense).flatten() for left in stage.thin[name][1:]]
        changes.append(torch.stack([torch.zeros_like(dense).flatten(), *thin]).double().cpu())
    splits = stage.allocate([each.square().mean(1).numpy() for each in changes])
    if pairs:
        splits = {k: refined(stage.sets, changes, k, split) for k, split in splits.items()}
    return splits, rows * (1 + sum(len(each) - 1 for each in changes))


def refined(sets: Sequence[Rungs[GroupSet]], changes: Sequence[Tensor], level: int, split: Sequence[int]) -> list[int]:
    """Local search for the least `|sum of changes|^2` that costs no more than the equal split.

    A move takes two sets to any other rungs (or one, where the other's rung is the one that it has).

    Args:
        sets: what each can be reduced to.
        changes: for each set, (rungs, elements) change of the prediction when only that set is thin.
        level: of the equal split.
        split: (sets,) rungs to start from.
    """
    counts = torch.tensor([len(each) for each in changes])
    owner, first = torch.arange(len(sets)).repeat_interleave(counts), counts.cumsum(0) - counts
    vectors, saved = torch.cat(list(changes)), torch.cat([torch.as_tensor(rungs.saved) for rungs in sets])
    wanted = sum(float(rungs.saved[rungs.equal(level)]) for rungs in sets)
    products, current = vectors @ vectors.T, first + torch.tensor(split)
    while True:
        now = current[owner]  # what each rung would replace
        step = products - products[now] - products[:, now] + products[now][:, now]
        alone = 2 * (products[:, current] - products[now][:, current]).sum(1) + step.diagonal()
        gain = alone[:, None] + alone + 2 * step
        more = saved - saved[now]
        enough = saved[current].sum() + more[:, None] + more >= wanted * (1 - 1e-9)
        gain[~enough | (owner[:, None] == owner)] = torch.inf
        best = int(gain.argmin())
        if not gain.flatten()[best] < -1e-9 * products.diagonal().max():
            return (current - first).tolist()
        for rung in divmod(best, len(owner)):
            current[owner[rung]] = rung


class FromSplit(Evolution):
    """The library's evolution, from one genome on instead of a first population."""

    def __init__(self, space: SearchSpace, start: Sequence[int], *, seed: int) -> None:
        super().__init__(space, seed=seed, mu=2, lam=8, mutation="level_switch")
        self._start = space.repair(start, self._rng)

    def _ask(self) -> list[Proposal]:
        if self._survivors:
            return super()._ask()
        self._seen.add(tuple(self._start))
        return [self.propose(self._start)]


def evolved(stage: Stage) -> tuple[Splits, int]:
    """Evolution over the split from that by gradients on, sets in the place of stages, on half as many samples."""
    splits, calls = by_gradients(stage)
    predict, rows = stage.predictor(max(stage.samples // 2, 1), EVOLVED)
    dense, n_sets, max_level = predict({}), len(stage.sets), stage.sets[0].max_level
    rung_of = [[rungs.equal(k) for k in range(max_level + 1)] for rungs in stage.sets]
    costs = tuple(
        tuple(round(rungs.macs * rungs.kept[rung]) for rung in of)
        for rungs, of in zip(stage.sets, rung_of, strict=True)
    )

    def split_of(levels: Sequence[int]) -> list[int]:
        return [of[level] for of, level in zip(rung_of, levels, strict=True)]

    def evaluate(schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        for schedule in schedules:
            change = predict(at_split(stage.thin, split_of(schedule.levels))) - dense
            yield Evaluation(schedule, -float(change.square().mean()), rows)

    found: dict[int, Sequence[int]] = {}
    for level, split in splits.items():
        budget = sum(each[level] for each in costs)
        space = SearchSpace(Stages.equal(n_sets), max_level, (1,) * n_sets, costs, budget)
        start = [of.index(rung) for of, rung in zip(rung_of, split, strict=True)]
        result = run_search(FromSplit(space, start, seed=stage.seed), evaluate, max_evals=stage.evaluations)
        found[level] = split_of(result.best.schedule.levels)
        calls += result.denoiser_calls
    return found, calls + rows


BASE = "gradients, 4 directions"  # what the others are compared with, probe by probe
VARIANTS: dict[str, tuple[int, Callable[[Stage], tuple[Splits, int]]]] = {  # rungs a level, how to split
    "equal": (1, equal),
    "gradients, 1 direction": (1, partial(by_gradients, directions=1)),
    BASE: (1, by_gradients),
    "calls, one branch": (1, partial(by_calls, guided=False)),
    "calls, guided": (1, by_calls),
    "calls, guided, pairs": (1, partial(by_calls, pairs=True)),
    "gradients, evolved": (1, evolved),
    "gradients, 2 rungs": (2, by_gradients),
    "gradients, 4 rungs": (4, by_gradients),
}


class Bench:
    """One model, pruned once for each number of rungs that follow each other, and its dense latents of the probes."""

    def __init__(self, config: RunConfig, samples: int, evaluations: int) -> None:
        self.config, self.samples, self.evaluations = config, samples, evaluations
        pipe = load_pipeline(config.model, device=pick_device(config.device), dtype=getattr(torch, config.dtype))
        self.adapter = adapter_for(pipe)
        self.stages = Stages.equal(config.stages, self.adapter.n_timesteps)
        self.data = calibration_of(config, self.adapter)
        self.max_level = self.adapter.max_level("width")
        self.levels = [self.max_level * quarters // 4 for quarters in (1, 2, 3)]
        self.probes = self.adapter.make_probes(config.heldout, HELDOUT_SEED, "heldout")
        self.dense = self.adapter.sample(self.probes, config.steps, config.scale)
        self._pruned: tuple[int, list[Stage]] = 0, []

    def pruned(self, finer: int) -> list[Stage]:
        """All stages, with so many rungs a level."""
        if self._pruned[0] != finer:
            macs = macs_per_group(self.adapter, macs_by_module(self.adapter))
            sets = [Rungs.of(each, self.max_level, macs[each.name], finer) for each in self.adapter.group_sets()]
            self._pruned = finer, [self._prune(sets, stage) for stage in range(len(self.stages))]
        return self._pruned[1]

    def _prune(self, sets: Sequence[Rungs[GroupSet]], stage: int) -> Stage:
        method, timesteps, guidance = METHODS.make(self.config.method), self.stages.ranges[stage], self.config.scale
        seed = stage_seed(self.config.seed, stage)
        run = StagePass(self.adapter, timesteps, self.data, guidance > 1, seed, method.timestep_weights)
        thin = pruned_weights(self.adapter, method, None if method.needs == "nothing" else run, sets, Workshop())
        return Stage(
            self.adapter, timesteps, self.data, guidance, seed, sets, thin, self.levels, self.samples, self.evaluations
        )

    def measure(self, variant: str) -> dict[str, Any]:
        """One line of the results."""
        finer, share = VARIANTS[variant]
        pruned, start = self.pruned(finer), time.process_time()
        splits, calls = zip(*(share(stage) for stage in pruned), strict=True)
        seconds = time.process_time() - start
        places = [(s, k) for s in range(len(pruned)) for k in self.levels]
        bank = WeightBank({(s, k): at_split(pruned[s].thin, splits[s][k]) for s, k in places}, "width")
        changes = [stage.change(split) for stage, split in zip(pruned, splits, strict=True)]
        steps = self.stages.count_steps(self.adapter.timesteps(self.config.steps))
        macs, errors, router = [], [], Router(self.adapter, bank)
        for level in self.levels:
            schedule = Schedule(self.stages, (level,) * len(pruned), self.max_level)
            macs.append(round(macs_fraction(router, schedule, steps), 5))
            with router.routed(schedule):
                latents = self.adapter.sample(self.probes, self.config.steps, self.config.scale)
            errors.append([float(f"{e:.4g}") for e in (latents - self.dense).square().flatten(1).mean(1).tolist()])
        return {
            "variant": variant, "calls": sum(calls), "seconds": round(seconds, 1), "samples": self.samples,
            "evaluations": self.evaluations, "levels": self.levels, "macs": macs, "mse": errors,
            "change": [statistics.mean(column) for column in zip(*changes, strict=True)],
            "splits": [{str(k): list(split[k]) for k in self.levels} for split in splits],
        }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of one model: at each level MACs, MSE (on how many probes it is below that of `BASE`), and change."""
    by_name = {row["variant"]: row for row in rows}
    settings, base = rows[0]["settings"], by_name.get(BASE)
    head = ["split", "calls", "seconds", *(f"level {k}: MACs, MSE, change" for k in rows[0]["levels"])]
    lines = [f"**{settings['model']}**, {settings['method']}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in (by_name[name] for name in VARIANTS if name in by_name):
        cells = [row["variant"], f"{row['calls']:,}", f"{row['seconds']:.0f}"]
        for i, errors in enumerate(row["mse"]):
            below = ""
            if base is not None and row is not base:
                below = f" ({sum(e < b for e, b in zip(errors, base['mse'][i], strict=True))} of {len(errors)})"
            cells.append(f"{row['macs'][i]:.4f}, {statistics.mean(errors):.3g}{below}, {row['change'][i]:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--method", default="obs")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="SPLIT")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny, into runs/smoke")
    args = parser.parse_args()
    config = RunConfig(
        genes="levels", model=args.model, method=args.method, seed=args.seed, metric="latent_mse", device=args.device
    )
    samples, evaluations = sensitivity.SAMPLES, EVALUATIONS
    if args.smoke:
        config = replace(config, stages=1, steps=2, heldout=2, calibration_samples=4)
        samples, evaluations = 2, 4
        args.only = ["equal", BASE, "calls, guided, pairs", "gradients, evolved"]
        args.out = Path("runs/smoke") if args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    record, bench = config_record(config), None
    del record["settings"]["allocation"]  # the split says it
    for variant in VARIANTS:
        done = any(row["variant"] == variant and row["settings"] == record["settings"] for row in rows)
        if done or variant not in args.only:
            continue
        bench = bench or Bench(config, samples, evaluations)
        rows.append(bench.measure(variant) | record)
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    runs = {json.dumps(row["settings"]): row["settings"] for row in rows}
    text = "\n".join(table([row for row in rows if row["settings"] == settings]) for settings in runs.values())
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
