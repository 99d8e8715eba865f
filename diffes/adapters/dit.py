"""Class-conditional diffusion transformers: `DiTPipeline` with `DiTTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor

from diffes.adapters.base import Condition, ModelAdapter, Probes, SamplingState, Split, unwrapped
from diffes.errors import DiffesError

NULL_CLASS = 1000  # class id that DiTPipeline passes for the unconditional branch of every model


class DiTAdapter(ModelAdapter):
    """Adapter for `diffusers.DiTPipeline`; conditions are class ids, the same for searches and reports."""

    pipe: DiTPipeline

    @property
    def denoiser(self) -> Any:
        return unwrapped(self.pipe.transformer)

    def blocks(self) -> list[str]:
        return [f"transformer_blocks.{i}" for i in range(len(self.denoiser.transformer_blocks))]

    def choices(self, split: Split) -> list[int]:
        """Return the ids of the pipeline's labels, or 0 to 999 where the pipeline has no labels."""
        return sorted(set(self.pipe.labels.values())) or list(range(NULL_CLASS))

    def label(self, condition: Condition) -> str:
        names = {class_id: name for name, class_id in self.pipe.labels.items()}
        return names.get(condition, str(condition))

    def start(self, probes: Probes, steps: int | Any, guidance: float) -> SamplingState:
        latents = probes.noise.to(self.device, self.dtype)
        return SamplingState(self.guided(guidance).rows(latents), self.ready(steps), 0)

    def predict(self, state: SamplingState, probes: Probes, guidance: float) -> tuple[Tensor, Tensor]:
        """Predict as `DiTPipeline.__call__` does (diffusers 0.42), with guidance on the noise channels only."""
        guided, scheduler = self.guided(guidance, probes), state.scheduler
        timestep = scheduler.timesteps[state.index]
        latents = scheduler.scale_model_input(guided.rows(state.latents[: len(probes)]), timestep)
        predicted = self.denoise_once(latents, timestep.expand(len(latents)), guided.conditions(probes.conditions))
        noise = predicted[:, : latents.shape[1]]  # more channels are a learned variance that no sampler here uses
        return guided.rows(guided.mixed(noise)), latents

    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        return state.latents.chunk(self.guided(guidance).branches)[0]

    def unscale(self, latents: Tensor) -> Tensor:
        return 1 / self.pipe.vae.config.scaling_factor * latents

    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        labels = torch.tensor([NULL_CLASS if c is None else c for c in conditions], device=self.device)
        return self.denoiser(latents, timestep=timesteps.to(self.device), class_labels=labels).sample

    def generate(
        self, conditions: Sequence[Condition], *, n_steps: int, guidance: float, generator: torch.Generator
    ) -> Tensor:
        known = self.choices("heldout")
        for class_id in conditions:
            if class_id not in known:
                raise DiffesError(f"classes must be in [{known[0]}, {known[-1]}], got {class_id!r}")
        images = self.pipe(
            list(conditions), guidance, generator=generator, num_inference_steps=n_steps, output_type="np"
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
