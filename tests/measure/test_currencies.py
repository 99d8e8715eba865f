from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from conftest import Counting, skip_twice, small_bank
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffes.adapters import ModelAdapter
from diffes.adapters.macs import macs_per_call
from diffes.errors import DiffesError, PluginError
from diffes.measure import currencies
from diffes.measure.currencies import CURRENCIES, Calls, Currency, costs_of, interleaved_ms, macs_fraction
from diffes.problems.workbench import Workbench
from diffes.pruning import METHODS
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

STEPS = 6


@contextmanager
def by_hand(denoiser: nn.Module) -> Iterator[list[int]]:
    """Multiply-accumulates from the shapes that layers are called with: linear, convolution, products of attention."""
    macs: list[int] = []

    def linear(layer: nn.Linear, args: tuple[torch.Tensor], _: object) -> None:
        macs.append(args[0].numel() // max(args[0].shape[-1], 1) * layer.weight.numel())

    def convolution(layer: nn.Conv2d, _args: object, out: torch.Tensor) -> None:
        macs.append(out.shape[0] * out[0, 0].numel() * layer.weight.numel())

    def attention(layer: Any, args: tuple[torch.Tensor], kwargs: dict[str, torch.Tensor], _: object) -> None:
        if getattr(getattr(layer.forward, "func", None), "__name__", "") == "_recall":  # it gives what it gave before
            return
        queries = args[0].shape[1]
        context = kwargs.get("encoder_hidden_states")
        keys = queries if context is None else context.shape[1]
        macs.append(2 * args[0].shape[0] * queries * keys * layer.to_out[0].weight.shape[1])

    handles = []
    for module in denoiser.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear))
        elif isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(convolution))
        elif hasattr(module, "to_q"):
            handles.append(module.register_forward_hook(attention, with_kwargs=True))
    yield macs
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.names())
def test_macs_agree_with_shapes_and_with_a_counter_over_the_whole_run(
    adapter: ModelAdapter, stages: Stages, method: str
) -> None:
    """The fraction against every layer of every call of a routed and a dense run, twice: by hand and by torch."""
    skip_twice(adapter, method)
    bank = small_bank(adapter, method, stages, [1, 2])
    router, max_level = Router(adapter, bank), bank.max_level
    schedule = Schedule(stages, (0, max_level // 3, max_level - 1, 0), max_level)
    probes = adapter.make_probes(1, 0)
    adapter.sample(probes, 1, 1.0)  # prompts are embedded, and kept

    def count() -> tuple[int, int]:
        with by_hand(adapter.denoiser) as macs, FlopCounterMode(display=False) as counter:
            adapter.sample(probes, STEPS, 1.0)
        return sum(macs), counter.get_total_flops()

    dense = count()
    with router.routed(schedule):
        routed = count()
    fraction = macs_fraction(router, schedule, stages.count_steps(adapter.timesteps(STEPS)))
    assert fraction < 0.95
    assert routed[0] / dense[0] == pytest.approx(fraction, rel=0.01)
    assert routed[1] / dense[1] == pytest.approx(fraction, rel=0.01)
    assert dense[0] == pytest.approx(STEPS * macs_per_call(adapter), rel=0.01)


def test_a_lora_is_counted_with_its_layers(untrained: ModelAdapter, stages: Stages) -> None:
    """Its matrices are not all in proportion to groups, and the counts of before are not taken for those of now."""
    bank = small_bank(untrained, "magnitude", stages)
    router, schedule = Router(untrained, bank), Schedule(stages, (0, 2, 1, 3), bank.max_level)
    steps, before = (1, 1, 1, 1), macs_fraction(Router(untrained, bank), schedule, (1, 1, 1, 1))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q", "ff.net.2"]), untrained.denoiser)
    router = Router(untrained, bank)
    dense = len(steps) * macs_per_call(untrained)
    with router.routed(schedule):
        routed = sum(macs_per_call(untrained, first) for first, _ in stages.ranges)
    fraction = macs_fraction(router, schedule, steps)
    assert fraction == pytest.approx(routed / dense, rel=1e-9) and fraction != pytest.approx(before, rel=1e-4)


def test_interleaved_times_are_medians_in_milliseconds() -> None:
    fast, slow = interleaved_ms([lambda: time.sleep(0.002), lambda: time.sleep(0.02)], 3, torch.device("cpu"))
    assert 2 <= fast < slow < 200 and slow >= 20


def test_neither_a_machine_that_slows_down_nor_one_slip_makes_a_stage_dearer(
    untrained: ModelAdapter, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels take 1.5 times the milliseconds that their MACs would; in one stage one was timed short."""
    router = Router(untrained, small_bank(untrained, "magnitude", stages))
    macs, visited = currencies.macs_by_level(router, stages, [0, 1, 3], 2), [0, 1, 3]
    told: list[str] = []
    timed = [[8.0, *(12 * macs[stage][level] / macs[stage][0] for level in (1, 2))] for stage in visited]
    timed[1][2] /= 4
    drifting = iter([[speed * ms for ms in row] for speed, row in zip([1.0, 3.0, 2.0], timed, strict=True)])
    monkeypatch.setattr(currencies, "interleaved_ms", lambda *_: next(drifting))
    probes = untrained.make_probes(1, 0)
    table = currencies.ms_by_level(Calls(router, stages, visited, 2, probes, advance=told.append), 1)
    for stage in visited:
        assert table[stage] == pytest.approx([16, *(24 * macs[stage][level] / macs[stage][0] for level in (1, 2))])
    assert told == ["stage 0", "stage 1", "stage 3"]  # they leave different widths


@pytest.mark.parametrize("found", [[[1.0]], "text", None, [[0.0] * 5] * 4, [[float("nan")] * 5] * 4, [[1.0] * 6] * 4])
def test_a_cost_that_returns_something_else_is_named(bench: Workbench, found: object) -> None:
    with pytest.raises(DiffesError, match=r"cost 'odd' must return 4 rows of 5 finite costs above 0 from table, got"):
        _cost_of(bench, lambda calls: found)


def test_a_cost_that_fails_is_named_and_arrays_are_taken(bench: Workbench) -> None:
    with pytest.raises(PluginError, match=r"cost 'odd' failed \(ZeroDivisionError"):
        _cost_of(bench, lambda calls: 1 / 0)
    with pytest.raises(PluginError, match=r"cost 'odd' failed \(SystemExit: 3"):
        _cost_of(bench, lambda calls: sys.exit(3))
    assert _cost_of(bench, lambda calls: torch.ones(4, 5)) == [[1.0] * 5] * 4


def _cost_of(bench: Workbench, table: Callable[[Calls], object]) -> object:
    odd = type("Odd", (Currency,), {"table": lambda self, calls: table(calls), "__module__": "theirs"})
    CURRENCIES.register("odd")(odd)
    try:
        probes = bench.adapter.make_probes(1, 0)
        return costs_of("odd", bench.router, bench.levels, probes, Counting(), changing=False)
    finally:
        CURRENCIES.unregister("odd")
