"""Base of text-to-image adapters: prompts, guidance as diffusers does it, and cached embeddings."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffes.adapters.base import Condition, ModelAdapter, Probes, SamplingState, Split
from diffes.adapters.prompts import PROMPTS, default_prompts, read_prompts
from diffes.errors import DiffesError

CACHED_TEXTS = 16  # batches of prompts whose embeddings are kept


class TextToImageAdapter(ModelAdapter):
    """Base of adapters whose conditions are prompts.

    Prompts come from `prompts.json` in the pipeline's folder, or else, for models from a hub, from those that ship with
    diffes. Searches, calibration and reports draw from disjoint prompts. A subclass names the blocks, encodes prompts
    and calls the denoiser.
    """

    null_first = True

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self._embedded: dict[tuple[Condition, ...], tuple[Tensor, ...]] = {}

    @abc.abstractmethod
    def embed(self, conditions: Sequence[Condition]) -> tuple[Tensor, ...]:
        """Return the embeddings of prompts, each (n, ...), that the denoiser reads. None is the null condition."""

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts by split."""
        own = Path(getattr(self.pipe.config, "_name_or_path", "")) / PROMPTS  # no path if built from parts in Python
        return read_prompts(own) if own.is_file() else default_prompts()

    def choices(self, split: Split) -> list[str]:
        return self.prompts[split] or default_prompts()[split]  # calibration may be left out

    def label(self, condition: Condition) -> str:
        return str(condition)

    def use_prompts(self, path: Path) -> None:
        self.prompts = read_prompts(path)

    def start(self, probes: Probes, steps: int | Any, guidance: float) -> SamplingState:
        scheduler = self.ready(steps)
        return SamplingState(probes.noise.to(self.device, self.dtype) * scheduler.init_noise_sigma, scheduler, 0)

    def predict(self, state: SamplingState, probes: Probes, guidance: float) -> tuple[Tensor, Tensor]:
        """Predict as `StableDiffusionXLPipeline.__call__` does (diffusers 0.42)."""
        guided, scheduler = self.guided(guidance, probes), state.scheduler
        timestep = scheduler.timesteps[state.index]
        inputs = scheduler.scale_model_input(guided.rows(state.latents), timestep)
        noise = self.denoise_once(inputs, timestep, guided.conditions(probes.conditions))
        return guided.mixed(noise), state.latents

    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        return state.latents

    def generate(
        self, conditions: Sequence[Condition], *, n_steps: int, guidance: float, generator: torch.Generator
    ) -> Tensor:
        for prompt in conditions:
            if not isinstance(prompt, str) or not prompt:
                raise DiffesError(f"{type(self.pipe).__name__} takes prompts, and none may be empty, got {prompt!r}")
        pipe: Any = self.pipe
        images = pipe(
            list(conditions), guidance_scale=guidance, generator=generator, num_inference_steps=n_steps,
            output_type="pt",
        ).images  # fmt: skip
        return images.float().cpu()

    def embedded(self, conditions: Sequence[Condition]) -> tuple[Tensor, ...]:
        """Return the result of `embed`, cached, because every step of an evaluation asks for the same prompts."""
        key = tuple(conditions)
        if key not in self._embedded:
            while len(self._embedded) >= CACHED_TEXTS:
                self._embedded.pop(next(iter(self._embedded)))
            self._embedded[key] = self.embed(key)
        return self._embedded[key]
