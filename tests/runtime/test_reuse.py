"""Reuse against a hand-written loop, and everything by which a run could take another run's outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_STAGES, Counting, images, plan_config, small_bank, small_config
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from masking import assert_dense, state
from torch import Tensor

import diffes
from diffes.adapters import ModelAdapter, Probes, ReuseSet, load_pipeline, shipped_models
from diffes.adapters.macs import macs_per_call
from diffes.errors import DiffesError
from diffes.figures.tables import verdicts
from diffes.measure.currencies import Calls, clock_of, macs_by_level, ms_by_level
from diffes.problems.workbench import prepare
from diffes.pruning import make_method
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.runtime.memory import Memory
from diffes.runtime.router import Router
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Plan, Schedule, Stages
from diffes.study.export import export
from diffes.study.front import complete_front

METHODS = ["block_reuse", "deep_reuse", "magnitude+block_reuse", "magnitude+deep_reuse"]
TRAINED = {"emoji-sdxl": "magnitude+deep_reuse", "fashion-dit": "magnitude+block_reuse"}
TIMESTEPS = (999, 860, 700, 510, 340, 120)
GUIDANCE = 2.0


@pytest.fixture(params=METHODS)
def bank(request: pytest.FixtureRequest, model: str, adapter: ModelAdapter, stages: Stages) -> WeightBank:
    if model in shipped_models() and request.param != TRAINED[model]:
        pytest.skip("of the trained models a sum is enough: it has all that its parts have")
    return small_bank(adapter, request.param, stages)


def plan(bank: WeightBank, *levels: int, timesteps: tuple[int, ...] = TIMESTEPS) -> Plan:
    return Plan(Stages.equal(N_STAGES), tuple(zip(timesteps, levels, strict=True)), bank.max_level, "dpmsolver++")


def run(adapter: ModelAdapter, probes: Probes, timesteps: tuple[int, ...] = TIMESTEPS) -> Tensor:
    scheduler = PlanScheduler.of(adapter.pipe.scheduler, timesteps, "dpmsolver++", adapter.device)
    return adapter.sample(probes, scheduler, GUIDANCE)


@torch.no_grad()
def by_hand(adapter: ModelAdapter, bank: WeightBank, called: Plan, probes: Probes) -> Tensor:
    """Every layer is computed in every call, and outputs that a level reuses are replaced by those kept before."""
    router = Router(adapter, bank)
    kept: dict[str, Any] = {}
    scheduler = PlanScheduler.of(adapter.pipe.scheduler, called.timesteps, "dpmsolver++", adapter.device)
    state = adapter.start(probes, scheduler, GUIDANCE)
    for i, key in enumerate(called.keys()):
        entry = bank[key] if key[1] else {}
        with ExitStack() as stack:
            for prunable in adapter.prunable("reuse"):
                assert isinstance(prunable, ReuseSet)
                recalled = prunable.recalled(entry[prunable.name].kept.tolist()) if prunable.name in entry else []
                inside = prunable.idle(entry[prunable.name].kept.tolist()) if prunable.name in entry else []
                for path in prunable.sources:
                    hook = replacing({} if path in inside else kept, path, path in recalled)
                    stack.callback(adapter.denoiser.get_submodule(path).register_forward_hook(hook).remove)
            thin = entry if not any(p.name in entry for p in adapter.prunable("reuse")) else {}
            if thin:
                levels = [key[1] if each == i else 0 for each in range(len(called.calls))]
                only = plan(bank, *levels, timesteps=called.timesteps)
                stack.enter_context(router.routed(only))
            state = adapter.step(state, probes, GUIDANCE)
    return adapter.finish(state)


def replacing(kept: dict[str, Any], path: str, recalled: bool) -> Callable[..., Any]:
    """A hook that notes an output, or puts the one that was noted last in its place."""

    def hook(_module: object, _inputs: object, output: Any) -> Any:
        if recalled:
            return kept[path]
        kept[path] = output
        return output

    return hook


def sequences(bank: WeightBank) -> Iterator[tuple[int, ...]]:
    """Levels of plans: each reusing one after a dense call and after itself, and all kinds of levels mixed."""
    thin = [level for level in range(1, bank.max_level + 1) if level not in bank.reusing]
    for level in bank.reusing:
        yield (0, level, level, 0, level, 0)
    low, high = bank.reusing[0], bank.reusing[-1]
    yield (0, high, low, high, 0, low)
    if thin:
        yield (thin[0], low, thin[-1], high, 0, high)


@pytest.mark.slow
def test_a_plan_that_reuses_is_the_hand_written_loop(adapter: ModelAdapter, bank: WeightBank) -> None:
    before, probes = state(adapter), adapter.make_probes(2, 0)
    dense = run(adapter, probes)
    router = Router(adapter, bank)
    for levels in sequences(bank):
        called = plan(bank, *levels)
        expected = by_hand(adapter, bank, called, probes)
        with router.routed(called):
            found = run(adapter, probes)
            assert router.memory is None, "what was kept for reuse outlived the run"
            assert torch.equal(run(adapter, probes), found), "a second run took something from the first"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, dense)
    assert_dense(adapter, before)
    assert torch.equal(run(adapter, probes), dense)


def test_levels_of_reuse_are_nested_and_cost_less_and_less(untrained: ModelAdapter, stages: Stages) -> None:
    for method in ("block_reuse", "deep_reuse"):
        if method == "deep_reuse" and untrained.up_layers() is None:
            continue
        bank = small_bank(untrained, method, stages)
        (name,) = {name for entry in bank.values() for name in entry}
        top = bank.max_level
        assert bank.reusing == tuple(range(1, top + 1)) and bank.kind == "reuse"
        for stage in range(N_STAGES):
            kept = [set(bank[stage, level][name].kept.tolist()) for level in range(1, top + 1)]
            assert all(fewer < more for more, fewer in itertools.pairwise(kept))
        costs = macs_by_level(Router(untrained, bank), stages, range(N_STAGES), top)
        assert all(a > b for row in costs for a, b in itertools.pairwise(row))


def test_blocks_that_change_least_are_reused_first(adapter: ModelAdapter, stages: Stages) -> None:
    """Half of the branches reused by the ranking, against the other half: measured on a routed run."""
    bank = small_bank(adapter, "block_reuse", stages)
    top, probes = bank.max_level, adapter.make_probes(4, 1)
    dense, groups = run(adapter, probes), adapter.branches()
    router, errors = Router(adapter, bank), []
    level = next(k for k in range(top, 0, -1) if 2 * len(bank[0, k]["branches"].kept) >= groups.n_groups)
    worst = {
        key: {"branches": type(entry["branches"])(torch.tensor(sorted({*range(groups.n_groups)} - {*first}))[:n].int())}
        for key, entry in bank.items()
        for first in [entry["branches"].kept.tolist()]
        for n in [len(first)]
        if key[1] == level
    }
    for each in (bank, WeightBank(worst, "reuse", max_level=top)):
        router = Router(adapter, each)
        with router.routed(plan(bank, 0, level, 0, level, 0, level)):
            errors.append(float((run(adapter, probes) - dense).square().mean()))
    assert errors[0] < errors[1] or "tiny" in adapter.pipe.config._name_or_path  # untrained layers are all alike


@pytest.mark.slow
def test_costs_add_up_to_what_a_routed_run_counts(adapter: ModelAdapter, bank: WeightBank) -> None:
    stages, router = Stages.equal(N_STAGES), Router(adapter, bank)
    table = macs_by_level(router, stages, range(N_STAGES), bank.max_level)
    every = list(sequences(bank))
    for levels in every if "tiny" in adapter.pipe.config._name_or_path else every[-1:]:
        called = plan(bank, *levels)
        clock, counted = clock_of(adapter, called), 0
        with router.routed(called), adapter.counted_by(clock):
            for clock.index, timestep in enumerate(called.timesteps):
                counted += macs_per_call(adapter, timestep)
        expected = sum(table[stages.stage_of(t)][level] for t, level in called.calls)
        assert counted == pytest.approx(expected, rel=1e-9)


def test_the_first_call_computes_everything(adapter: ModelAdapter, bank: WeightBank) -> None:
    probes, level = adapter.make_probes(1, 0), bank.reusing[-1]
    router = Router(adapter, bank)
    with router.routed(plan(bank, level, 0, 0, 0, 0, 0)):
        assert torch.equal(run(adapter, probes), run(adapter, probes))
        found = run(adapter, probes)
    assert torch.equal(found, run(adapter, probes))


def test_no_more_is_kept_than_is_reused(tiny_sdxl: ModelAdapter, stages: Stages) -> None:
    """Of a plan what its own levels take again, of an evaluation what any level of the bank does."""
    bank, probes = small_bank(tiny_sdxl, "deep_reuse", stages), tiny_sdxl.make_probes(1, 0)
    router, layers = Router(tiny_sdxl, bank), tiny_sdxl.up_layers()
    assert layers is not None
    sources = layers.sources
    called = plan(bank, 0, 0, 2, 0, 0, 0)
    for keep, expected in ((False, {sources[2]}), (True, set(sources[1:]))):
        clock = clock_of(tiny_sdxl, called)
        with torch.no_grad(), router.routed(called, keep=keep), tiny_sdxl.counted_by(clock):
            tiny_sdxl.denoise_once(tiny_sdxl.noise(probes), torch.tensor([TIMESTEPS[0]]), probes.conditions)
            assert router.memory is not None and set(router.memory.outputs) == expected


class Broken(Exception):
    pass


def broken_off(adapter: ModelAdapter, probes: Probes, after: int) -> None:
    """A run that ends with an error after some calls, inside the denoiser."""
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Broken

    handle = adapter.denoiser.get_submodule(adapter.blocks()[0]).register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        run(adapter, probes)
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["block_reuse", "deep_reuse"])
def test_no_run_takes_from_another(untrained: ModelAdapter, stages: Stages, method: str) -> None:
    """After runs that broke off, on other probes, of other batch sizes, and between two that take turns."""
    bank = small_bank(untrained, method, stages)
    router, level = Router(untrained, bank), bank.reusing[0]
    one, other = untrained.make_probes(2, 0), untrained.make_probes(2, 1)
    with router.routed(plan(bank, 0, level, 0, level, level, 0)):
        expected = [run(untrained, probes) for probes in (one, other, one[:1])]
        for after in range(5):
            broken_off(untrained, other, after)
            assert torch.equal(run(untrained, one), expected[0]), f"a run that broke off after {after} calls"
            broken_off(untrained, one, after)
            assert torch.equal(run(untrained, one), expected[0]), f"a run that broke off after {after} calls"
        assert torch.equal(run(untrained, one[:1]), expected[2])
        assert torch.equal(run(untrained, other), expected[1])
        turns = [
            untrained.start(probes, PlanScheduler.of(untrained.pipe.scheduler, TIMESTEPS, "dpmsolver++"), GUIDANCE)
            for probes in (one, other)
        ]
        with torch.no_grad():
            for _ in TIMESTEPS:
                turns = [untrained.step(s, p, GUIDANCE) for s, p in zip(turns, (one, other), strict=True)]
    both = [untrained.finish(each) for each in turns]
    assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=False)), "runs of other prompts that take turns"


@pytest.mark.parametrize("method", ["block_reuse", "deep_reuse"])
@pytest.mark.parametrize(
    "kind", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
def test_schedules_reuse_with_any_scheduler(
    untrained: ModelAdapter, stages: Stages, method: str, kind: type[Any]
) -> None:
    """The pipeline's own loop equals the library's, dense stages are dense, and the next run is the same again."""
    bank = small_bank(untrained, method, stages)
    pipe: Any = untrained.pipe
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    top, before = bank.max_level, images(pipe)
    router = Router(untrained, bank)
    with router.routed(Schedule(stages, (0, 0, 0, top), top)):
        assert len(images(pipe)) == 2
    with router.routed(Schedule(stages, (0, top, 1, 0), top)):
        first = images(pipe)
        assert (images(pipe) == first).all() and not (first == before).all()
        assert images(pipe, guidance=1.0).shape == first.shape
        assert (images(pipe) == first).all()
    assert (images(pipe) == before).all()


def test_latency_is_measured_after_a_call_to_reuse_of(untrained: ModelAdapter, stages: Stages) -> None:
    """Not a test of speed: the layers that the last level leaves out are not called while it is timed."""
    bank = small_bank(untrained, "block_reuse", stages)
    top = bank.max_level
    calls: list[int] = []
    path = untrained.branches().sources[0]
    layer = untrained.denoiser.get_submodule(path).to_out[0]
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    for changing in (False, True):
        calls.clear()
        table = ms_by_level(Calls(Router(untrained, bank), stages, [1], top, untrained.make_probes(1, 0), changing), 1)
        whole = sum(path_kept(bank, level) for level in range(top + 1))
        assert all(ms > 0 for ms in table[1]) and len(calls) < 2 * (3 * (top + 1))
        assert len(calls) >= 2 * (top + 1 + whole)
    handle.remove()


def path_kept(bank: WeightBank, level: int) -> int:
    """Whether the first branch is computed at a level of stage 1."""
    return int(not level or 0 in bank[1, level]["branches"].kept)


def test_a_bank_of_a_sum_is_saved_and_opened(adapter: ModelAdapter, bank: WeightBank, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank.save(path, {"max_level": bank.max_level, "method": "m"})
    loaded, header = WeightBank.open(path)
    assert (loaded.kind, loaded.reusing, loaded.max_level) == (bank.kind, bank.reusing, bank.max_level)
    assert header["format_version"] == 3 and set(loaded) == {key for key, entry in bank.items() if entry}
    for key in loaded:
        for name, weights in bank[key].items():
            assert torch.equal(loaded[key][name].kept, weights.kept)


@pytest.mark.slow
def test_plans_of_a_sum_are_found_applied_and_exported(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """From a front to pipelines: the applied plan equals the library's loop, an exported one equals the applied."""
    model = str(tiny_sdxl_folder)
    config = plan_config(tiny_sdxl_folder, method="magnitude+block_reuse", nodes=6, probes=2, heldout=2, max_evals=8)
    data = complete_front(config, [3.0], tmp_path / "front", Counting())
    assert data.kind == "width+reuse" and verdicts(data)
    assert [p.kind for p in data.points][-1] == "joint"
    assert all(point.cost <= 3 + 1e-6 for point in data.points)
    pipe: Any = load_pipeline(model)
    dense = images(pipe, steps=3)
    diffes.apply(pipe, tmp_path / "front", calls=3)
    n = len(pipe.scheduler.plan)
    found = images(pipe, steps=n)
    assert (images(pipe, steps=n) == found).all()
    diffes.remove(pipe)
    assert (images(pipe, steps=3) == dense).all()
    export(tmp_path / "front", tmp_path / "out", calls=3)
    assert (images(diffes.load(tmp_path / "out"), steps=n) == found).all()


