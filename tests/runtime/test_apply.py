"""apply, remove and load: a run inside diffusers, and out of it again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import altered, images, make_run, open_adapter, open_pipe, small_bank
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)

import diffes
from diffes.adapters import ModelAdapter, adapter_for
from diffes.errors import DiffesError
from diffes.results import artifact
from diffes.runtime import apply as apply_module
from diffes.runtime.router import Router
from diffes.spaces.schedule import Plan, Schedule, Stages

SCHEDULERS = [
    DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler,
]  # fmt: skip
TWO_CALLS = Plan(Stages.equal(1), ((999, 0), (500, 0)), 4, "dpmsolver++")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@pytest.mark.slow
@pytest.mark.feature("`remove`", "equal")
def test_apply_then_remove_restores_every_bit(any_run: Path, tiny_model: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    denoiser = adapter_for(pipe).denoiser
    before, weights = images(pipe), {k: v.clone() for k, v in denoiser.state_dict().items()}
    assert diffes.apply(pipe, any_run) is pipe
    pruned = images(pipe)
    assert not np.array_equal(pruned, before)
    diffes.apply(pipe, any_run)
    np.testing.assert_array_equal(images(pipe), pruned)
    diffes.remove(pipe)
    np.testing.assert_array_equal(images(pipe), before)
    assert all(torch.equal(v, weights[k]) for k, v in denoiser.state_dict().items())
    with pytest.raises(DiffesError, match="no run is applied"):
        diffes.remove(pipe)


def check_routing(pipe: DiffusionPipeline, run: Path, steps: int, guidance: float) -> np.ndarray:
    """Images of a run; at every step the denoiser carries the level of its timestep's stage."""
    adapter = adapter_for(pipe)
    schedule, facts = artifact.read_schedule(run)
    kept = []
    groups = adapter.group_sets()[0]
    consumer = adapter.denoiser.get_submodule(groups.consumers[0])

    def look(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any], _out: object) -> None:
        blocks = [adapter.denoiser.get_submodule(path) for path in adapter.blocks()]
        left = sum("forward" not in block.__dict__ for block in blocks)
        kept.append((adapter.timestep(args, kwargs), left, consumer.weight.shape[1]))

    handle = adapter.denoiser.register_forward_hook(look, with_kwargs=True)
    diffes.apply(pipe, run)
    pruned = images(pipe, steps, guidance)
    diffes.remove(pipe)
    handle.remove()
    assert np.isfinite(pruned).all()
    assert len(kept) == len(pipe.scheduler.timesteps) >= steps
    for timestep, blocks, width in kept:
        level = schedule.levels[schedule.stages.stage_of(timestep)]
        if facts.kind == "depth":
            assert blocks == schedule.max_level - level
        elif facts.kind == "width":
            assert width == groups.n_kept(level, schedule.max_level) * groups.size
    return pruned


@pytest.mark.slow
@pytest.mark.feature("DDIM, DPM-Solver++, Euler, Heun, UniPC, with and without guidance", "equal")
def test_one_schedule_serves_all_samplers_with_and_without_guidance(any_run: Path, tiny_model: Path) -> None:
    pipe = open_pipe(tiny_model)
    for scheduler, guidance in zip([*SCHEDULERS, DDIMScheduler], itertools.cycle([1.0, 3.0]), strict=False):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        dense = images(pipe, 6, guidance)
        assert not np.array_equal(check_routing(pipe, any_run, 6, guidance), dense)
        np.testing.assert_array_equal(images(pipe, 6, guidance), dense)


@pytest.mark.slow
def test_one_schedule_serves_all_numbers_of_steps(any_run: Path, tiny_model: Path) -> None:
    pipe = open_pipe(tiny_model)
    for steps in (5, 20, 25):
        check_routing(pipe, any_run, steps, 3.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(any_run: Path, tiny_model: Path, dtype: torch.dtype) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model, dtype=dtype)
    before = images(pipe)
    diffes.apply(pipe, any_run)
    pruned = images(pipe)
    assert np.isfinite(pruned).all() and not np.array_equal(pruned, before)
    full = diffes.apply(open_pipe(tiny_model), any_run)
    assert np.abs(pruned - images(full)).mean() < 0.02
    diffes.remove(pipe)
    np.testing.assert_array_equal(images(pipe), before)


