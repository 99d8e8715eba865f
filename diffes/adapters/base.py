"""What diffes has to know about a model family: where its prunable groups are, how its pipeline calls the network."""

from __future__ import annotations

import abc
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

from diffes.adapters.groups import (
    PLAIN_PROCESSORS,
    AnySet,
    BlockSet,
    BranchSet,
    GroupSet,
    NoHeads,
    UpLayerSet,
    hand_on,
    heads_of,
)
from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.solvers import own_of

T = TypeVar("T")
GOLDEN = (5**0.5 - 1) / 2
Split = Literal["search", "heldout", "calibration"]  # of prompts: what one draws from, the others do not
Condition = int | str | None  # a class id, a prompt, or the null condition of classifier-free guidance


@dataclass(frozen=True)
class Probes:
    """What images are made from: the same probes give the same images, whatever is changed in the model.

    Args:
        noise: (n, C, h, w) unit normal noise in fp32 on the CPU; the scheduler scales it.
        conditions: n class ids or prompts.
        guidance: n guidance scales, each above 1; None where all have that of the call.

    Example:
        >>> import torch
        >>> probes = Probes(torch.zeros(4, 1, 2, 2), (0, 1, 2, 3)).over(2.0, 4.0)
        >>> probes.guidance
        (3.236, 2.472, 3.708, 2.944)
        >>> probes[:2].scale(3.0, probes.noise.double()).flatten().tolist()
        [3.236, 2.472]
    """

    noise: Tensor
    conditions: tuple[Condition, ...]
    guidance: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, part: slice) -> Probes:
        return Probes(self.noise[part], self.conditions[part], self.guidance and self.guidance[part])

    def over(self, low: float, high: float) -> Probes:
        """Return the same probes, each at a guidance scale of its own, any first few of them evenly spread over a range
        (multiples of the golden ratio, modulo 1)."""
        shares = [i * GOLDEN % 1 for i in range(1, len(self) + 1)]
        return replace(self, guidance=tuple(round(low + (high - low) * share, 3) for share in shares))

    def scale(self, guidance: float, like: Tensor) -> float | Tensor:
        """Return the guidance scale to mix the two branches of a call with: that of the call, or (n, 1, 1, 1) of each
        probe, on the device of a tensor and of its type."""
        if self.guidance is None:
            return guidance
        return torch.tensor(self.guidance).to(like).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class SamplingState:
    """A trajectory between two steps: everything that the rest of it depends on.

    Args:
        latents: what the next step starts from.
        scheduler: the sampler with its memory of earlier steps (multi-step solvers have one).
        index: number of steps done.
        memory: what the denoiser may reuse of earlier calls (see `diffes.runtime.memory`); None where nothing is.
    """

    latents: Tensor
    scheduler: Any
    index: int
    memory: Any = None


