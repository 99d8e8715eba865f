"""Class-conditional diffusion transformers: `DiTPipeline` with `DiTTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor

from diffes.adapters.base import GroupSet, ModelAdapter, Probes, SamplingState
from diffes.errors import DiffesError

NULL_CLASS = 1000  # what DiTPipeline passes for the unconditional branch, whatever the model


class DiTAdapter(ModelAdapter):
    """Adapter for `diffusers.DiTPipeline`; every block gives one set of heads and one set of FFN channels."""

    pipeline_class = "DiTPipeline"
    pipe: DiTPipeline

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def max_level(self) -> int:
        return int(self.denoiser.config.num_attention_heads)

    def group_sets(self) -> list[GroupSet]:
        sets = []
        for i, block in enumerate(self.denoiser.transformer_blocks):
            attention, ffn = f"transformer_blocks.{i}.attn1", f"transformer_blocks.{i}.ff"
            heads = block.attn1.heads
            sets.append(
                GroupSet(
                    name=attention,
                    kind="heads",
                    n_groups=heads,
                    size=block.attn1.to_out[0].weight.shape[1] // heads,
                    producers=tuple(f"{attention}.{part}" for part in ("to_q", "to_k", "to_v")),
                    consumer=f"{attention}.to_out.0",
                )
            )
            channels = block.ff.net[2].weight.shape[1]
            if block.ff.net[0].proj.weight.shape[0] != channels:
                raise DiffesError(
                    f"the FFN activation {type(block.ff.net[0]).__name__} of {ffn} is gated; DiT models with plain "
                    "activations (gelu, gelu-approximate) are supported"
                )
            sets.append(GroupSet(ffn, "channels", channels, 1, (f"{ffn}.net.0.proj",), f"{ffn}.net.2"))
        return sets

    def timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)

    def class_ids(self) -> list[int]:
        """Ids of the pipeline's own labels, or all the model has where the pipeline carries no labels."""
        return sorted(set(self.pipe.labels.values())) or list(range(NULL_CLASS))

    def make_probes(self, n: int, seed: int) -> Probes:
        ids = self.class_ids()
        config = self.denoiser.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + i)) for i in range(n)]
        )
        turns = [torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed * 100_003 + turn))
                 for turn in range(n // len(ids) + 1)]  # fmt: skip
        return Probes(noise, torch.tensor(ids)[torch.cat(turns)[:n]])

    def start(self, probes: Probes, n_steps: int, guidance: float) -> SamplingState:
        latents = probes.noise.to(self.device, self.dtype)
        return SamplingState(torch.cat([latents] * 2) if guidance > 1 else latents, self.fresh_scheduler(n_steps), 0)

    def step(self, state: SamplingState, probes: Probes, guidance: float) -> SamplingState:
        """One step as `DiTPipeline.__call__` takes it (diffusers 0.42), guidance on the noise channels only."""
        latents, scheduler = state.latents, state.scheduler
        channels = self.denoiser.config.in_channels
        timestep = scheduler.timesteps[state.index]
        condition = probes.condition
        if guidance > 1:
            half = latents[: len(probes)]
            latents = torch.cat([half, half])
            condition = torch.cat([condition, self.null_condition(len(probes))])
        latents = scheduler.scale_model_input(latents, timestep)
        predicted = self.denoise_once(latents, timestep.expand(len(latents)), condition)
        noise = predicted[:, :channels]  # the rest, where there is any, is a learned variance that no sampler here uses
        if guidance > 1:
            conditional, unconditional = noise.chunk(2)
            mixed = unconditional + guidance * (conditional - unconditional)
            noise = torch.cat([mixed, mixed])
        return SamplingState(scheduler.step(noise, timestep, latents).prev_sample, scheduler, state.index + 1)

    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        return state.latents.chunk(2)[0] if guidance > 1 else state.latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        samples = vae.decode(1 / vae.config.scaling_factor * latents.to(vae.dtype)).sample
        return (samples / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        encoded = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mean
        return (encoded * vae.config.scaling_factor).to(self.dtype)

    def denoise_once(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return self.denoiser(latents, timestep=timesteps.to(self.device), class_labels=condition.to(self.device)).sample

    def null_condition(self, n: int) -> Tensor:
        return torch.full((n,), NULL_CLASS)
