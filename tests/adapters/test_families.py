"""Families of text-to-image pipelines: each sampled by its own call, its layers removed exactly."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel, ZImageTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock
from families import FAMILIES, pipeline, wan

import diffes
from diffes.adapters import ModelAdapter, SamplingState, adapter_for
from diffes.adapters.blocks import BLOCKS
from diffes.errors import DiffesError
from diffes.measure.evaluator import ScheduleEvaluator
from diffes.measure.metrics import make_metric
from diffes.pruning import make_method
from diffes.pruning.bank import WeightBank
from diffes.pruning.base import GroupWeights
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import CalibrationSet
from diffes.runtime.router import Router
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Schedule, Stages
from diffes.testing import AdapterConformance
from diffes.testing.adapters import masked

STAGES = Stages.equal(4)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ModelAdapter:
    pipe, call = pipeline(request.param)
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    return adapter


def called(adapter: ModelAdapter, n_steps: int, guidance: float) -> Any:
    """Images or videos of the pipeline's own call on the first two held-out probes."""
    probes = adapter.make_probes(2, 3, "heldout")
    return adapter.pipe(**adapter.call_of(probes, guidance) | {"num_inference_steps": n_steps, "output_type": "np"})[0]


class Conformance(AdapterConformance):
    family: str
    changes: ClassVar[dict[str, Any]] = {}

    def make(self) -> ModelAdapter:
        pipe, call = pipeline(self.family)
        adapter = adapter_for(pipe)
        adapter.use_call(call | self.changes)
        return adapter


class TestStableDiffusion1(Conformance):
    family = "sd15"


class TestPixArt(Conformance):
    family = "pixart"


class TestStableDiffusion3(Conformance):
    family = "sd3"


class TestStableDiffusion35(Conformance):
    family = "sd35"


class TestFlux(Conformance):
    family = "flux"


class TestSana(Conformance):
    family = "sana"


class TestQwenImage(Conformance):
    family = "qwen_image"
    changes: ClassVar[dict[str, Any]] = {"true_cfg_scale": 1.0}


class TestZImage(Conformance):
    family = "z_image"


class TestLTX(Conformance):
    family = "ltx"


class TestWan(Conformance):
    family = "wan"


class TestCogVideoX(Conformance):
    family = "cogvideox"


class TestHunyuanVideo(Conformance):
    family = "hunyuan_video"


def test_block_forms_are_those_that_diffusers_keeps_for_itself() -> None:
    TransformerBlockRegistry.get(BasicTransformerBlock)  # fills it
    known = {model.__name__: each for model, each in TransformerBlockRegistry._registry.items()}
    assert set(BLOCKS) - set(known) == {"SanaTransformerBlock"}
    for name in set(BLOCKS) & set(known):
        form, theirs = BLOCKS[name], known[name]
        assert form.context == theirs.return_encoder_hidden_states_index, name
        assert (form.hidden or 0) == theirs.return_hidden_states_index, name


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_heads_that_share_a_norm_stay(name: str) -> None:
    pipe, call = pipeline(name)
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    assert all(groups.attention is None for groups in adapter.group_sets())
    sources = adapter.branches().sources
    assert adapter.whole_attentions() == [path for path in sources if "attn" in path]


def test_pipelines_with_two_denoisers_are_sampled_by_dense_plans_only() -> None:
    pipe = wan(two=True)
    adapter = adapter_for(pipe)
    assert adapter.denoisers == ["transformer", "transformer_2"]
    with pytest.raises(DiffesError, match=r"WanPipeline has 2 denoisers .*--genes steps"):
        adapter.prunable("width")


def test_first_order_steps_are_those_of_the_pipelines_own_scheduler() -> None:
    """Euler's method in the sigmas of flow matching is DDIM's row."""
    for name in ("sd3", "flux"):
        pipe, call = pipeline(name)
        adapter = adapter_for(pipe)
        adapter.use_call(call)
        own = adapter.fresh_scheduler(5)
        timesteps = [round(float(t)) - 1 for t in own.timesteps]
        own.timesteps = torch.tensor(timesteps) + 1.0
        own.sigmas = torch.cat([own.timesteps / 1000, torch.zeros(1)])
        ours = PlanScheduler.of(pipe.scheduler, timesteps, "ddim")
        probes = adapter.make_probes(2, 3)
        found, expected = (adapter.sample(probes, scheduler, 2.0) for scheduler in (ours, own))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_outputs_of_earlier_calls_are_reused(family: ModelAdapter) -> None:
    """With everything computed again it is the dense model; with something reused, images differ. Some models compute
    what nothing reads, or what is the same in all calls: that is reused first, and changes nothing."""
    probes = family.make_probes(4, 0)
    data = CalibrationSet(family.noise(probes), probes.conditions, "noise")
    bank = build_bank(family, make_method("block_reuse"), STAGES, data, guidance=3.0, seed=0)
    top = bank.max_level
    evaluate = ScheduleEvaluator(
        Router(family, bank), STAGES, probes, n_steps=8, guidance=3.0, metric=make_metric("latent_mse", family.device)
    )
    found = {e.schedule.levels: e.fitness for e in evaluate([Schedule(STAGES, (k,) * 4, top) for k in (0, 1, top)])}
    assert found[0, 0, 0, 0] == 0 >= found[1, 1, 1, 1] > found[(top,) * 4]
    assert bool(found[1, 1, 1, 1]) == (
        type(family.denoiser) not in (QwenImageTransformer2DModel, ZImageTransformer2DModel)
    )


