"""Classifier-free guidance: the branches of a denoiser call, and how they are mixed into one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance of denoiser calls on n images. A guided call has two branches of n rows each: one with
    the conditions of the images, one with the null condition. Without guidance a call has the first branch only.

    Args:
        scale: guidance scale; 1 and less switch guidance off.
        scales: n guidance scales, one an image, that replace `scale` where branches are mixed; None where all images
            have the same.
        null_first: whether the branch with the null condition comes first.

    Example:
        >>> import torch
        >>> guided = ClassifierFreeGuidance(3.0)
        >>> guided.branches, guided.conditions([7, 8])
        (2, (7, 8, None, None))
        >>> guided.mixed(torch.tensor([2.0, 5.0, 1.0, 5.0]))
        tensor([4., 5.])
        >>> ClassifierFreeGuidance(1.0).branches
        1
    """

    scale: float
    scales: tuple[float, ...] | None = None
    null_first: bool = False

    @property
    def branches(self) -> int:
        """Number of rows that a call has for each image."""
        return 2 if self.scale > 1 else 1

    def rows(self, of_images: Tensor) -> Tensor:
        """Return the rows (branches * n, ...) of a call that reads the same in all branches, such as latents (n, ...)
        or timesteps (n,)."""
        return torch.cat([of_images] * self.branches) if self.branches > 1 else of_images

    def conditions(self, of_images: Sequence[T]) -> tuple[T | None, ...]:
        """Return the conditions of the rows of a call, from those of n images."""
        given, null = tuple(of_images), (None,) * (len(of_images) * (self.branches - 1))
        return (*null, *given) if self.null_first else (*given, *null)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a guided call says with the conditions and with the null condition, each (n, ...)."""
        first, second = rows.chunk(2)
        return (second, first) if self.null_first else (first, second)

    def mixed(self, rows: Tensor) -> Tensor:
        """Return the guided prediction (n, ...) of a call, from the predictions of its rows."""
        if self.branches == 1:
            return rows
        conditional, null = self.split(rows)
        scale: float | Tensor = self.scale
        if self.scales is not None:
            scale = torch.tensor(self.scales, dtype=rows.dtype, device=rows.device).view(-1, *[1] * (rows.dim() - 1))
        return null + scale * (conditional - null)


class Scales(float):
    """Guidance scales of n images in one call of a pipeline: a number to compare with, n numbers to multiply with.

    Pipelines switch guidance on where their `guidance_scale` is above 1, and multiply it with a difference (n, ...) of
    predictions. A plain number serves all images; this one has a factor for each.

    Args:
        scale: number that it compares as.
        scales: n factors.

    Example:
        >>> import torch
        >>> scale = Scales(3.0, (2.0, 4.0))
        >>> scale > 1, (scale * torch.ones(2, 2)).tolist()
        (True, [[2.0, 2.0], [4.0, 4.0]])
    """

    scales: tuple[float, ...]
    used: bool  # whether predictions were multiplied

    def __new__(cls, scale: float, scales: Sequence[float]) -> Scales:
        made = super().__new__(cls, scale)
        made.scales, made.used = tuple(scales), False
        return made

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return super().__mul__(other)
        self.used = True
        factors = torch.tensor(self.scales, dtype=other.dtype, device=other.device)
        return factors.view(-1, *[1] * (other.dim() - 1)) * other