def add_lora(adapter: ModelAdapter) -> None:
    """Random LoRA matrices on every layer that pruning touches, unfused."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), adapter.denoiser
        )
    adapter.denoiser.eval()


@pytest.mark.feature("a LoRA, not fused, loaded before `apply`", "equal")
def test_a_lora_is_pruned_with_its_layers(untrained: ModelAdapter, stages: Stages) -> None:
    """The oracle: the same LoRA merged into the dense weights, pruned with the same kept groups."""
    bank = small_bank(untrained, "magnitude", stages)
    probes = untrained.make_probes(2, 0)
    plain = untrained.sample(probes, 4, 2.0)
    schedule = Schedule(stages, (1, 2, 1, 3), untrained.max_level("width"))
    add_lora(untrained)
    with_lora = untrained.sample(probes, 4, 2.0)
    assert not torch.equal(with_lora, plain)
    with Router(untrained, bank).routed(schedule):
        unfused = untrained.sample(probes, 4, 2.0)
    assert torch.equal(untrained.sample(probes, 4, 2.0), with_lora)
    for layer in untrained.denoiser.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    merged = open_adapter(untrained.pipe.config._name_or_path)
    weights = {n.replace(".base_layer", ""): p for n, p in untrained.denoiser.state_dict().items() if ".lora_" not in n}
    merged.denoiser.load_state_dict(weights)
    with Router(merged, bank).routed(schedule):
        fused = merged.sample(probes, 4, 2.0)
    torch.testing.assert_close(unfused, fused, rtol=1e-3, atol=1e-3)


@pytest.mark.feature("a LoRA loaded or fused after `apply`, or fused before it", "refused")
def test_a_lora_of_diffusers_is_loaded_before_apply_not_after(
    tiny_sdxl_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make_run(tmp_path_factory, tiny_sdxl_folder, "obs")
    source = open_pipe(tiny_sdxl_folder)
    add_lora(adapter_for(source))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(source.unet))
    pipe = open_pipe(tiny_sdxl_folder)
    without = images(diffes.apply(pipe, run))
    diffes.remove(pipe)
    diffes.apply(pipe, run)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(DiffesError, match="a LoRA loaded, fused or unloaded"):
        images(pipe)
    pipe = open_pipe(tiny_sdxl_folder)
    pipe.load_lora_weights(tmp_path)
    dense = images(pipe)
    pruned = images(diffes.apply(pipe, run))
    assert np.isfinite(pruned).all() and not np.array_equal(pruned, without) and not np.array_equal(pruned, dense)
    pipe.fuse_lora()
    with pytest.raises(DiffesError, match="a LoRA loaded, fused or unloaded"):
        images(pipe)
    pipe = open_pipe(tiny_sdxl_folder)
    pipe.load_lora_weights(tmp_path)
    diffes.remove(diffes.apply(pipe, run))
    np.testing.assert_array_equal(images(pipe), dense)
    pipe.fuse_lora()
    with pytest.raises(DiffesError, match="one that is fused"):
        diffes.apply(pipe, run)


@pytest.mark.feature("LoHa and other adapters that are no plain LoRA", "refused")
def test_adapters_that_cannot_be_cut_are_refused(untrained: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(untrained, "magnitude", stages)
    peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=LAYERS), untrained.denoiser)
    with pytest.raises(DiffesError, match="no plain LoRA"):
        Router(untrained, bank)


@pytest.mark.feature("`save_pretrained` while routed", "equal")
def test_what_is_saved_while_applied_is_the_dense_model(any_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)  # not copied: where weights lie decides on the last bits
    dense = images(pipe)
    pruned = images(diffes.apply(pipe, any_run))
    pipe.save_pretrained(tmp_path)
    np.testing.assert_array_equal(images(pipe), pruned)
    np.testing.assert_array_equal(images(DiffusionPipeline.from_pretrained(tmp_path)), dense)


@pytest.mark.feature("`remove` after the pipeline was cast", "equal")
def test_a_pipeline_moved_while_applied_is_whole_again_after_remove(any_run: Path, tiny_model: Path) -> None:
    pipe = open_pipe(tiny_model)
    images(diffes.apply(pipe, any_run))
    pipe.to(torch.float64)
    diffes.remove(pipe)
    assert {p.dtype for p in adapter_for(pipe).denoiser.parameters()} == {torch.float64}
    untouched = open_pipe(tiny_model).to(torch.float64)
    np.testing.assert_array_equal(images(pipe), images(untouched))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "method", "in_place"),
    [
        ("tiny_folder", "obs", True),
        ("tiny_folder", "layer_drop", False),
        ("tiny_folder", "magnitude+block_reuse", False),
        ("tiny_sdxl_folder", "obs", False),
    ],
)
@pytest.mark.feature("`torch.compile` after `apply`", "equal")
def test_compile_after_apply(
    folder: str, method: str, in_place: bool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Traced by dynamo and run as it was traced: same numbers, and still routed."""
    torch.compiler.reset()
    tiny_model = request.getfixturevalue(folder)
    any_run = make_run(tmp_path_factory, tiny_model, method)
    pipe = open_pipe(tiny_model)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    dense = images(pipe, 4)
    expected = images(diffes.apply(pipe, any_run), 4)
    if in_place:
        getattr(pipe, name).compile(backend="eager")
    else:
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    np.testing.assert_allclose(images(pipe, 4), expected, atol=1e-5)
    diffes.remove(pipe)
    np.testing.assert_allclose(images(pipe, 4), dense, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.feature("offloading (model, group) before or after `apply`", "refused")
def test_offloaded_pipelines_are_refused(any_run: Path, tiny_model: Path) -> None:
    pipe = open_pipe(tiny_model)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(DiffesError, match=r"is offloaded .*remove_all_hooks"):
        diffes.apply(pipe, any_run)
    pipe.remove_all_hooks()
    expected = images(diffes.apply(pipe, any_run))
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(DiffesError, match="offloaded"):
        images(pipe)
    pipe.remove_all_hooks()
    np.testing.assert_array_equal(images(pipe), expected)


def edit_levels(path: Path) -> None:
    data = json.loads(path.read_text())
    data["levels"] = data["levels"][::-1]
    path.write_text(json.dumps(data))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (artifact.SCHEDULE, edit_levels, "was changed after it was written"),
        (artifact.SCHEDULE, truncate, "is damaged"),
        (artifact.SCHEDULE, Path.unlink, "unfinished"),
        (artifact.BANK, flip_a_byte, "truncated or changed"),
        (artifact.BANK, truncate, "truncated or changed"),
        (artifact.BANK, Path.unlink, "is missing"),
    ],
)
def test_damaged_runs_are_refused_and_leave_the_pipeline_alone(
    run: Path, tiny_folder: Path, tmp_path: Path, name: str, change: Callable[[Path], object], message: str
) -> None:
    damaged = altered(run, tmp_path, name, change)
    pipe = open_pipe(tiny_folder)
    before = images(pipe)
    with pytest.raises(DiffesError, match=message):
        diffes.apply(pipe, damaged)
    np.testing.assert_array_equal(images(pipe), before)


