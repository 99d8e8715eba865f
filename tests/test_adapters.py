from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffes.adapters import ModelAdapter, Probes, adapter_for, load_pipeline, shipped_models
from diffes.errors import DiffesError


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_own_sampling_loop_equals_the_pipeline(adapter: ModelAdapter, guidance: float, scheduler: type) -> None:
    adapter.pipe.scheduler = scheduler.from_config(adapter.pipe.scheduler.config)
    config = adapter.denoiser.config
    shape = (3, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    probes = Probes(noise, torch.tensor([0, 3, 5]))
    ours = adapter.decode(adapter.sample(probes, 6, guidance)).permute(0, 2, 3, 1).numpy()
    theirs = adapter.pipe(
        [0, 3, 5], guidance, torch.Generator().manual_seed(7), num_inference_steps=6, output_type="np"
    ).images
    np.testing.assert_array_equal(ours, theirs)


def test_group_sets_cover_every_block(adapter: ModelAdapter) -> None:
    sets = adapter.group_sets()
    assert len(sets) == 2 * adapter.denoiser.config.num_layers
    for groups in sets:
        consumer = adapter.denoiser.get_submodule(groups.consumer)
        assert consumer.in_features == groups.n_groups * groups.size
        for producer in groups.producers:
            assert adapter.denoiser.get_submodule(producer).out_features == consumer.in_features
    heads = [groups.n_groups for groups in sets if groups.kind == "heads"]
    assert set(heads) == {adapter.max_level}


def test_probe_i_depends_on_seed_and_i_alone(adapter: ModelAdapter) -> None:
    few, many, other = adapter.make_probes(5, 1), adapter.make_probes(12, 1), adapter.make_probes(5, 2)
    assert torch.equal(few.noise, many.noise[:5]) and torch.equal(few.condition, many.condition[:5])
    assert not torch.equal(few.noise, other.noise)
    assert set(many.condition.tolist()) <= set(adapter.class_ids())


def test_conditions_are_balanced(adapter: ModelAdapter) -> None:
    ids = adapter.class_ids()
    counts = torch.bincount(adapter.make_probes(2 * len(ids), 0).condition)
    assert counts[ids].tolist() == [2] * len(ids)


def test_encode_undoes_decode_on_the_shipped_pipeline() -> None:
    adapter = adapter_for(load_pipeline("fashion-dit"))
    with np.load(Path(adapter.pipe.config._name_or_path) / "calibration.npz") as data:
        images = torch.from_numpy(data["images"][:32]).float() / 255
        assert data["images"].shape == (1024, 1, 32, 32) and set(data["labels"]) == set(range(10))
    assert (adapter.decode(adapter.encode(images)) - images).abs().mean() < 0.05


def test_shipped_pipelines_are_small_and_labelled() -> None:
    assert "fashion-dit" in shipped_models()
    pipe = load_pipeline("fashion-dit")
    assert pipe.labels["Trouser"] == 1 and len(pipe.labels) == 10
    assert not pipe.transformer.training
    weights = Path(pipe.config._name_or_path).rglob("*.safetensors")
    assert sum(path.stat().st_size for path in weights) <= 16 * 2**20


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("fashion-dti", "fashion-dit"),
        ("/no/such/folder", "unknown model"),
        ("EMPTY", "no model_index.json"),
        ("DAMAGED", "could not be loaded"),
    ],
)
def test_unusable_models_are_refused(model: str, message: str, tmp_path: Path, tiny_folder: Path) -> None:
    if model == "EMPTY":
        model = str(tmp_path)
    elif model == "DAMAGED":
        for path in tiny_folder.rglob("*"):
            target = tmp_path / path.relative_to(tiny_folder)
            if path.is_dir():
                target.mkdir()
            else:
                content = path.read_bytes()
                target.write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
        model = str(tmp_path)
    with pytest.raises(DiffesError, match=message):
        load_pipeline(model)
