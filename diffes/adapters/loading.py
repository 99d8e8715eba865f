"""Loading of a pipeline by name, folder or hub id, and the choice of its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffes.adapters.base import ModelAdapter
from diffes.errors import DiffesError, unknown_name
from diffes.files import SHIPPED, shipped_models
from diffes.plugins import guarded
from diffes.registry import Registry

ADAPTERS: Registry[type[ModelAdapter]] = Registry("pipeline class", "diffes.adapters", ModelAdapter)


def model_folder(model: str) -> Path | None:
    """Return the folder of a shipped name or local path; None for a name that must be a hub id.

    Raises:
        DiffesError: it is a folder without a pipeline in it, or neither a known name nor of the form of a hub id.
    """
    if model in shipped_models():
        return SHIPPED / model
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise DiffesError(
                f"the folder {model} has no model_index.json, so it is not a pipeline: give a folder that diffusers' "
                "save_pretrained wrote"
            )
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise unknown_name("model", model, [*shipped_models(), "a folder in diffusers' format", "a hub id OWNER/NAME"])
    return None


def load_pipeline(model: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a pipeline.

    Args:
        model: a shipped name, a local folder in diffusers' format, or a hub id (the one case that may download).
        device: "cpu", "cuda", "cuda:1".
        dtype: of all weights.

    Raises:
        DiffesError: there is no such model, or it does not load.
    """
    folder = model_folder(model)
    try:
        with _quiet(diffusers_logging), _quiet(transformers_logging):
            parts = DiffusionPipeline.load_config(folder or model)
            left_out = {name: None for name, part in parts.items() if part in ([None, None], (None, None))}
            options: dict[str, Any] = {} if folder is None or not _is_fp16(folder) else {"variant": "fp16"}
            pipe = DiffusionPipeline.from_pretrained(str(folder or model), dtype=dtype, **left_out, **options)
        return pipe.to(device)
    except Exception as error:  # safetensors, hub clients and torch each raise their own classes here
        reason = " ".join(str(error).split())[:300]
        raise DiffesError(f"{model!r} could not be loaded on {device}: {type(error).__name__}: {reason}") from error


def _is_fp16(folder: Path) -> bool:
    """Return True where a folder holds an fp16 variant of its weights and no others."""
    names = [path.name for path in folder.glob("*/*.safetensors")]
    return bool(names) and all(".fp16." in name for name in names)


def pipeline_class(model: str) -> type[DiffusionPipeline]:
    """Return the class of a pipeline, from its `model_index.json` alone; for a hub id that file may be downloaded.

    Raises:
        DiffesError: there is no such model, or its class is none of diffusers.
    """
    folder = model_folder(model)
    try:
        found: type[DiffusionPipeline] = getattr(
            diffusers, DiffusionPipeline.load_config(folder or model)["_class_name"]
        )
    except Exception as error:  # hub clients raise their own classes here
        raise DiffesError(f"{model!r} could not be read: {type(error).__name__}: {error}") from error
    return found


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Hide a library's progress bars and warnings while it loads; downloads still show theirs."""
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def adapter_for(pipe: DiffusionPipeline) -> ModelAdapter:
    """Return the adapter of a pipeline's family: that of its class, or of the nearest base class that has one. Other
    pipelines get `ModelAdapter`, which is enough for plans of dense calls."""
    known = ADAPTERS.names()
    for cls in type(pipe).__mro__:
        if cls.__name__ in known:
            found = ADAPTERS.get(cls.__name__)
            with guarded(found, f"adapter {found.__qualname__}", "take a pipeline"):
                return found(pipe)
    return ModelAdapter(pipe)
