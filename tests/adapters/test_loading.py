"""Models by name, folder or hub id, and the adapter of a pipeline's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionXLPipeline

from diffes.adapters import ADAPTERS, ModelAdapter, adapter_for, load_pipeline, pipeline_class, shipped_models
from diffes.adapters.dit import DiTAdapter
from diffes.errors import DiffesError
from diffes.files import SHIPPED


def test_shipped_pipelines_are_small_and_ready() -> None:
    assert shipped_models() == ["emoji-sdxl", "fashion-dit"]
    assert load_pipeline("fashion-dit").labels["Trouser"] == 1
    for name in shipped_models():
        assert not adapter_for(load_pipeline(name)).denoiser.training
        assert sum(path.stat().st_size for path in (SHIPPED / name).rglob("*.safetensors")) <= 16 * 2**20


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


def test_the_class_of_a_pipeline_is_read_without_loading_it(tiny_folder: Path, tmp_path: Path) -> None:
    assert pipeline_class(str(tiny_folder)) is DiTPipeline
    assert pipeline_class("emoji-sdxl") is StableDiffusionXLPipeline
    for content in ("{", "{}", '{"_class_name": "NoPipeline"}'):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(DiffesError, match="could not be read"):
            pipeline_class(str(tmp_path))


def test_a_folder_with_an_fp16_variant_only_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(tiny_folder), dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob("*/*.fp16.safetensors"))
    again = load_pipeline(str(tmp_path))
    assert torch.equal(again.transformer.proj_out_2.weight, pipe.transformer.proj_out_2.weight.float())


class Styled(DiTPipeline):  # type: ignore[misc]  # diffusers is not followed
    """A pipeline of somebody's own."""


class Finer(Styled):
    """One more step away."""


class Strange(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline of no known family."""

    def __init__(self, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)


class Empty(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline without a denoiser."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)


def as_pipeline(adapter: ModelAdapter, kind: Any) -> Any:
    return kind(**adapter.pipe.components)


def test_the_family_of_a_pipeline_is_known_by_its_class(tiny: ModelAdapter, tiny_sdxl: ModelAdapter) -> None:
    assert type(tiny) is DiTAdapter and type(tiny_sdxl).__name__ == "UNetAdapter"


def test_a_subclass_of_a_known_class_is_of_its_family(tiny: ModelAdapter) -> None:
    for kind in (Styled, Finer):
        adapter = adapter_for(as_pipeline(tiny, kind))
        assert type(adapter) is DiTAdapter
        assert adapter.blocks() == tiny.blocks()


def test_a_registered_adapter_is_found_and_the_nearest_class_decides(tiny: ModelAdapter) -> None:
    @ADAPTERS.register("Styled")
    class StyledAdapter(DiTAdapter):
        """Of pipelines of somebody's own."""

    try:
        for kind in (Styled, Finer):
            assert type(adapter_for(as_pipeline(tiny, kind))) is StyledAdapter
        assert type(adapter_for(tiny.pipe)) is DiTAdapter
    finally:
        ADAPTERS.unregister("Styled")
    assert type(adapter_for(as_pipeline(tiny, Styled))) is DiTAdapter


def test_an_unknown_class_has_no_layers_that_are_known(tiny: ModelAdapter) -> None:
    adapter = adapter_for(as_pipeline(tiny, Strange))
    assert type(adapter) is ModelAdapter and adapter.blocks() == [] and adapter.group_sets() == []
    with pytest.raises(DiffesError, match="no denoiser is found among the components of Empty"):
        _ = adapter_for(Empty(as_pipeline(tiny, DiTPipeline).vae)).denoiser
