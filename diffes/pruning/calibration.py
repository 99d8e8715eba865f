"""SNR-aware calibration: what the prunable layers see in each stage of the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffes.adapters.base import GroupSet, ModelAdapter
from diffes.errors import DiffesError


@dataclass(frozen=True)
class CalibrationSet:
    """Clean latents with their conditions.

    Args:
        latents: (n, C, h, w), scaled as the denoiser reads them.
        condition: (n,) class ids.
        source: where they come from, for the record.
    """

    latents: Tensor
    condition: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.latents)


def load_calibration(adapter: ModelAdapter, path: Path, n: int, batch: int = 64) -> CalibrationSet:
    """Encodes the first `n` images of an .npz file with `images` (m, channels, h, w) uint8 and `labels` (m,).

    Raises:
        DiffesError: the file is damaged or not of that form.
    """
    try:
        with np.load(path) as data:
            images, labels = data["images"][:n], data["labels"][:n]
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(labels) or not len(images):
            raise ValueError(f"images are {images.dtype} {images.shape}, labels {labels.shape}")
    except Exception as error:  # zipfile, numpy and the check above each raise their own
        raise DiffesError(
            f"{path} holds no calibration images: {error}; expected an .npz with `images` (n, channels, h, w) uint8 "
            "and `labels` (n,)"
        ) from error
    pixels = torch.from_numpy(images).float() / 255
    latents = torch.cat([adapter.encode(part) for part in pixels.split(batch)])
    return CalibrationSet(latents, torch.from_numpy(labels.astype(np.int64)), path.name)


def sample_calibration(
    adapter: ModelAdapter, n: int, *, n_steps: int, guidance: float, seed: int, batch: int = 32
) -> CalibrationSet:
    """For models that come without images: latents that the dense model itself makes."""
    probes = adapter.make_probes(n, seed)
    latents = [adapter.sample(probes[i : i + batch], n_steps, guidance) for i in range(0, n, batch)]
    return CalibrationSet(torch.cat(latents), probes.condition, "samples of the dense model")


@torch.no_grad()
def second_moments(
    adapter: ModelAdapter,
    sets: Sequence[GroupSet],
    stage: tuple[int, int],
    data: CalibrationSet,
    *,
    guided: bool,
    generator: torch.Generator,
    batch: int = 64,
) -> dict[str, Tensor]:
    """`E[x x^T]` (d, d) in fp32 of every consumer's inputs, over timesteps of one stage.

    Each latent is noised, by the scheduler's own `add_noise`, to a timestep drawn from the stage. With guidance, half
    of the rows carry the null condition, because half of the rows of a guided denoiser call do.

    Args:
        adapter: the model, dense.
        sets: what to look at.
        stage: [lo, hi) timesteps.
        data: clean latents.
        guided: whether sampling will use classifier-free guidance.
        generator: CPU generator of timesteps and noise.
        batch: latents per denoiser call.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def observe(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    scheduler = adapter.pipe.scheduler
    with ExitStack() as hooks:
        for groups in sets:
            layer = adapter.denoiser.get_submodule(groups.consumer)
            hooks.callback(layer.register_forward_pre_hook(observe(groups.name)).remove)
        for start in range(0, len(data), batch):
            latents = data.latents[start : start + batch].to(adapter.device, adapter.dtype)
            condition = data.condition[start : start + batch]
            timesteps = torch.randint(stage[0], stage[1], (len(latents),), generator=generator)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            if guided:
                unconditional = torch.rand(len(latents), generator=generator) < 0.5
                condition = torch.where(unconditional, adapter.null_condition(len(latents)), condition)
            noisy = scheduler.add_noise(latents, noise, timesteps.to(adapter.device))
            adapter.denoise_once(noisy, timesteps, condition)
    return {name: sums[name] / rows[name] for name in sums}