class ModelAdapter(abc.ABC):
    """One pipeline, seen through what differs between model families, its noise process included.

    Found by the name of its pipeline's class, or of the nearest base of it, in the entry points `diffes.adapters`.

    Args:
        pipe: a loaded diffusers pipeline; put in eval mode.

    Attributes:
        denoiser: the network that is called once per step.
        room: how many images at a time its device was found to have room for, by what is done with them.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.room: dict[str, int] = {}
        self._checked_sampler: Any = None
        self._clock: Any = None
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()

    @property
    @abc.abstractmethod
    def denoiser(self) -> Any:
        """An `nn.Module`; typed loosely because diffusers' attributes are."""

    @abc.abstractmethod
    def blocks(self) -> list[str]:
        """Module paths of all transformer blocks (diffusers' `BasicTransformerBlock`), in the order of the forward."""

    def timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """The training timestep of a denoiser call, from its arguments: the second one, or the one of that name.

        Raises:
            DiffesError: its rows are at different ones, or it is below 0.
        """
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timesteps = given.flatten().tolist() if isinstance(given, Tensor) else [given]
        timestep = float(timesteps[0])
        if any(other != timestep for other in timesteps):
            raise DiffesError(
                f"the rows of a denoiser call are at timesteps from {min(timesteps):g} to {max(timesteps):g}, but thin "
                "layers are those of one stage: call it with rows at one timestep, or diffes.remove(pipe) first"
            )
        if not timestep >= 0:
            raise _no_training_timestep(type(self.own_scheduler).__name__, f"the denoiser was called at {timestep:g}")
        return timestep

    @abc.abstractmethod
    def choices(self, split: Split) -> Sequence[Condition]:
        """The conditions that probes of a split are drawn from."""

    @abc.abstractmethod
    def label(self, condition: Condition) -> str:
        """How a picture of a condition is captioned."""

    def use_prompts(self, path: Path) -> None:
        """Draws probes from the prompts of a file (see `diffes.adapters.prompts.read_prompts`).

        Raises:
            DiffesError: the model takes no prompts, or the file is not of that form.
        """
        raise DiffesError(f"{type(self.pipe).__name__} takes class ids, no prompts; leave --prompts {path} out")

    @abc.abstractmethod
    def start(self, probes: Probes, steps: int | Any, guidance: float) -> SamplingState:
        """The state before the first step of a run of so many steps, or of a scheduler that has its timesteps set."""

    @abc.abstractmethod
    def predict(self, state: SamplingState, probes: Probes, guidance: float) -> tuple[Tensor, Tensor]:
        """The guided prediction of the next denoiser call, exactly as the family's pipeline makes it, and the latents
        that its scheduler is given with it, both of the shape of the state's latents."""

    def step(self, state: SamplingState, probes: Probes, guidance: float) -> SamplingState:
        """One denoiser call and one scheduler step, exactly as the family's pipeline does them."""
        prediction, latents = self.predicted(state, probes, guidance)
        return self.advance(state, prediction, state.scheduler.timesteps[state.index], latents)

    def predicted(self, state: SamplingState, probes: Probes, guidance: float) -> tuple[Tensor, Tensor]:
        """What `predict` says, checked; the state's scheduler counts the call."""
        what, wanted = f"adapter {type(self).__qualname__}", "return prediction and latents, two tensors, from predict"
        with guarded(self, what, wanted), self.counted_by(state.scheduler):
            found = self.predict(state, probes, guidance)
        if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(each, Tensor) for each in found):
            raise unexpected(what, wanted, found)
        return found

    @property
    def own_scheduler(self) -> Any:
        """The scheduler that the pipeline has, or had before a plan's took its place."""
        return own_of(self.pipe.scheduler)

    @property
    def clock(self) -> Any:
        """The scheduler that counts the calls of the run that is being sampled; the pipeline's own in its own calls."""
        return self.pipe.scheduler if self._clock is None else self._clock

    @contextmanager
    def counted_by(self, scheduler: Any) -> Iterator[None]:
        """Calls the denoiser inside the context as part of a run of this scheduler."""
        before, self._clock = self._clock, scheduler
        try:
            yield
        finally:
            self._clock = before

    @abc.abstractmethod
    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        """The final latents (n, C, h, w) of a finished trajectory."""

    @abc.abstractmethod
    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """A bare denoiser call: predictions (n, C, h, w) for latents (n, C, h, w) at timesteps (n,)."""

    @abc.abstractmethod
    def generate(
        self, conditions: Sequence[Condition], *, n_steps: int, guidance: float, generator: torch.Generator
    ) -> Tensor:
        """Images (n, channels, height, width) in [0, 1] by the family's own pipeline call."""

    def max_level(self, kind: str) -> int:
        """H, so that level `k` removes `k / H` of every group set.

        Width: the number of heads, the largest where layers differ (SDXL has 10 and 20); a layer with fewer rounds to
        whole heads. Depth: the number of blocks. Reuse: of attentions and FFNs, as many levels as of width.
        """
        if kind == "depth":
            return len(self.blocks())
        return max(groups.n_groups for groups in self.group_sets() if groups.kind == "heads")

    def prunable(self, kind: str) -> Sequence[AnySet]:
        """What methods of a kind remove or reuse; kinds of several methods are joined by "+"."""
        found: list[AnySet] = []
        for each in dict.fromkeys(kind.split("+")):
            if each == "depth":
                found.append(BlockSet(tuple(self.blocks())))
            elif each == "reuse":
                found += [part for part in (self.branches(), self.up_layers()) if part is not None]
            else:
                found += self.group_sets()
        return found

    def branches(self) -> BranchSet:
        """Attentions and FFNs of every block, in the order of the forward pass."""
        parts = [f"{path}.{name}" for path in self.blocks() for name in ("attn1", "attn2", "ff")]
        there = {name for name, _ in self.denoiser.named_modules()}
        return BranchSet(tuple(part for part in parts if part in there))

    def up_layers(self) -> UpLayerSet | None:
        """Layers of a U-Net's way up; None where the denoiser is no U-Net."""
        return None

    def group_sets(self) -> list[GroupSet]:
        """Heads and FFN channels of every block, in the order of the forward pass."""
        sets = []
        for path in self.blocks():
            block = self.denoiser.get_submodule(path)
            for name in ("attn1", "attn2"):
                attention = getattr(block, name, None)
                if attention is not None:
                    sets.append(heads_of(f"{path}.{name}", attention))
            channels = block.ff.net[2].weight.shape[1]
            sets.append(GroupSet(f"{path}.ff", "channels", channels, 1, (f"{path}.ff.net.0.proj",), f"{path}.ff.net.2"))
        return sets

    def skipped(self, block: nn.Module) -> Callable[..., Any]:
        """What stands in for the forward of a block that is skipped; the block stays where it is."""
        return hand_on

    def without_heads(self, attention: nn.Module) -> Any:
        """What stands in for the forward of an attention layer that has lost all its heads, called with the layer and
        then as the forward; None where the layer's own processor has to see the call: one of the user's, for instance.
        """
        return NoHeads() if type(attention.processor) in PLAIN_PROCESSORS else None

    def make_probes(self, n: int, seed: int, split: Split = "search") -> Probes:
        """`n` probes with balanced conditions; probe i depends on `seed`, i and, for its condition, `split` alone."""
        choices = self.choices(split)
        config = self.denoiser.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + i)) for i in range(n)]
        )
        turns = [
            torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed * 100_003 + turn))
            for turn in range(n // len(choices) + 1)
        ]
        return Probes(noise, tuple(choices[i] for i in torch.cat(turns)[:n].tolist()))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser reads at training timesteps (n,): `sqrt(a) x + sqrt(1 - a) e` (n, C, h, w).

        It is the forward process of the scheduler's own noise schedule. Samplers that count in sigmas (Euler, Heun)
        add noise at the timesteps of a run only and scale afterwards, to the same result.
        """
        process = DDPMScheduler.from_config(self.own_scheduler.config)
        # in fp32: bf16 has no number between 0.996 and 1, and the cleanest timesteps would get no noise at all
        noisy = process.add_noise(latents.float(), noise.to(latents.device).float(), timesteps.to(latents.device))
        return noisy.to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser is trained to predict (n, C, h, w) where clean latents were noised to timesteps (n,).

        Raises:
            DiffesError: the scheduler's prediction type is none of epsilon, v_prediction and sample.
        """
        kind = self.own_scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return latents
        if kind != "v_prediction":
            raise DiffesError(f"prediction_type must be epsilon, v_prediction or sample, got {kind!r}")
        signal = self._signal(timesteps).view(-1, 1, 1, 1)
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents

    def log_snr(self, timestep: int) -> float:
        """Natural logarithm of the signal-to-noise ratio, in variances, at a training timestep."""
        signal = float(self._signal(torch.tensor([timestep])))
        return math.log(signal / (1 - signal))

    def _signal(self, timesteps: Tensor) -> Tensor:
        """Variance of what is left of the image (n,) at timesteps (n,): alpha-bar."""
        return self.own_scheduler.alphas_cumprod.float().cpu()[timesteps]

    def advance(self, state: SamplingState, prediction: Tensor, timestep: Tensor, latents: Tensor) -> SamplingState:
        """The scheduler's step. Samplers that add noise draw the same for every schedule, so that schedules compare."""
        scheduler = state.scheduler
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(state.index)} if draws else {}
        after = scheduler.step(prediction, timestep, latents, **options).prev_sample
        return SamplingState(after, scheduler, state.index + 1)

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
        return int(self.own_scheduler.config.num_train_timesteps)

    def timesteps(self, n_steps: int) -> list[float]:
        """The timesteps of a sampling run, one per denoiser call (Heun makes two a step), noisiest first."""
        return [float(t) for t in self.fresh_scheduler(n_steps).timesteps]

    def check_sampler(self) -> None:
        """Refuses a scheduler that does not count in training timesteps, which stages are ranges of.

        Raises:
            DiffesError: its timesteps are something else (logarithms of sigmas, fractions of the way).
        """
        if self.own_scheduler is self._checked_sampler or self.device.type == "meta":
            return
        visited = self.timesteps(min(10, self.n_timesteps))
        if min(visited) < 0 or 2 * max(visited) < self.n_timesteps:
            raise _no_training_timestep(
                type(self.own_scheduler).__name__, f"it goes from {max(visited):.4g} to {min(visited):.4g}"
            )
        self._checked_sampler = self.own_scheduler

    def unusual(self) -> list[str]:
        """What diffusers can sample with, but `start`, `step` and `finish` cannot."""
        return []

    def check_sampled(self) -> None:
        """Refuses a pipeline with something unusual.

        Raises:
            DiffesError: there is something.
        """
        if found := self.unusual():
            raise DiffesError(
                f"this {type(self.pipe).__name__} has {' and '.join(found)}, which diffes does not know how to sample: "
                "nothing can be searched on it, but runs that were made for its denoiser can be applied"
            )

    def fresh_scheduler(self, n_steps: int) -> Any:
        """A scheduler of the pipeline's kind, ready for `n_steps`; the pipeline's own is left alone.

        Raises:
            DiffesError: there are more steps than training timesteps, or none, or the scheduler does not count in them.
        """
        if not 1 <= n_steps <= self.n_timesteps:
            raise DiffesError(f"steps must be in [1, {self.n_timesteps}], got {n_steps}")
        if not hasattr(self.own_scheduler, "alphas_cumprod"):
            raise _no_training_timestep(type(self.own_scheduler).__name__)
        scheduler = copy.deepcopy(self.own_scheduler)
        scheduler.set_timesteps(n_steps, device=self.device)
        return scheduler

    def ready(self, steps: int | Any) -> Any:
        """A scheduler of one's own: the pipeline's kind for a number of steps, or a copy of one that is ready."""
        return self.fresh_scheduler(steps) if isinstance(steps, int) else copy.deepcopy(steps)

    @torch.no_grad()
    def sample(self, probes: Probes, steps: int | Any, guidance: float) -> Tensor:
        """The final latents (n, C, h, w) of a whole run with the denoiser as it is.

        Args:
            probes: what images are made from.
            steps: how many, by the pipeline's scheduler, or a scheduler that has its timesteps set.
            guidance: classifier-free guidance scale.
        """

        def sampled(part: Probes) -> Tensor:
            state = self.start(part, steps, guidance)
            for _ in range(len(state.scheduler.timesteps)):
                state = self.step(state, part, guidance)
            return self.finish(state, guidance)

        def run(n: int) -> Tensor:
            return torch.cat([sampled(probes[i : i + n]) for i in range(0, len(probes), n)])

        return self.within_room(run, len(probes))

    def within_room(
        self,
        run: Callable[[int], T],
        batch: int,
        free: Callable[[], object] | None = None,
        what: Literal["calls", "gradients"] = "calls",
    ) -> T:
        """What `run` gives, which is told how many images may go together: `batch`, or as many as the device has room
        for.

        Where it runs out of memory, it is run again with half of the images, and so on; what fits is known from then
        on.

        Args:
            run: begins anew whenever it is called.
            batch: images at a time where there is room for them.
            free: gives memory back; called first, and then `run` with as many images as before.
            what: is done with them; gradients want more room than calls.

        Raises:
            DiffesError: there is no room for a single one.
        """
        halves = free is None
        while True:
            n = max(1, min(batch, self.room.get(what, batch)))
            try:
                return run(n)
            except torch.OutOfMemoryError as error:
                said = " ".join(str(error).split())[:200]
            if free is not None:  # out here, where the error holds no tensors any more
                free()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if halves and n == 1:
                raise DiffesError(
                    f"the device has no room for a single image at a time ({said}): choose --dtype float16 or "
                    "bfloat16, fewer workers on it, or another device"
                )
            if halves:
                self.room[what] = n // 2
            halves = True

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder reads them, by the family's own arithmetic, to the bit."""
        return latents / self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, channels, height, width) in [0, 1] of latents (n, C, h, w)."""
        vae = self.pipe.vae
        with _in_float32(vae):
            scaled = self.unscale(latents.to(vae.dtype))
            side = scaled.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
            samples = torch.cat([vae.decode(part).sample for part in scaled.split(_images_at_once(side))])
        return (samples / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, C, h, w), scaled as the denoiser reads them, of images (n, channels, height, width) in [0, 1]."""
        vae = self.pipe.vae
        with _in_float32(vae):
            parts = (images.to(vae.device, vae.dtype) * 2 - 1).split(_images_at_once(images.shape[-1]))
            encoded = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
        return (encoded * vae.config.scaling_factor).to(self.dtype)