def test_a_plan_is_fitted_and_runs_in_the_pipeline(family: ModelAdapter) -> None:
    settings: Any = {"probes": 3, "heldout": 2, "reference_steps": 30, "guidance": 2.0}
    found = diffes.fit(family.pipe, [930, 700, 400], call=family.call, **settings)
    assert found.after.latent_mse is not None and found.before.latent_mse is not None
    probes = family.make_probes(2, 3, "heldout")
    planned = PlanScheduler.of(family.own_scheduler, found.plan.timesteps, found.plan.rows)
    (expected,) = family.render(family.sample(probes, planned, 2.0))
    diffes.apply(family.pipe, found.plan)
    assert np.array_equal(called(family, 3, 2.0), expected[0])
    diffes.remove(family.pipe)


def test_gradients_pass_through_the_pipelines_call() -> None:
    """Compare gradients of the final latents with finite differences, in double precision."""
    pipe, call = pipeline("sd3")
    adapter = adapter_for(pipe.to(torch.float64))
    adapter.use_call(call)
    bias = adapter.denoiser.proj_out.bias
    probes = adapter.make_probes(2, 3)

    def final() -> torch.Tensor:
        at = adapter.start(probes, PlanScheduler.of(pipe.scheduler, [900, 500, 200], "dpmsolver++"), 3.0)
        for _ in range(3):
            at = adapter.step(at, probes, 3.0)
        return adapter.finish(at).double().square().sum()

    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(final(), [bias])
    with torch.no_grad():
        for i in range(2):
            differences = []
            for h in (1e-2, -1e-2):
                bias[i] += h
                differences.append(float(final()))
                bias[i] -= h
            assert float(gradient[i]) == pytest.approx((differences[0] - differences[1]) / 2e-2, rel=2e-3)


@pytest.fixture
def counting() -> ModelAdapter:
    """Adapter of a pipeline that skips layers in some of its steps, by their number."""
    pipe, call = pipeline("sd35")
    adapter = adapter_for(pipe)
    skips = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.8}
    adapter.use_call(call | skips | {"skip_layer_guidance_scale": 5.0})
    return adapter


def test_a_pipeline_that_counts_its_steps_goes_on_in_the_middle(counting: ModelAdapter) -> None:
    probes = counting.make_probes(2, 3)
    whole = PlanScheduler.of(counting.own_scheduler, [900, 600, 300, 100], "dpmsolver++")
    expected = counting.sample(probes, whole, 3.0)
    plain = adapter_for(counting.pipe)
    plain.use_call({"max_sequence_length": 4})
    assert not torch.equal(plain.sample(probes, whole, 3.0), expected)
    with torch.no_grad():
        at = counting.start(probes, whole, 3.0)
        for _ in range(4):
            at = counting.step(replace(at, drive=None), probes, 3.0)
    assert torch.equal(counting.finish(at), expected)


def test_runs_that_are_left_in_the_middle_are_freed(counting: ModelAdapter) -> None:
    """Also inside a denoiser call of another run; attributes of the pipeline are as they were."""
    pipe, probes = counting.pipe, counting.make_probes(1, 3)
    pipe.encode_prompt = pipe.encode_prompt  # the user's own
    before = dict(pipe.__dict__)

    def begun() -> SamplingState:
        scheduler = PlanScheduler.of(counting.own_scheduler, [900, 600, 300], "ddim")
        return counting.step(counting.start(probes, scheduler, 3.0), probes, 3.0)

    with torch.no_grad():
        states = [begun() for _ in range(3)]
        drives = [weakref.ref(state.drive) for state in states]
        handle = pipe.transformer.register_forward_hook(lambda *_: states.pop().drive.close())  # type: ignore[union-attr]
        last = begun()
        handle.remove()
        states.clear()
    assert all(drive() is None for drive in drives) and last.drive is not None
    assert dict(pipe.__dict__) == before
    held = weakref.ref(pipe.transformer)
    del counting.pipe, pipe, last, before, begun
    counting.__dict__.clear()
    gc.collect()
    assert held() is None


