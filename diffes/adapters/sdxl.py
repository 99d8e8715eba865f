"""Text-to-image U-Nets: Stable Diffusion 1 and 2, and SDXL, with `UNet2DConditionModel`."""

from __future__ import annotations

from diffusers.models.resnet import ResnetBlock2D

from diffes.adapters.blocks import known_blocks
from diffes.adapters.convolutions import resnet_channels
from diffes.adapters.groups import GroupSet, UpLayerSet
from diffes.adapters.text_to_image import TextToImageAdapter
from diffes.adapters.unet import unet_layers


class UNetAdapter(TextToImageAdapter):
    """Adapter for `StableDiffusionPipeline`, `StableDiffusionXLPipeline` and their relatives; conditions are prompts.

    Every transformer block has three group sets: the heads of its self-attention, the heads of its cross-attention and
    the GEGLU channels of its FFN. Every ResNet block has one: the channels between its convolutions. Widths differ
    inside one U-Net (SDXL: 10 heads of 640 channels, 20 of 1280), so a level is a fraction: under the equal allocation,
    level k of H = 20 removes k/20 of the groups of every layer, rounded to whole heads where a layer has 10. Time
    embeddings, projections, and the convolutions between blocks stay dense.
    """

    def rows_per_image(self, guidance: float) -> int:
        distilled = self.denoiser.config.time_cond_proj_dim is not None  # reads the scale, and is called once
        return 1 if distilled else super().rows_per_image(guidance)

    def blocks(self) -> list[str]:
        return sorted(known_blocks(self.denoiser), key=_place)

    def group_sets(self) -> list[GroupSet]:
        """Return the heads and FFN channels of every block, then the channels of every ResNet block, both in the order
        of the forward pass."""
        resnets = {path: each for path, each in self.denoiser.named_modules() if isinstance(each, ResnetBlock2D)}
        found = (resnet_channels(path, resnets[path]) for path in sorted(resnets, key=_place))
        return [*super().group_sets(), *(each for each in found if each is not None)]

    def up_layers(self) -> UpLayerSet:
        return unet_layers(self.denoiser)


def _place(path: str) -> int:
    """Return the place of a module's path of the U-Net in the forward pass; modules are registered in another order."""
    return ("down_blocks", "mid_block", "up_blocks").index(path.split(".")[0])
