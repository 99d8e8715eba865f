"""Text-to-image U-Nets of the SDXL kind: `StableDiffusionXLPipeline` with `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from diffes.adapters.base import Condition, ModelAdapter, Probes, SamplingState, Split, unwrapped
from diffes.errors import DiffesError
from diffes.prompts import PROMPTS, default_prompts, read_prompts

CACHED_TEXTS = 16  # batches of prompts whose embeddings are kept


class SDXLAdapter(ModelAdapter):
    """Adapter for `diffusers.StableDiffusionXLPipeline`; conditions are prompts.

    Every transformer block gives the heads of its self-attention, those of its cross-attention and the GEGLU channels
    of its FFN. Widths differ inside one U-Net (SDXL: 10 heads of 640 channels, 20 of 1280), so a level is a fraction:
    level k of H = 20 removes k/20 of the heads and channels of every layer, rounded to whole heads where a layer has
    10. Convolutions, time embeddings and projections stay dense.

    Prompts come from `prompts.json` in the pipeline's folder, else from those that diffes ships for models from a hub;
    searches, calibration and reports draw from disjoint ones.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    pipe: StableDiffusionXLPipeline

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        super().__init__(pipe)
        unusual = [
            name
            for name, there in (
                ("a U-Net distilled with guidance (time_cond_proj_dim)", self.denoiser.config.time_cond_proj_dim),
                ("an autoencoder with latents_mean", getattr(pipe.vae.config, "latents_mean", None)),
            )
            if there is not None
        ]
        if unusual:
            raise DiffesError(
                f"this SDXL pipeline has {' and '.join(unusual)}, which diffes does not know how to sample"
            )
        self._embedded: dict[tuple[Condition, ...], tuple[Tensor, Tensor]] = {}

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts by split."""
        own = Path(getattr(self.pipe.config, "_name_or_path", "")) / PROMPTS  # none where built from parts in Python
        return read_prompts(own) if own.is_file() else default_prompts()

    @property
    def denoiser(self) -> Any:
        return unwrapped(self.pipe.unet)

    def blocks(self) -> list[str]:
        order = ("down_blocks", "mid_block", "up_blocks")  # the forward's; modules are registered in another one
        found = [path for path, module in self.denoiser.named_modules() if isinstance(module, BasicTransformerBlock)]
        return sorted(found, key=lambda path: order.index(path.split(".")[0]))

    def choices(self, split: Split) -> list[str]:
        return self.prompts[split] or default_prompts()[split]  # calibration may be left out

    def label(self, condition: Condition) -> str:
        return str(condition)

    def use_prompts(self, path: Path) -> None:
        self.prompts = read_prompts(path)

    def start(self, probes: Probes, n_steps: int, guidance: float) -> SamplingState:
        scheduler = self.fresh_scheduler(n_steps)
        return SamplingState(probes.noise.to(self.device, self.dtype) * scheduler.init_noise_sigma, scheduler, 0)

    def step(self, state: SamplingState, probes: Probes, guidance: float) -> SamplingState:
        """One step as `StableDiffusionXLPipeline.__call__` takes it (diffusers 0.42)."""
        latents, scheduler = state.latents, state.scheduler
        timestep = scheduler.timesteps[state.index]
        conditions = (None,) * len(probes) + probes.conditions if guidance > 1 else probes.conditions
        doubled = torch.cat([latents] * 2) if guidance > 1 else latents
        noise = self.denoise_once(scheduler.scale_model_input(doubled, timestep), timestep, conditions)
        if guidance > 1:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance * (conditional - unconditional)
        return self.advance(state, noise, timestep, latents)

    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        return state.latents

    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        embeds, pooled = self._embed(tuple(conditions))
        side = self.denoiser.config.sample_size * self.pipe.vae_scale_factor
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=self.dtype, device=self.device)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), 6)}
        return self.denoiser(
            latents, timesteps.to(self.device), encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample

    def generate(
        self, conditions: Sequence[Condition], *, n_steps: int, guidance: float, generator: torch.Generator
    ) -> Tensor:
        for prompt in conditions:
            if not isinstance(prompt, str) or not prompt:
                raise DiffesError(f"{self.pipeline_class} takes prompts, texts that are not empty; got {prompt!r}")
        images = self.pipe(
            list(conditions), guidance_scale=guidance, generator=generator, num_inference_steps=n_steps,
            output_type="pt",
        ).images  # fmt: skip
        return images.float().cpu()

    @torch.no_grad()
    def _embed(self, conditions: tuple[Condition, ...]) -> tuple[Tensor, Tensor]:
        """Token embeddings (n, tokens, d) and pooled ones (n, p); None becomes the pipeline's null condition.

        Prompts are encoded by the pipeline, all of one batch together, and kept: every step of every evaluation of a
        batch of probes asks for the same ones.
        """
        if conditions not in self._embedded:
            texts = [c for c in conditions if c is not None]
            embeds, null, pooled, null_pooled = self.pipe.encode_prompt(
                prompt=texts or [""], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            given = torch.tensor([c is not None for c in conditions], device=self.device)
            rows = given.cumsum(0).sub(1).clamp_min(0)
            chosen = torch.where(given[:, None, None], embeds[rows], null[:1])
            chosen_pooled = torch.where(given[:, None], pooled[rows], null_pooled[:1])
            while len(self._embedded) >= CACHED_TEXTS:
                self._embedded.pop(next(iter(self._embedded)))
            self._embedded[conditions] = chosen.to(self.dtype), chosen_pooled.to(self.dtype)
        return self._embedded[conditions]
