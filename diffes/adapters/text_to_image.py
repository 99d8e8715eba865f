"""Text-to-image pipelines: prompts by split. Serves Stable Diffusion 3, PixArt, Sana and Flux as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from diffes.adapters.base import Condition, ModelAdapter, Split
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
    time_scale = 1.0
    null_first = True

    def blocks(self) -> list[str]:
        return known_blocks(self.denoiser)

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts by split."""
        own = Path(getattr(self.pipe.config, "_name_or_path", "")) / PROMPTS  # no path if built from parts in Python
        return read_prompts(own) if own.is_file() else default_prompts()

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
    """Adapter for `FluxPipeline`, whose denoiser is told a thousandth of the timestep and reads the guidance itself."""

    time_scale = 1e-3

    def rows_per_image(self, guidance: float) -> int:
        return 1