def test_sigmas_that_end_below_the_first_timestep_are_in_the_first_stage() -> None:
    pipe, call = pipeline("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=0.3)
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    assert min(float(t) for t in adapter.fresh_scheduler(20).timesteps) < 1
    assert adapter.timesteps(20)[-1] == 0
    assert adapter.timestep((), {"timestep": torch.tensor([0.5, 0.5])}) == 0
    adapter.check_sampler()


def test_a_schedule_routes_under_a_cache_of_diffusers() -> None:
    """Caches need the context that the pipeline has set around the denoiser call: no other run may begin there."""
    pipe, call = pipeline("flux")
    adapter = adapter_for(pipe)
    bank = build_bank(adapter, make_method("magnitude"), STAGES, None, guidance=1.0, seed=0, allocation="equal")
    router = Router(adapter, bank)
    router.install(Schedule(STAGES, (0,) * 4, bank.max_level))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    assert pipe(**call, num_inference_steps=2, output_type="np")[0].shape == (4, 8, 8, 3)
    router.remove()


def test_a_guidance_scale_for_each_image_has_to_be_used() -> None:
    pipe, call = pipeline("flux")
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    probes = adapter.make_probes(2, 3).over(1.5, 4.0)
    with pytest.raises(DiffesError, match="FluxPipeline does not mix branches by a guidance scale for each image"):
        adapter.sample(probes, 3, 2.75)


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_heads_and_channels_that_share_a_projection_are_routed_together(name: str) -> None:
    """Streamed or resident, with some of both left, one of them, or none; what was dense is dense again, to the bit."""
    pipe, call = pipeline(name)
    adapter = adapter_for(pipe)
    adapter.use_call(call)
    probes = adapter.make_probes(2, 0)
    latents, at = adapter.noise(probes), torch.tensor([300, 300])
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    heads, channels = (groups for groups in adapter.group_sets() if groups.first is not None)
    shared = pipe.transformer.get_submodule(heads.consumers[0])
    kept = torch.arange(0, 4, 2, dtype=torch.int32), torch.arange(0, channels.n_groups, 3, dtype=torch.int32)
    some, none = (GroupWeights(kept[0]), GroupWeights(kept[1])), GroupWeights(kept[0][:0])
    entries = [{heads.name: some[0], channels.name: some[1]}, {channels.name: some[1]}, {heads.name: none}]
    held = {(1, level): entry for level, entry in enumerate(entries, 1)}
    bank = WeightBank(held, "width", max_level=3)
    found: dict[str, list[torch.Tensor]] = {}
    for resident in ("all", "stream"):
        router = Router(adapter, bank, resident=resident)
        for level in range(1, 4):
            with torch.no_grad(), router.routed(Schedule(STAGES, (0, level, 0, 0), 3)):
                found.setdefault(resident, []).append(adapter.denoise_once(latents, at, probes.conditions))
                left = entries[level - 1]
                n = [len(left[g.name].kept) if g.name in left else g.n_groups for g in (heads, channels)]
                assert shared.weight.shape[1] == max(n[0], 1) * heads.size + n[1]
    router = Router(adapter, bank, resident="all")
    with torch.no_grad(), router.routed(Schedule(STAGES, (0, 1, 0, 0), 3)):
        seen = []
        for timestep in (300, 900, 300):
            adapter.denoise_once(latents, torch.tensor([timestep] * 2), probes.conditions)
            seen.append(shared.weight.data_ptr())
    assert seen[0] == seen[2] != seen[1]  # it stays ready
    for level, pruned in enumerate(found["all"], 1):
        assert torch.equal(pruned, found["stream"][level - 1])
        with torch.no_grad(), ExitStack() as stack:
            masked(adapter, bank, level, stack)
            expected = adapter.denoise_once(latents, at, probes.conditions)
        torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-4)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    router = Router(adapter, bank)
    with router.routed(Schedule(STAGES, (0, 1, 0, 0), 3)), torch.no_grad():
        adapter.denoise_once(latents, at, probes.conditions)
        shared.weight.mul_(2)
        with pytest.raises(DiffesError, match="proj_out were changed while a run was applied"):
            adapter.denoise_once(latents, at, probes.conditions)
