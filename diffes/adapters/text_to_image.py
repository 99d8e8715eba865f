"""Text-to-image and text-to-video pipelines: prompts by split. Serves Stable Diffusion 3, PixArt, Sana, LTX and
CogVideoX as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from diffes.adapters.base import Condition, ModelAdapter, Probes, Split
from diffes.adapters.blocks import known_blocks
from diffes.adapters.prompts import PROMPTS, default_prompts, read_prompts
from diffes.errors import DiffesError


class TextToImageAdapter(ModelAdapter):
    """Adapter for pipelines whose conditions are prompts.


    Prompts come from the call that the adapter was given, from `prompts.json` in the pipeline's folder, or else, for
    models from a hub, from those that ship with diffes. Searches, calibration and reports draw from disjoint prompts.
    Blocks are those of a known class, and the order is that of the network.
    """

    argument = "prompt"
    lists = True
    merges = True
    time_scale = 1.0
    null_first = True

    def blocks(self) -> list[str]:
        return known_blocks(self.denoiser)

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts by split."""
        own = None if self.folder is None else self.folder / PROMPTS
        return read_prompts(own) if own is not None and own.is_file() else default_prompts()

    def choices(self, split: Split) -> Sequence[Condition]:
        if "prompt" in self.call:
            return super().choices(split)
        return self.prompts[split] or default_prompts()[split]  # calibration may be left out

    def use_prompts(self, path: Path) -> None:
        self.prompts = read_prompts(path)

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for prompt in conditions:
            if not isinstance(prompt, str) or not prompt:
                raise DiffesError(f"{type(self.pipe).__name__} takes prompts, and none may be empty, got {prompt!r}")


class FluxAdapter(TextToImageAdapter):
    """Adapter for `FluxPipeline` and `QwenImagePipeline`, whose denoisers are told a thousandth of the timestep. Flux
    reads the guidance itself; calls for a negative prompt are made apart, where `true_cfg_scale` of the call is set."""

    merges = False
    time_scale = 1e-3


class VideoAdapter(TextToImageAdapter):
    """Adapter for `WanPipeline` and `HunyuanVideoPipeline`, which call for a negative prompt apart."""

    merges = False


class ZImageAdapter(TextToImageAdapter):
    """Adapter for `ZImagePipeline`, whose denoiser takes lists, is told a time that rises from 0 to 1, and predicts the
    negative of the velocity. Every scale above 0 guides."""

    merges = False
    unguided = 0.0
    time_scale = -1e-3
    time_origin = 1.0

    def noise(self, probes: Probes) -> Tensor:
        return super().noise(probes).squeeze(2)  # the pipeline adds an axis for one frame

    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        return -super().denoise_once(latents.unsqueeze(2), timesteps, conditions).squeeze(2)
