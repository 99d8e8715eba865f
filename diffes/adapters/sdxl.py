"""Text-to-image U-Nets: Stable Diffusion 1 and 2, and SDXL, with `UNet2DConditionModel`."""

from __future__ import annotations

from diffes.adapters.blocks import known_blocks
from diffes.adapters.groups import UpLayerSet
from diffes.adapters.text_to_image import TextToImageAdapter
from diffes.adapters.unet import unet_layers


class UNetAdapter(TextToImageAdapter):
    """Adapter for `StableDiffusionPipeline`, `StableDiffusionXLPipeline` and their relatives; conditions are prompts.

    Every transformer block has three group sets: the heads of its self-attention, the heads of its cross-attention and
    the GEGLU channels of its FFN. Widths differ inside one U-Net (SDXL: 10 heads of 640 channels, 20 of 1280), so a
    level is a fraction: under the equal allocation, level k of H = 20 removes k/20 of the heads and channels of every
    layer, rounded to whole heads where a layer has 10. Convolutions, time embeddings and projections stay dense.
    """

    def rows_per_image(self, guidance: float) -> int:
        distilled = self.denoiser.config.time_cond_proj_dim is not None  # reads the scale, and is called once
        return 1 if distilled else super().rows_per_image(guidance)

    def blocks(self) -> list[str]:
        order = ("down_blocks", "mid_block", "up_blocks")  # of the forward pass; modules are registered in another
        return sorted(known_blocks(self.denoiser), key=lambda path: order.index(path.split(".")[0]))

    def up_layers(self) -> UpLayerSet:
        return unet_layers(self.denoiser)
