"""Class-conditional diffusion transformers: `DiTPipeline` with `DiTTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiTPipeline

from diffes.adapters.base import Condition, ModelAdapter, Split
from diffes.adapters.blocks import known_blocks
from diffes.errors import DiffesError

NULL_CLASS = 1000  # class id that DiTPipeline passes for the unconditional branch of every model


class DiTAdapter(ModelAdapter):
    """Adapter for `diffusers.DiTPipeline`; conditions are class ids, the same for searches and reports."""

    pipe: DiTPipeline
    argument = "class_labels"
    lists = True
    merges = True
    time_scale = 1.0

    def blocks(self) -> list[str]:
        return known_blocks(self.denoiser)

    def choices(self, split: Split) -> list[int]:
        """Return the ids of the pipeline's labels, or 0 to 999 where the pipeline has no labels."""
        return sorted(set(self.pipe.labels.values())) or list(range(NULL_CLASS))

    def label(self, condition: Condition) -> str:
        names = {class_id: name for name, class_id in self.pipe.labels.items()}
        return names.get(condition, str(condition))

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        known = self.choices("heldout")
        for class_id in conditions:
            if class_id not in known:
                raise DiffesError(f"classes must be in [{known[0]}, {known[-1]}], got {class_id!r}")