def test_levels_that_reuse_need_a_cost(tiny_folder: Path) -> None:
    with pytest.raises(DiffesError, match="reuse remove nothing: set cost to macs or latency"):
        prepare(small_config(tiny_folder, method="block_reuse"), Counting())


@pytest.mark.slow
def test_a_search_of_levels_that_reuse_keeps_its_budget(tiny_sdxl_folder: Path) -> None:
    """The paper's search over a sum: MACs counted over the run of what it finds, the first call dense, are within."""
    config = small_config(tiny_sdxl_folder, method="magnitude+deep_reuse", cost="macs", budget=0.7, max_evals=8)
    bench = prepare(config, Counting())
    found = bench.search(progress=Counting())
    adapter = bench.adapter
    timesteps = [int(t) for t in adapter.timesteps(config.steps)]
    dense = macs_per_call(adapter)
    for evaluation in found.evaluations:
        with bench.router.routed(evaluation.schedule):
            counted = sum(macs_per_call(adapter, timestep) for timestep in timesteps)
        assert counted <= 0.7 * dense * len(timesteps) * (1 + 1e-6)
        assert bench.macs_fraction(evaluation.schedule) == pytest.approx(counted / (dense * len(timesteps)), rel=1e-9)


def test_bad_methods_are_refused(tiny: ModelAdapter, stages: Stages) -> None:
    with pytest.raises(DiffesError, match="deep_reuse is for U-Nets"):
        build_bank(tiny, make_method("deep_reuse"), stages, None, guidance=1.0, seed=0)
    with pytest.raises(DiffesError, match="BlockReuse needs calibration data"):
        build_bank(tiny, make_method("block_reuse"), stages, None, guidance=1.0, seed=0)
    with pytest.raises(DiffesError, match="reusing"):
        make_method("obs+reusing")
    assert [type(part).__name__ for part in make_method("obs:damping=1e-2+block_reuse").parts] == ["OBS", "BlockReuse"]
    assert diffes.__version__


def test_a_branch_that_begins_later_leaves_the_memory_of_the_others() -> None:
    """Skip-layer guidance begins and ends such a branch. Its memory is dropped once it is no longer called."""
    latents, a, b = torch.zeros(2, 4), torch.ones(1), torch.zeros(1)
    memory, begun = None, []
    for place, condition in ((0, a), (1, a), (1, b), (2, a), (2, b), (3, a), (4, a)):
        memory = Memory.of_call(memory, place, True, [latents, None, condition], {})
        memory.outputs.setdefault("layer", place)
        begun.append((memory.begun, memory.outputs["layer"], len(memory.others)))
    assert begun == [(0, 0, 0), (0, 0, 0), (1, 1, 1), (0, 0, 1), (1, 1, 1), (0, 0, 1), (0, 0, 0)]
