"""What diffes has to know about a model family: where its prunable groups are, how its pipeline calls the network."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffes.errors import DiffesError


@dataclass(frozen=True)
class GroupSet:
    """Groups of one layer that compete with each other: the heads of an attention or the channels of an FFN.

    Removing a group takes its rows out of every producer and its columns out of the consumer.

    Args:
        name: module path inside the denoiser; also the name in a bank.
        kind: "heads" or "channels".
        n_groups: how many there are when dense.
        size: consumer inputs per group: the head's width, or 1.
        producers: paths of the linear layers whose output rows belong to the groups.
        consumer: path of the linear layer that reads them.
    """

    name: str
    kind: Literal["heads", "channels"]
    n_groups: int
    size: int
    producers: tuple[str, ...]
    consumer: str

    def n_kept(self, level: int, max_level: int) -> int:
        """Groups left at a level: `n_groups * (1 - level / max_level)`, rounded to the nearest whole group."""
        return self.n_groups - round(self.n_groups * level / max_level)

    def features(self, groups: Tensor) -> Tensor:
        """Consumer input indices (n * size,) of group indices (n,), group by group."""
        return (groups[:, None] * self.size + torch.arange(self.size, device=groups.device)).flatten()


@dataclass(frozen=True)
class Probes:
    """What images are made from: the same probes give the same images, whatever is changed in the model.

    Args:
        noise: (n, C, h, w) starting latents in fp32 on the CPU.
        condition: (n,) class ids.
    """

    noise: Tensor
    condition: Tensor

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, part: slice) -> Probes:
        return Probes(self.noise[part], self.condition[part])


@dataclass(frozen=True)
class SamplingState:
    """A trajectory between two steps: everything that the rest of it depends on.

    Args:
        latents: what the next denoiser call reads, both guidance branches where there are two.
        scheduler: the sampler with its memory of earlier steps (multi-step solvers have one).
        index: number of steps done.
    """

    latents: Tensor
    scheduler: Any
    index: int


class ModelAdapter(abc.ABC):
    """One pipeline, seen through what differs between model families.

    Args:
        pipe: a loaded diffusers pipeline; put in eval mode.

    Attributes:
        denoiser: the network that is called once per step.
        max_level: H, so that level `k` removes `k / H` of every group set.
    """

    pipeline_class: ClassVar[str]

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()

    @property
    @abc.abstractmethod
    def denoiser(self) -> Any:
        """An `nn.Module`; typed loosely because diffusers' attributes are."""

    @property
    @abc.abstractmethod
    def max_level(self) -> int: ...

    @abc.abstractmethod
    def group_sets(self) -> list[GroupSet]:
        """Every prunable group set, in the order of the forward pass."""

    @abc.abstractmethod
    def timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """The training timestep of a denoiser call, from its arguments."""

    @abc.abstractmethod
    def make_probes(self, n: int, seed: int) -> Probes:
        """`n` probes with balanced conditions; probe i depends on nothing but `seed` and i."""

    @abc.abstractmethod
    def start(self, probes: Probes, n_steps: int, guidance: float) -> SamplingState:
        """The state before the first step."""

    @abc.abstractmethod
    def step(self, state: SamplingState, probes: Probes, guidance: float) -> SamplingState:
        """One denoiser call and one scheduler step, exactly as the family's pipeline does them."""

    @abc.abstractmethod
    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        """The final latents (n, C, h, w) of a finished trajectory."""

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, channels, height, width) in [0, 1] of latents (n, C, h, w)."""

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, C, h, w), scaled as the denoiser reads them, of images (n, channels, height, width) in [0, 1]."""

    @abc.abstractmethod
    def denoise_once(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """A bare denoiser call; `condition` (n,) as `null_condition` and `Probes.condition` give it."""

    @abc.abstractmethod
    def null_condition(self, n: int) -> Tensor:
        """(n,) conditions of the unconditional branch of classifier-free guidance."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return next(self.denoiser.parameters()).dtype

    @property
    def n_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def timesteps(self, n_steps: int) -> list[float]:
        """The timesteps that a sampling run of `n_steps` visits, one per denoiser call, noisiest first."""
        return [float(t) for t in self.fresh_scheduler(n_steps).timesteps]

    def fresh_scheduler(self, n_steps: int) -> Any:
        """A scheduler of the pipeline's kind, ready for `n_steps`; the pipeline's own is left alone.

        Raises:
            DiffesError: there are more steps than training timesteps, or none.
        """
        if not 1 <= n_steps <= self.n_timesteps:
            raise DiffesError(f"steps must be in [1, {self.n_timesteps}], got {n_steps}")
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(n_steps, device=self.device)
        return scheduler

    @torch.no_grad()
    def sample(self, probes: Probes, n_steps: int, guidance: float) -> Tensor:
        """The final latents (n, C, h, w) of a whole run with the denoiser as it is."""
        state = self.start(probes, n_steps, guidance)
        for _ in range(len(state.scheduler.timesteps)):
            state = self.step(state, probes, guidance)
        return self.finish(state, guidance)
