from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import skip_twice, small_bank
from masking import assert_dense, masked, state
from torch import nn

from diffes.adapters import GroupSet, Kind, ModelAdapter
from diffes.adapters.dit import DiTAdapter
from diffes.errors import DiffesError
from diffes.pruning import METHODS, GroupWeights
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

METHOD_NAMES = METHODS.names()
PRUNING = [name for name in METHOD_NAMES if not METHODS.get(name).reuses]
STAGES = [1, 2]  # of the four: banks of two stages are enough, and are built once for all tests
OF_KIND: dict[Kind, str] = {"width": "obs", "depth": "layer_drop", "reuse": "block_reuse"}


def everywhere(stages: Stages, level: int, max_level: int) -> Schedule:
    return Schedule(stages, (level,) * len(stages), max_level)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.feature("level 0", "equal")
def test_level_0_is_the_dense_model_bit_for_bit(adapter: ModelAdapter, stages: Stages, method: str) -> None:
    skip_twice(adapter, method)
    probes = adapter.make_probes(2, 0)
    dense = adapter.sample(probes, 4, 2.0)
    bank = small_bank(adapter, method, stages, STAGES)
    router, max_level = Router(adapter, bank), bank.max_level
    with router.routed(everywhere(stages, 0, max_level)):
        assert torch.equal(adapter.sample(probes, 4, 2.0), dense)
    with router.routed(Schedule(stages, (0, 1, 1, 0), max_level)):
        assert not torch.equal(adapter.sample(probes, 4, 2.0), dense)


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.feature("every stage thin, every level, width and depth", "equal")
def test_sliced_equals_masked(adapter: ModelAdapter, stages: Stages, method: str) -> None:
    """Thin layers against full ones with zero columns, skipped blocks against blocks whose output is not used."""
    bank = small_bank(adapter, method, stages, STAGES)
    router = Router(adapter, bank)
    probes = adapter.make_probes(2, 0)
    latents, timesteps = adapter.noise(probes), torch.tensor([300, 300])
    max_level = bank.max_level
    before = state(adapter)
    for level in range(1, max_level + 1):
        with torch.no_grad(), router.routed(Schedule(stages, (0, level, 0, 0), max_level)):
            sliced = adapter.denoise_once(latents, timesteps, probes.conditions)
        with torch.no_grad(), ExitStack() as stack:
            masked(adapter, bank, level, stack)
            expected = adapter.denoise_once(latents, timesteps, probes.conditions)
        torch.testing.assert_close(sliced, expected, rtol=1e-4, atol=1e-4)
    assert_dense(adapter, before)


@pytest.mark.parametrize("method", PRUNING)
def test_level_k_removes_k_of_h_everywhere_and_levels_are_nested(
    adapter: ModelAdapter, stages: Stages, method: str
) -> None:
    bank = small_bank(adapter, method, stages, STAGES, allocation="equal")
    max_level = bank.max_level
    for prunable in adapter.prunable(bank.kind):
        kept = set(range(prunable.n_groups))
        least = int(isinstance(prunable, GroupSet) and prunable.norm is not None)  # of normalised groups one stays
        for level in range(1, max_level + 1):
            there = bank[1, level].get(prunable.name)
            left = kept if there is None else set(there.kept.tolist())
            assert left <= kept
            assert abs(len(left) - max(prunable.n_groups * (max_level - level) / max_level, least)) <= 0.5
            kept = left
        assert len(kept) == least


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_dense_is_restored_however_the_context_is_left(
    adapter: ModelAdapter, stages: Stages, error: type[BaseException] | None, method: str
) -> None:
    skip_twice(adapter, method)
    before = state(adapter)
    bank = small_bank(adapter, method, stages, STAGES)
    router, max_level = Router(adapter, bank), bank.max_level
    probes = adapter.make_probes(1, 0)
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if error is not None and calls == 5:
            raise error("in the middle of a run")

    handle = list(adapter.denoiser.children())[-1].register_forward_hook(interrupt)
    try:
        with router.routed(Schedule(stages, (0, max_level, 2, 0), max_level)):
            adapter.sample(probes, 8, 2.0)
        assert error is None
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert error is not None and type(raised) is error
    handle.remove()
    assert calls == (8 if error is None else 5)
    assert_dense(adapter, before)


@pytest.mark.parametrize("kind", OF_KIND)
def test_dense_is_restored_when_a_swap_is_interrupted(
    untrained: ModelAdapter, stages: Stages, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    before = state(untrained)
    bank = small_bank(untrained, OF_KIND[kind], stages)
    router = Router(untrained, bank)
    last = router._parts[list(bank[1, 2])[-1]]
    load_pruned = last.load_pruned

    def interrupted(thin: GroupWeights) -> None:
        load_pruned(thin)
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "load_pruned", interrupted)
    with pytest.raises(KeyboardInterrupt), router.routed(Schedule(stages, (0, 2, 2, 0), bank.max_level)):
        untrained.sample(untrained.make_probes(1, 0), 4, 2.0)
    assert_dense(untrained, before)


