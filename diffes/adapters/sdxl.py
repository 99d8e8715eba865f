"""Text-to-image U-Nets of the SDXL kind: `StableDiffusionXLPipeline` with `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from diffes.adapters.base import Condition, unwrapped
from diffes.adapters.groups import UpLayerSet
from diffes.adapters.text_to_image import TextToImageAdapter
from diffes.adapters.unet import unet_layers


class SDXLAdapter(TextToImageAdapter):
    """Adapter for `diffusers.StableDiffusionXLPipeline`; conditions are prompts.

    Every transformer block has three group sets: the heads of its self-attention, the heads of its cross-attention and
    the GEGLU channels of its FFN. Widths differ inside one U-Net (SDXL: 10 heads of 640 channels, 20 of 1280), so a
    level is a fraction: under the equal allocation, level k of H = 20 removes k/20 of the heads and channels of every
    layer, rounded to whole heads where a layer has 10. Convolutions, time embeddings and projections stay dense.
    """

    pipe: StableDiffusionXLPipeline

    def unusual(self) -> list[str]:
        parts = {
            "a U-Net distilled with guidance (time_cond_proj_dim)": self.denoiser.config.time_cond_proj_dim,
            "an autoencoder with latents_mean": getattr(self.pipe.vae.config, "latents_mean", None),
        }
        return [name for name, there in parts.items() if there is not None]

    @property
    def denoiser(self) -> Any:
        return unwrapped(self.pipe.unet)

    def blocks(self) -> list[str]:
        order = ("down_blocks", "mid_block", "up_blocks")  # of the forward pass; modules are registered in another
        found = [path for path, module in self.denoiser.named_modules() if isinstance(module, BasicTransformerBlock)]
        return sorted(found, key=lambda path: order.index(path.split(".")[0]))

    def up_layers(self) -> UpLayerSet:
        return unet_layers(self.denoiser)

    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        embeds, pooled = self.embedded(conditions)
        side = self.denoiser.config.sample_size * self.pipe.vae_scale_factor
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=self.dtype, device=self.device)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), 6)}
        return self.denoiser(
            latents, timesteps.to(self.device), encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample

    @torch.no_grad()
    def embed(self, conditions: Sequence[Condition]) -> tuple[Tensor, Tensor]:
        """Return token embeddings (n, tokens, d) and pooled ones (n, p), with all prompts encoded together."""
        texts = [c for c in conditions if c is not None]
        embeds, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=texts or [""], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        given = torch.tensor([c is not None for c in conditions], device=self.device)
        rows = given.cumsum(0).sub(1).clamp_min(0)
        chosen = torch.where(given[:, None, None], embeds[rows], null[:1])
        chosen_pooled = torch.where(given[:, None], pooled[rows], null_pooled[:1])
        return chosen.to(self.dtype), chosen_pooled.to(self.dtype)
