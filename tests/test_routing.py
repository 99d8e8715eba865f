from __future__ import annotations

import pytest
import torch
from conftest import build_bank

from diffes.adapters import ModelAdapter
from diffes.errors import DiffesError
from diffes.pruning import METHODS
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan

METHOD_NAMES = METHODS.names()


def everywhere(plan: StagePlan, level: int, max_level: int) -> Schedule:
    return Schedule(plan, (level,) * len(plan), max_level)


def state(adapter: ModelAdapter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.denoiser.state_dict().items()}


def assert_dense(adapter: ModelAdapter, before: dict[str, torch.Tensor]) -> None:
    after = adapter.denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(block.attn1.heads == adapter.max_level for block in adapter.denoiser.transformer_blocks)
    assert not adapter.denoiser._forward_pre_hooks


def test_level_0_is_the_dense_model_bit_for_bit(adapter: ModelAdapter, plan: StagePlan) -> None:
    probes = adapter.make_probes(3, 0)
    dense = adapter.sample(probes, 8, 2.0)
    router = Router(adapter, build_bank(adapter, "magnitude", plan))
    with router.routed(everywhere(plan, 0, adapter.max_level)):
        assert torch.equal(adapter.sample(probes, 8, 2.0), dense)
    with router.routed(everywhere(plan, 2, adapter.max_level)):
        assert not torch.equal(adapter.sample(probes, 8, 2.0), dense)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_sliced_equals_masked(adapter: ModelAdapter, plan: StagePlan, method: str) -> None:
    """Thin layers against full-width ones in which dropped groups have zero columns in the consumer."""
    bank = build_bank(adapter, method, plan, [1])
    router = Router(adapter, bank)
    probes = adapter.make_probes(2, 0)
    latents, timesteps = probes.noise, torch.tensor([300, 300])
    for level in range(1, adapter.max_level + 1):
        with torch.no_grad(), router.routed(Schedule(plan, (0, level, 0, 0), adapter.max_level)):
            sliced = adapter.denoise_once(latents, timesteps, probes.condition)
        dense = state(adapter)
        for groups in adapter.group_sets():
            thin = bank[1, level][groups.name]
            columns = groups.features(thin.kept.long())
            layer = adapter.denoiser.get_submodule(groups.consumer)
            full = torch.zeros_like(layer.weight)
            full[:, columns] = thin.consumer if thin.consumer is not None else layer.weight.detach()[:, columns]
            layer.weight.data = full
        with torch.no_grad():
            masked = adapter.denoise_once(latents, timesteps, probes.condition)
        adapter.denoiser.load_state_dict(dense)
        torch.testing.assert_close(sliced, masked, rtol=1e-4, atol=1e-4)


def test_attention_and_ffn_lose_the_same_fraction(adapter: ModelAdapter, plan: StagePlan) -> None:
    bank = build_bank(adapter, "magnitude", plan)
    for level in range(1, adapter.max_level + 1):
        for groups in adapter.group_sets():
            kept = len(bank[0, level][groups.name].kept)
            assert kept == groups.n_groups * (adapter.max_level - level) / adapter.max_level


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_dense_is_restored_however_the_context_is_left(
    adapter: ModelAdapter, plan: StagePlan, error: type[BaseException] | None
) -> None:
    before = state(adapter)
    router = Router(adapter, build_bank(adapter, "obs", plan))
    probes = adapter.make_probes(2, 0)
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if error is not None and calls == 5:
            raise error("in the middle of a run")

    handle = adapter.denoiser.transformer_blocks[1].register_forward_hook(interrupt)
    try:
        with router.routed(Schedule(plan, (1, 2, adapter.max_level, 1), adapter.max_level)):
            adapter.sample(probes, 8, 2.0)
        assert error is None
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert error is not None and type(raised) is error
    handle.remove()
    assert calls == (8 if error is None else 5)
    assert_dense(adapter, before)


def test_dense_is_restored_when_a_swap_is_interrupted(
    tiny: ModelAdapter, plan: StagePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(tiny)
    router = Router(tiny, build_bank(tiny, "obs", plan))
    second = router._layers[tiny.group_sets()[1].name]
    monkeypatch.setattr(second, "load_thin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), router.routed(everywhere(plan, 2, 4)):
        tiny.sample(tiny.make_probes(1, 0), 4, 2.0)
    assert_dense(tiny, before)


def test_weights_change_exactly_at_stage_borders(tiny: ModelAdapter, plan: StagePlan) -> None:
    router = Router(tiny, build_bank(tiny, "obs", plan))
    probes = tiny.make_probes(1, 0)
    schedule = Schedule(plan, (0, 1, 2, 4), 4)
    with torch.no_grad(), router.routed(schedule):
        for timestep, width in [(999, 0), (750, 0), (749, 2), (500, 2), (499, 3), (250, 3), (249, 4), (0, 4), (999, 0)]:
            tiny.denoise_once(probes.noise, torch.tensor([timestep]), probes.condition)
            assert tiny.denoiser.transformer_blocks[0].attn1.to_q.weight.shape[0] == width * 8
            assert tiny.denoiser.transformer_blocks[1].ff.net[2].weight.shape[1] == width * 32


def test_unsuitable_schedules_are_refused(tiny: ModelAdapter, plan: StagePlan) -> None:
    router = Router(tiny, build_bank(tiny, "magnitude", plan, [0]))
    before = state(tiny)
    with pytest.raises(DiffesError, match="max_level 8"), router.routed(everywhere(plan, 0, 8)):
        pass
    with pytest.raises(DiffesError, match="stage 3 at level 1"), router.routed(Schedule(plan, (1, 0, 0, 1), 4)):
        pass
    assert_dense(tiny, before)


def test_moving_the_model_while_routed_is_refused(tiny: ModelAdapter, plan: StagePlan) -> None:
    router = Router(tiny, build_bank(tiny, "magnitude", plan))
    probes = tiny.make_probes(1, 0)
    router.install(everywhere(plan, 1, 4))
    tiny.pipe.to(torch.float16)
    with pytest.raises(DiffesError, match="moved or cast"), torch.no_grad():
        tiny.denoise_once(probes.noise.half(), torch.tensor([10]), probes.condition)