def test_weights_change_exactly_at_stage_borders(tiny: ModelAdapter, stages: Stages) -> None:
    router = Router(tiny, small_bank(tiny, "obs", stages, allocation="equal"))
    probes = tiny.make_probes(1, 0)
    schedule = Schedule(stages, (0, 1, 2, 4), 4)
    with torch.no_grad(), router.routed(schedule):
        for timestep, width in [(999, 0), (750, 0), (749, 2), (500, 2), (499, 3), (250, 3), (249, 4), (0, 4), (999, 0)]:
            tiny.denoise_once(tiny.noise(probes), torch.tensor([timestep]), probes.conditions)
            assert tiny.denoiser.transformer_blocks[0].attn1.to_q.weight.shape[0] == width * 8
            assert tiny.denoiser.transformer_blocks[1].ff.net[2].weight.shape[1] == width * 32


def test_layers_of_few_heads_round_halves_up(tiny_sdxl: ModelAdapter, stages: Stages) -> None:
    """Levels are fractions of every set: of H = 4, a layer with 2 heads keeps 2, 1, 1, 0 of them."""
    assert tiny_sdxl.max_level("width") == 4
    sets = {groups.n_groups: groups for groups in tiny_sdxl.group_sets() if groups.attention is not None}
    assert [sets[2].n_kept(level, 4) for level in range(5)] == [2, 2, 1, 1, 0]
    assert [sets[4].n_kept(level, 4) for level in range(5)] == [4, 3, 2, 1, 0]


def test_unsuitable_schedules_are_refused(tiny: ModelAdapter, stages: Stages) -> None:
    router = Router(tiny, small_bank(tiny, "magnitude", stages, [0]))
    before = state(tiny)
    with pytest.raises(DiffesError, match="max_level 8"), router.routed(everywhere(stages, 0, 8)):
        pass
    with pytest.raises(DiffesError, match="stage 3 at level 1"), router.routed(Schedule(stages, (1, 0, 0, 1), 4)):
        pass
    assert_dense(tiny, before)


@pytest.mark.feature("a model moved or cast while routed", "refused")
def test_moving_the_model_while_routed_is_refused(tiny: ModelAdapter, stages: Stages) -> None:
    router = Router(tiny, small_bank(tiny, "magnitude", stages))
    probes = tiny.make_probes(1, 0)
    router.install(everywhere(stages, 1, 4))
    tiny.pipe.to(torch.float16)
    with pytest.raises(DiffesError, match="moved or cast"), torch.no_grad():
        tiny.denoise_once(tiny.noise(probes).half(), torch.tensor([10]), probes.conditions)


def test_an_adapter_says_what_stands_in_for_a_skipped_block(tiny: ModelAdapter, stages: Stages) -> None:
    seen: list[nn.Module] = []

    class Own(DiTAdapter):
        def skipped(self, block: nn.Module) -> Callable[..., Any]:
            def halved(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                seen.append(block)
                return hidden_states / 2

            return halved

    own = Own(tiny.pipe)
    bank, probes = small_bank(tiny, "layer_drop", stages), tiny.make_probes(1, 0)
    outputs = []
    for adapter in (tiny, own):
        with torch.no_grad(), Router(adapter, bank).routed(everywhere(stages, 2, 2)):
            outputs.append(adapter.denoise_once(adapter.noise(probes), torch.tensor([300]), probes.conditions))
    assert seen == [tiny.denoiser.get_submodule(path) for path in tiny.blocks()]
    assert not torch.equal(*outputs)


def test_an_adapter_says_what_attention_without_heads_does(tiny: ModelAdapter, stages: Stages) -> None:
    seen: list[nn.Module] = []

    class Nothing:
        def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return torch.ones_like(hidden_states)

    class Own(DiTAdapter):
        def without_heads(self, attention: nn.Module) -> Any:
            seen.append(attention)
            return Nothing()

    own = Own(tiny.pipe)
    bank, probes = small_bank(tiny, "magnitude", stages), tiny.make_probes(1, 0)
    before, outputs = state(tiny), []
    for adapter in (tiny, own):
        with torch.no_grad(), Router(adapter, bank).routed(everywhere(stages, 4, 4)):
            outputs.append(adapter.denoise_once(adapter.noise(probes), torch.tensor([300]), probes.conditions))
    assert seen == [tiny.denoiser.get_submodule(f"{path}.attn1") for path in tiny.blocks()]
    assert not torch.equal(*outputs)
    assert_dense(tiny, before)
