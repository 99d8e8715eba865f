"""apply, remove, load and export: a run inside diffusers, out of it again, and on another machine."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import build_bank, open_adapter
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
from diffes import folder
from diffes.adapters import ModelAdapter, adapter_for
from diffes.cli import main
from diffes.errors import DiffesError
from diffes.export import CARD, export
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan

SCHEDULERS = [
    DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler,
]  # fmt: skip
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
_RUNS: dict[tuple[str, str], Path] = {}


def make_run(tmp_path_factory: pytest.TempPathFactory, model: Path, method: str) -> Path:
    """A finished run, made once a session."""
    key = (str(model), method)
    if key not in _RUNS:
        _RUNS[key] = tmp_path_factory.mktemp("runs") / f"{model.name}-{method}"
        main([
            "search", "--model", str(model), "--method", method, "--stages", "4", "--steps", "8", "--max-evals", "6",
            "--probes", "4", "--heldout", "4", "--metric", "latent_mse", "--out", str(_RUNS[key]),
        ])  # fmt: skip
    return _RUNS[key]


@pytest.fixture
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the untrained DiT."""
    return make_run(tmp_path_factory, tiny_folder, "obs")


@pytest.fixture(params=["tiny_folder", "tiny_sdxl_folder"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["obs", "layer_drop"])
def any_run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind on the untrained pipeline of each family."""
    return make_run(tmp_path_factory, tiny_model, request.param)


def images(pipe: DiffusionPipeline, steps: int = 8, guidance: float = 2.0) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    conditions = [0, 3] if isinstance(pipe, DiTPipeline) else ["h a", "h c"]
    options = {"generator": torch.Generator().manual_seed(5), "num_inference_steps": steps, "output_type": "np"}
    return pipe(conditions, guidance_scale=guidance, **options).images


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
    schedule, facts = folder.read_schedule(run)
    kept = []
    groups = adapter.group_sets()[0]
    consumer = adapter.denoiser.get_submodule(groups.consumer)

    def look(_module: object, args: tuple, kwargs: dict, _out: object) -> None:  # type: ignore[type-arg]
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
        level = schedule.levels[schedule.plan.stage_of(timestep)]
        if facts["kind"] == "depth":
            assert blocks == schedule.max_level - level
        else:
            assert width == groups.n_kept(level, schedule.max_level) * groups.size
    return pruned


def test_one_schedule_serves_all_samplers_with_and_without_guidance(any_run: Path, tiny_model: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    for scheduler, guidance in itertools.product(SCHEDULERS, [1.0, 3.0]):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        dense = images(pipe, 10, guidance)
        assert not np.array_equal(check_routing(pipe, any_run, 10, guidance), dense)
        np.testing.assert_array_equal(images(pipe, 10, guidance), dense)


def test_one_schedule_serves_all_numbers_of_steps(any_run: Path, tiny_model: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    for steps in (20, 25, 50):
        check_routing(pipe, any_run, steps, 3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(any_run: Path, tiny_model: Path, dtype: torch.dtype) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model, dtype=dtype)
    before = images(pipe)
    diffes.apply(pipe, any_run)
    pruned = images(pipe)
    assert np.isfinite(pruned).all() and not np.array_equal(pruned, before)
    full = diffes.apply(DiffusionPipeline.from_pretrained(tiny_model), any_run)
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


def test_a_lora_is_pruned_with_its_layers(untrained: ModelAdapter, plan: StagePlan) -> None:
    """The oracle: the same LoRA merged into the dense weights, pruned with the same kept groups."""
    bank = build_bank(untrained, "magnitude", plan)
    probes = untrained.make_probes(2, 0)
    plain = untrained.sample(probes, 4, 2.0)
    schedule = Schedule(plan, (1, 2, 1, 3), untrained.max_level("width"))
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


def test_a_lora_of_diffusers_is_loaded_before_apply_not_after(
    tiny_sdxl_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = make_run(tmp_path_factory, tiny_sdxl_folder, "obs")
    source = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    add_lora(adapter_for(source))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(source.unet))
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    without = images(diffes.apply(pipe, run))
    diffes.remove(pipe)
    diffes.apply(pipe, run)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(DiffesError, match="a LoRA loaded, fused or unloaded"):
        images(pipe)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    pipe.load_lora_weights(tmp_path)
    dense = images(pipe)
    pruned = images(diffes.apply(pipe, run))
    assert np.isfinite(pruned).all() and not np.array_equal(pruned, without) and not np.array_equal(pruned, dense)
    pipe.fuse_lora()
    with pytest.raises(DiffesError, match="a LoRA loaded, fused or unloaded"):
        images(pipe)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    pipe.load_lora_weights(tmp_path)
    diffes.remove(diffes.apply(pipe, run))
    np.testing.assert_array_equal(images(pipe), dense)
    pipe.fuse_lora()
    with pytest.raises(DiffesError, match=r"fused|another model"):
        diffes.apply(pipe, run)


def test_adapters_that_cannot_be_cut_are_refused(untrained: ModelAdapter, plan: StagePlan) -> None:
    bank = build_bank(untrained, "magnitude", plan)
    peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=LAYERS), untrained.denoiser)
    with pytest.raises(DiffesError, match="no plain LoRA"):
        Router(untrained, bank)


def test_what_is_saved_while_applied_is_the_dense_model(any_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    dense = images(pipe)
    pruned = images(diffes.apply(pipe, any_run))
    pipe.save_pretrained(tmp_path)
    np.testing.assert_array_equal(images(pipe), pruned)
    np.testing.assert_array_equal(images(DiffusionPipeline.from_pretrained(tmp_path)), dense)


def test_a_pipeline_moved_while_applied_is_whole_again_after_remove(any_run: Path, tiny_model: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    images(diffes.apply(pipe, any_run))
    pipe.to(torch.float64)
    diffes.remove(pipe)
    assert {p.dtype for p in adapter_for(pipe).denoiser.parameters()} == {torch.float64}
    untouched = DiffusionPipeline.from_pretrained(tiny_model).to(torch.float64)
    np.testing.assert_array_equal(images(pipe), images(untouched))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "in_place"), [("obs", True), ("layer_drop", False)])
def test_compile_after_apply(
    tiny_model: Path, method: str, in_place: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Traced by dynamo and run as it was traced: same numbers, and still routed."""
    torch.compiler.reset()
    any_run = make_run(tmp_path_factory, tiny_model, method)
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
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


def test_offloaded_pipelines_are_refused(any_run: Path, tiny_model: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
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


SAMPLE = """
import sys, numpy, torch, diffes
for name in sys.argv[1:]:
    pipe = diffes.load(name)
    pipe.set_progress_bar_config(disable=True)
    conditions = [0, 3] if hasattr(pipe, "transformer") else ["h a", "h c"]
    options = dict(generator=torch.Generator().manual_seed(5), num_inference_steps=8, output_type="np")
    numpy.save(name + ".npy", pipe(conditions, guidance_scale=2.0, **options).images)
"""


@pytest.mark.slow
def test_exported_and_loaded_in_another_process_gives_the_same_bits(
    tiny_folder: Path, tiny_sdxl_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = {}
    for model in (tiny_folder, tiny_sdxl_folder):
        for method in ("obs", "layer_drop"):
            run = make_run(tmp_path_factory, model, method)
            name = f"{model.name}-{method}"
            expected[name] = images(diffes.apply(DiffusionPipeline.from_pretrained(model), run))
            np.testing.assert_array_equal(images(diffes.load(run)), expected[name])
            main(["export", str(run), str(tmp_path / "mine" / name)])
            out = (tmp_path / "mine" / name).rename(tmp_path / name)
            card = (out / CARD).read_text()
            report = json.loads((run / folder.REPORT).read_text())
            assert f"{report['fitness']['heldout_mean']:.4f}" in card
            for path in (CARD, folder.SCHEDULE, folder.BANK):
                assert str(model).encode() not in (out / path).read_bytes()
    subprocess.run([sys.executable, "-c", SAMPLE, *expected], check=True, cwd=tmp_path, env=os.environ)
    for name, pixels in expected.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), pixels)


def test_a_shipped_model_is_exported_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main([
        "search", "--stages", "2", "--steps", "4", "--max-evals", "2", "--probes", "2", "--heldout", "2", "--metric",
        "latent_mse", "--calibration-samples", "16", "--out", str(run),
    ])  # fmt: skip
    export(run, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / folder.BASE).exists()
    assert json.loads((tmp_path / "out" / folder.SCHEDULE).read_text())["model"] == "fashion-dit"
    full, half = ((at / folder.BANK).stat().st_size for at in (run, tmp_path / "out"))
    assert half < 0.6 * full
    assert np.isfinite(images(diffes.load(tmp_path / "out"), 4)).all()


def test_export_overwrites_nothing_but_exports(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(DiffesError, match="name another folder"):
            export(run, out, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]
    export(run, tmp_path / "good")
    before = (tmp_path / "good" / folder.BANK).read_bytes()
    with pytest.raises(DiffesError, match="--overwrite"):
        export(run, tmp_path / "good")
    export(run, tmp_path / "good", dtype="float16", overwrite=True)
    assert (tmp_path / "good" / folder.BANK).read_bytes() != before
    with pytest.raises(DiffesError, match="cannot write"):
        export(run, Path("/proc/nowhere"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "out"]


def altered(run: Path, tmp_path: Path, name: str, change) -> Path:  # type: ignore[no-untyped-def]
    copy = tmp_path / "altered"
    shutil.copytree(run, copy)
    change(copy / name)
    return copy


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
        (folder.SCHEDULE, edit_levels, "was altered"),
        (folder.SCHEDULE, truncate, "is damaged"),
        (folder.SCHEDULE, Path.unlink, "unfinished"),
        (folder.BANK, flip_a_byte, "truncated or altered"),
        (folder.BANK, truncate, "truncated or altered"),
        (folder.BANK, Path.unlink, "is missing"),
    ],
)
def test_damaged_runs_are_refused_and_leave_the_pipeline_alone(
    run: Path, tiny_folder: Path, tmp_path: Path, name: str, change, message: str
) -> None:  # type: ignore[no-untyped-def]
    damaged = altered(run, tmp_path, name, change)
    pipe = DiTPipeline.from_pretrained(tiny_folder)
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
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl_folder)
    with pytest.raises(DiffesError, match="another model"):
        diffes.apply(pipe, run)


def test_an_unfinished_run_is_not_exported(run: Path, tmp_path: Path) -> None:
    unfinished = altered(run, tmp_path, folder.REPORT, Path.unlink)
    with pytest.raises(DiffesError, match="unfinished"):
        export(unfinished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    pipe = DiTPipeline.from_pretrained(tiny_folder)
    with pytest.raises(DiffesError, match="no run folder"):
        diffes.apply(pipe, tmp_path)
    with pytest.raises(DiffesError, match="no folder"):
        diffes.apply(pipe, tmp_path / "nothing")
