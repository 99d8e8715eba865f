"""SNR-aware calibration: statistics of the inputs of prunable layers in each stage of the trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffes.adapters import BlockSet, Condition, GroupSet, ModelAdapter, check_finite
from diffes.adapters.blocks import form_of
from diffes.adapters.convolutions import as_tokens
from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.pruning.base import BlockChanges

T = TypeVar("T")
FORM = "expected an .npz with `images` (n, channels, h, w) uint8 and `labels` (n,) or `prompts` (n,)"


@dataclass(frozen=True)
class CalibrationSet:
    """Clean latents with their conditions.

    Args:
        latents: (n, C, h, w), scaled as the denoiser reads them.
        conditions: n class ids or prompts.
        source: where they come from, for the record.

    Raises:
        DiffesError: some latents are NaN or infinite.
    """

    latents: Tensor
    conditions: tuple[Condition, ...]
    source: str

    def __post_init__(self) -> None:
        check_finite(self.latents, f"latents for calibration ({self.source})")

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class StagePass:
    """Denoiser calls for the statistics of one stage.

    Each latent is noised, by the noise schedule of the pipeline's scheduler, to a timestep drawn from the stage. With
    guidance, each row has the null condition with probability 1/2, because half of the rows of a guided denoiser call
    have it.

    Args:
        adapter: the model, dense.
        stage: [lo, hi) timesteps.
        data: clean latents.
        guided: whether sampling will use classifier-free guidance.
        seed: of timesteps, noise and the rows without condition.
        weigh: weights (n,) of samples at progress (n,) through the stage, from 0 where sampling enters it to 1.
        batch: number of latents whose timesteps, noise and conditions are drawn together.
        at_once: number of these that share a denoiser call.
    """

    adapter: ModelAdapter
    stage: tuple[int, int]
    data: CalibrationSet
    guided: bool
    seed: int
    weigh: Callable[[Tensor], Tensor] = torch.ones_like
    batch: int = 64
    at_once: int = 64

    def within_room(self, measure: Callable[[StagePass], T]) -> T:
        """Return the result of `measure` with this pass, or with smaller calls where the device has no room."""
        return self.adapter.within_room(lambda n: measure(replace(self, at_once=n)), self.at_once)

    @torch.no_grad()
    def run(self) -> Iterator[Tensor]:
        """Yield the weights (n,) of the latents of each denoiser call before it is made."""
        adapter, (lo, hi) = self.adapter, self.stage
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, len(self.data), self.batch):
            latents = self.data.latents[start : start + self.batch].to(adapter.device, adapter.dtype)
            conditions = self.data.conditions[start : start + self.batch]
            timesteps = torch.randint(lo, hi, (len(latents),), generator=generator)
            noise = torch.randn(latents.shape, generator=generator)
            if self.guided:
                dropped = (torch.rand(len(latents), generator=generator) < 0.5).tolist()
                conditions = tuple(None if drop else c for c, drop in zip(conditions, dropped, strict=True))
            weights = self._weights((hi - timesteps) / (hi - lo)).to(adapter.device)
            noisy = adapter.add_noise(latents, noise, timesteps)
            for i in range(0, len(latents), self.at_once):
                rows = slice(i, i + self.at_once)
                yield weights[rows]
                adapter.denoise_once(noisy[rows], timesteps[rows], conditions[rows])

    def _weights(self, progress: Tensor) -> Tensor:
        what, wanted = "timestep_weights of the pruning method", f"return {len(progress)} positive numbers in a tensor"
        with guarded(self.weigh, what, wanted):
            found = self.weigh(progress)
        positive = isinstance(found, Tensor) and found.shape == progress.shape and bool((found > 0).all())
        if not positive or not torch.isfinite(found).all():
            raise unexpected(what, wanted, found)
        return found


def load_calibration(adapter: ModelAdapter, path: Path, n: int, batch: int = 64) -> CalibrationSet:
    """Encode the first `n` images of an .npz file with `images` (m, channels, h, w) uint8 and conditions: `labels` (m,)
    class ids or `prompts` (m,) texts.

    Raises:
        DiffesError: the file is damaged, not of that form, or for another kind of model.
    """
    wanted = "labels" if isinstance(adapter.choices("search")[0], int) else "prompts"
    try:
        with np.load(path) as data:
            images, conditions = data["images"][:n], data[wanted][:n]
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(conditions) or not len(images):
            raise ValueError(f"images are {images.dtype} {images.shape}, and {wanted} {conditions.shape}")
        if wanted == "labels":
            _check_labels(conditions, adapter)
        elif conditions.ndim != 1 or conditions.dtype.kind != "U" or not all(text.strip() for text in conditions):
            raise ValueError(f"prompts must be texts that are not empty, got {conditions.dtype} {conditions.shape}")
        pixels = torch.from_numpy(images).float() / 255
        latents = torch.cat([adapter.encode(part) for part in pixels.split(batch)])
        config = adapter.denoiser.config
        if latents.shape[1:] != (config.in_channels, config.sample_size, config.sample_size):
            raise ValueError(f"latents of images {images.shape[1:]} have another shape: {tuple(latents.shape[1:])}")
    except Exception as error:  # zipfile, numpy, the model and the checks each raise their own classes
        raise DiffesError(f"{path} holds no calibration images with {wanted}: {error}; {FORM}") from error
    kind = int if wanted == "labels" else str
    return CalibrationSet(latents, tuple(kind(c) for c in conditions), path.name)


def _check_labels(labels: Any, adapter: ModelAdapter) -> None:
    known = [choice for choice in adapter.choices("search") if isinstance(choice, int)]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be whole numbers, got {labels.dtype} {labels.shape}")
    if strange := sorted(set(labels.tolist()) - set(known)):
        raise ValueError(f"labels must be in [{min(known)}, {max(known)}], got {strange[0]}")


def sample_calibration(
    adapter: ModelAdapter,
    n: int,
    *,
    n_steps: int,
    guidance: float,
    seed: int,
    batch: int = 32,
    keep: Callable[[int, Callable[[], Tensor]], Tensor] | None = None,
) -> CalibrationSet:
    """Sample latents from the dense model, for models that come without images.

    Args:
        adapter: the model.
        n: number of latents.
        n_steps: sampling steps.
        guidance: classifier-free guidance scale.
        seed: of their noise and conditions.
        batch: number of samples made together.
        keep: called with the number of a batch's first sample and a function that makes the batch; returns the batch.
    """
    probes = adapter.make_probes(n, seed, "calibration")
    latents = []
    for i in range(0, n, batch):
        make = partial(adapter.sample, probes[i : i + batch], n_steps, guidance)
        latents.append((make() if keep is None else keep(i, make)).to(adapter.device))
    return CalibrationSet(torch.cat(latents), probes.conditions, "samples of the dense model")


def input_moments(run: StagePass, sets: Sequence[GroupSet], *, full: bool) -> dict[str, tuple[Tensor, ...]]:
    """Return weighted means over the tokens of a stage, in fp32, for the inputs x of every consumer of each set.

    Args:
        run: the calls to observe.
        sets: the sets of the consumers.
        full: True for `E[x x^T]` (d, d), False for its diagonal `E[x^2]` (d,).
    """
    return run.within_room(lambda fitting: _input_moments(fitting, sets, full))


def _input_moments(run: StagePass, sets: Sequence[GroupSet], full: bool) -> dict[str, tuple[Tensor, ...]]:
    sums: dict[tuple[str, str], Tensor] = {}
    total: dict[tuple[str, str], float] = {}
    weights = torch.empty(0)

    def observe(groups: GroupSet, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        key = (groups.name, path)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = groups.own(as_tokens(inputs[0].float(), module))
            x = (tokens * weights.sqrt().view(-1, *[1] * (tokens.ndim - 1))).flatten(0, -2)
            found = x.T @ x if full else x.square().sum(0)
            sums[key] = sums[key].add_(found) if key in sums else found
            total[key] = total.get(key, 0.0) + float(weights.sum()) * len(x) / len(weights)

        return hook

    with ExitStack() as hooks:
        for groups in sets:
            for path in groups.consumers:
                layer = run.adapter.denoiser.get_submodule(path)
                hooks.callback(layer.register_forward_pre_hook(observe(groups, path)).remove)
        for weights in run.run():  # noqa: B007 (the hooks read it)
            pass
    for key, found in sums.items():
        found.div_(total[key])  # in place, because they fill the memory
    return {groups.name: tuple(sums[groups.name, path] for path in groups.consumers) for groups in sets}


def block_changes(run: StagePass, blocks: BlockSet) -> BlockChanges:
    """Return weighted means over the tokens of a stage of the change that each block makes to them."""
    return run.within_room(lambda fitting: _block_changes(fitting, blocks))


def _block_changes(run: StagePass, blocks: BlockSet) -> BlockChanges:
    cosine, squared = (torch.zeros(blocks.n_groups, dtype=torch.float64) for _ in range(2))
    total = torch.zeros(blocks.n_groups, dtype=torch.float64)
    weights = torch.empty(0)

    def observe(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = (states.float() for states in form_of(module).change(args, kwargs, output))
            share = weights[:, None] / before.shape[1]
            cosine[i] += float((share * (1 - F.cosine_similarity(before, after, dim=-1))).sum())
            squared[i] += float((share * (before - after).square().mean(-1)).sum())
            total[i] += float(weights.sum())

        return hook

    with ExitStack() as hooks:
        for i, path in enumerate(blocks.blocks):
            block = run.adapter.denoiser.get_submodule(path)
            hooks.callback(block.register_forward_hook(observe(i), with_kwargs=True).remove)
        for weights in run.run():  # noqa: B007 (the hooks read it)
            pass
    return BlockChanges(cosine / total, squared / total)