def _no_training_timestep(scheduler: str, reason: str = "it has no noise schedule of variances") -> DiffesError:
    return DiffesError(
        f"{scheduler} does not count in training timesteps, which stages are made of ({reason}); give the pipeline "
        "another scheduler, for instance DPMSolverMultistepScheduler.from_config, or "
        "EulerDiscreteScheduler.from_config with timestep_type='discrete'"
    )


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuses numbers with which nothing can be calibrated or compared.

    Raises:
        DiffesError: some are NaN or infinite.
    """
    if not torch.isfinite(tensor).all():
        raise DiffesError(
            f"the {what} are NaN or infinite, so nothing can be searched: half precision overflows (the autoencoder of "
            "SDXL does in float16); choose dtype bfloat16 or float32, or a pipeline with an autoencoder made for "
            "float16"
        )


def unwrapped(module: Any) -> Any:
    """The module itself, where `torch.compile` has put another around it."""
    return getattr(module, "_orig_mod", module)


def _images_at_once(side: int) -> int:
    """How many square images an autoencoder takes in one call: their activations at full size are what fills a GPU."""
    return max(1, 2**21 // side**2)


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Autoencoders that overflow in half precision say so in their configuration (`force_upcast`, SDXL's does)."""
    before = vae.dtype
    upcasts = before == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcasts:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcasts:
            vae.to(before)