def test_a_run_of_another_model_is_refused(run: Path) -> None:
    pipe = diffes.load_pipeline("fashion-dit")
    with pytest.raises(DiffesError, match="another model"):
        diffes.apply(pipe, run)
    assert not pipe.transformer._forward_pre_hooks


def test_a_run_of_the_other_family_is_refused(run: Path, tiny_sdxl_folder: Path) -> None:
    pipe = open_pipe(tiny_sdxl_folder)
    with pytest.raises(DiffesError, match="another model"):
        diffes.apply(pipe, run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    pipe = open_pipe(tiny_folder)
    with pytest.raises(DiffesError, match="no run folder"):
        diffes.apply(pipe, tmp_path)
    with pytest.raises(DiffesError, match="is not a folder"):
        diffes.apply(pipe, tmp_path / "nothing")


def test_pipelines_around_one_denoiser_keep_their_own_schedulers(tiny_folder: Path) -> None:
    """Pruned layers belong to the denoiser, a plan's scheduler to the pipeline that it was applied to."""
    one = open_pipe(tiny_folder)
    other = DiTPipeline(**one.components)
    other.scheduler = EulerDiscreteScheduler.from_config(one.scheduler.config)
    own, others, before = one.scheduler, other.scheduler, images(one)
    diffes.apply(one, TWO_CALLS)
    with pytest.warns(UserWarning, match=r"call diffes\.remove on it, too"):
        diffes.remove(other)
    assert other.scheduler is others and isinstance(one.scheduler, diffes.PlanScheduler)
    diffes.remove(one)
    assert one.scheduler is own and np.array_equal(images(one), before)
    diffes.apply(one, TWO_CALLS)
    diffes.apply(other, TWO_CALLS)
    diffes.remove(other)
    diffes.remove(one)
    assert (one.scheduler, other.scheduler) == (own, others) and np.array_equal(images(one), before)
    with pytest.raises(DiffesError, match="no run is applied"):
        diffes.remove(one)


def test_a_scheduler_that_is_set_after_apply_is_kept(tiny_folder: Path) -> None:
    pipe = open_pipe(tiny_folder)
    diffes.apply(pipe, TWO_CALLS)
    mine = pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.replaces.config)
    diffes.apply(pipe, TWO_CALLS)
    diffes.remove(pipe)
    assert pipe.scheduler is mine


@pytest.mark.parametrize("before", [False, True])
def test_an_apply_that_is_interrupted_leaves_what_was(
    before: bool, any_run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the last layer is routed, as by Ctrl-C."""
    pipe = open_pipe(tiny_model)
    if before:
        diffes.apply(pipe, any_run)
    own, made = pipe.scheduler, images(pipe)

    def stop(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(apply_module, "put_scheduler", stop)
    with pytest.raises(KeyboardInterrupt):
        diffes.apply(pipe, TWO_CALLS)
    assert pipe.scheduler is own and np.array_equal(images(pipe), made)
    if before:
        diffes.remove(pipe)
    with pytest.raises(DiffesError, match="no run is applied"):
        diffes.remove(pipe)
