"""Base class of model adapters: where a model family has prunable groups, and how its pipeline calls the network."""

from __future__ import annotations

import abc
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

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
    sets_of_block,
)
from diffes.adapters.guidance import ClassifierFreeGuidance
from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.solvers import own_of

T = TypeVar("T")
GOLDEN = (5**0.5 - 1) / 2
Split = Literal["search", "heldout", "calibration"]  # disjoint sets of prompts
Condition = int | str | None  # a class id, a prompt, or the null condition of classifier-free guidance


@dataclass(frozen=True)
class Probes:
    """Inputs that images are sampled from: noise, conditions and guidance scales. They stay the same when the model
    changes, so that its images can be compared.

    Args:
        noise: (n, C, h, w) unit normal noise in fp32 on the CPU; the scheduler scales it.
        conditions: n class ids or prompts.
        guidance: n guidance scales, each above 1; None where every probe uses the scale of the call.

    Example:
        >>> import torch
        >>> probes = Probes(torch.zeros(4, 1, 2, 2), (0, 1, 2, 3)).over(2.0, 4.0)
        >>> probes.guidance
        (3.236, 2.472, 3.708, 2.944)
    """

    noise: Tensor
    conditions: tuple[Condition, ...]
    guidance: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, part: slice) -> Probes:
        return Probes(self.noise[part], self.conditions[part], self.guidance and self.guidance[part])

    def over(self, low: float, high: float) -> Probes:
        """Return the same probes with a guidance scale each. The scales of any first few probes are spread evenly over
        the range (multiples of the golden ratio, modulo 1)."""
        shares = [i * GOLDEN % 1 for i in range(1, len(self) + 1)]
        return replace(self, guidance=tuple(round(low + (high - low) * share, 3) for share in shares))


@dataclass(frozen=True)
class SamplingState:
    """State of a trajectory between two steps: everything that the remaining steps depend on.

    Args:
        latents: input of the next step.
        scheduler: the sampler with its memory of earlier steps (multi-step solvers have one).
        index: number of steps done.
        memory: outputs of earlier calls that the denoiser may reuse (see `diffes.runtime.memory`); None where nothing
            is reused.
    """

    latents: Tensor
    scheduler: Any
    index: int
    memory: Any = None


class ModelAdapter(abc.ABC):
    """Interface to one pipeline, including its noise process. It holds all that differs between model families.

    An adapter is found by the name of its pipeline's class, or of that class's nearest base, in the entry points
    `diffes.adapters`.

    Args:
        pipe: a loaded diffusers pipeline; put in eval mode.

    Attributes:
        denoiser: the network that is called once per step.
        room: largest number of images at a time that the device was found to have room for, by use: "calls" or
            "gradients".
        null_first: whether the rows with the null condition come first in the pipeline's guided calls.
    """

    null_first: ClassVar[bool] = False

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
        """The network, an `nn.Module`; typed loosely because diffusers' attributes are."""

    @abc.abstractmethod
    def blocks(self) -> list[str]:
        """Return the module paths of all transformer blocks (diffusers' `BasicTransformerBlock`), in the order of the
        forward pass."""

    def timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """Return the training timestep of a denoiser call, from its arguments: the second one, or the one of that name.

        Raises:
            DiffesError: the rows are at different timesteps, or the timestep is below 0.
        """
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timesteps = given.flatten().tolist() if isinstance(given, Tensor) else [given]
        timestep = float(timesteps[0])
        if any(other != timestep for other in timesteps):
            raise DiffesError(
                f"the rows of a denoiser call have timesteps from {min(timesteps):g} to {max(timesteps):g}, but pruned "
                "layers belong to one stage: call it with one timestep for all rows, or call diffes.remove(pipe) first"
            )
        if not timestep >= 0:
            raise _no_training_timestep(type(self.own_scheduler).__name__, f"the denoiser was called at {timestep:g}")
        return timestep

    def guided(self, guidance: float, probes: Probes | None = None) -> ClassifierFreeGuidance:
        """Return the guidance of the pipeline's denoiser calls.

        Args:
            guidance: classifier-free guidance scale.
            probes: the images of the calls, which may have scales of their own; not needed to count rows.
        """
        return ClassifierFreeGuidance(guidance, None if probes is None else probes.guidance, self.null_first)

    @abc.abstractmethod
    def choices(self, split: Split) -> Sequence[Condition]:
        """Return the conditions that probes of a split are drawn from."""

    @abc.abstractmethod
    def label(self, condition: Condition) -> str:
        """Return the caption for an image of a condition."""

    def use_prompts(self, path: Path) -> None:
        """Draw probes from the prompts of a file (see `diffes.adapters.prompts.read_prompts`).

        Raises:
            DiffesError: the model takes no prompts, or the file is not of that form.
        """
        raise DiffesError(f"{type(self.pipe).__name__} takes class ids, not prompts: leave --prompts {path} out")

    @abc.abstractmethod
    def start(self, probes: Probes, steps: int | Any, guidance: float) -> SamplingState:
        """Return the state before the first step of a run of `steps` steps, or of a scheduler with timesteps set."""

    @abc.abstractmethod
    def predict(self, state: SamplingState, probes: Probes, guidance: float) -> tuple[Tensor, Tensor]:
        """Return the guided prediction of the next denoiser call, computed exactly as the family's pipeline does, and
        the latents to give its scheduler with it. Both have the shape of the state's latents."""

    def step(self, state: SamplingState, probes: Probes, guidance: float) -> SamplingState:
        """Make one denoiser call and one scheduler step, exactly as the family's pipeline does."""
        prediction, latents = self.predicted(state, probes, guidance)
        return self.advance(state, prediction, state.scheduler.timesteps[state.index], latents)

    def predicted(self, state: SamplingState, probes: Probes, guidance: float) -> tuple[Tensor, Tensor]:
        """Return the result of `predict`, checked. The state's scheduler counts the call."""
        what, wanted = f"adapter {type(self).__qualname__}", "return prediction and latents, two tensors, from predict"
        with guarded(self, what, wanted), self.counted_by(state.scheduler):
            found = self.predict(state, probes, guidance)
        if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(each, Tensor) for each in found):
            raise unexpected(what, wanted, found)
        return found

    @property
    def own_scheduler(self) -> Any:
        """Scheduler that the pipeline has, or had before a plan's scheduler replaced it."""
        return own_of(self.pipe.scheduler)

    @property
    def clock(self) -> Any:
        """Scheduler that counts the calls of the present run; in the pipeline's own calls, the pipeline's scheduler."""
        return self.pipe.scheduler if self._clock is None else self._clock

    @contextmanager
    def counted_by(self, scheduler: Any) -> Iterator[None]:
        """Count denoiser calls inside the context as part of a run of this scheduler."""
        before, self._clock = self._clock, scheduler
        try:
            yield
        finally:
            self._clock = before

    @abc.abstractmethod
    def finish(self, state: SamplingState, guidance: float) -> Tensor:
        """Return the final latents (n, C, h, w) of a finished trajectory."""

    @abc.abstractmethod
    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Make a bare denoiser call: return predictions (n, C, h, w) for latents (n, C, h, w) at timesteps (n,)."""

    @abc.abstractmethod
    def generate(
        self, conditions: Sequence[Condition], *, n_steps: int, guidance: float, generator: torch.Generator
    ) -> Tensor:
        """Return images (n, channels, height, width) in [0, 1] from the family's own pipeline call."""

    def max_level(self, kind: str) -> int:
        """Return H. Under the equal allocation, level `k` removes `k / H` of every group set.

        Width: the number of heads, the largest where layers differ (SDXL has 10 and 20); a layer with fewer rounds to
        whole heads. Depth: the number of blocks. Reuse of attentions and FFNs: as many levels as width.
        """
        if kind == "depth":
            return len(self.blocks())
        return max(groups.n_groups for groups in self.group_sets() if groups.attention is not None)

    def prunable(self, kind: str) -> Sequence[AnySet]:
        """Return the sets that methods of a kind remove or reuse. Kinds of several methods are joined by "+"."""
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
        """Return the attentions and FFNs of every block, in the order of the forward pass."""
        return BranchSet(tuple(groups.name for groups in self.group_sets()))

    def up_layers(self) -> UpLayerSet | None:
        """Return the layers of a U-Net's decoder path; None where the denoiser is no U-Net."""
        return None

    def group_sets(self) -> list[GroupSet]:
        """Return the heads and FFN channels of every block, in the order of the forward pass."""
        submodule = self.denoiser.get_submodule
        return [groups for path in self.blocks() for groups in sets_of_block(path, submodule(path))]

    def skipped(self, block: nn.Module) -> Callable[..., Any]:
        """Return the forward that a block gets when it is skipped. The block itself stays in the model."""
        return hand_on

    def without_heads(self, attention: nn.Module) -> Any:
        """Return the forward of an attention layer that has lost all its heads: it is called with the layer, then the
        arguments of the forward. Return None where the layer's own processor, such as the user's, must see the call."""
        return NoHeads() if type(attention.processor) in PLAIN_PROCESSORS else None

    def make_probes(self, n: int, seed: int, split: Split = "search") -> Probes:
        """Draw `n` probes with balanced conditions. Probe i depends on `seed`, i and, for its condition, `split`."""
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
        """Return the denoiser's input at training timesteps (n,): `sqrt(a) x + sqrt(1 - a) e` (n, C, h, w).

        This is the forward process of the scheduler's noise schedule. Samplers that count in sigmas (Euler, Heun) add
        noise only at the timesteps of a run and scale it afterwards, with the same result.
        """
        process = DDPMScheduler.from_config(self.own_scheduler.config)
        # in fp32: bf16 has no number between 0.996 and 1, so the cleanest timesteps would get no noise at all
        noisy = process.add_noise(latents.float(), noise.to(latents.device).float(), timesteps.to(latents.device))
        return noisy.to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target of the denoiser (n, C, h, w) for clean latents noised to timesteps (n,).

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
        """Return the natural logarithm of the signal-to-noise ratio, in variances, at a training timestep."""
        signal = float(self._signal(torch.tensor([timestep])))
        return math.log(signal / (1 - signal))

    def _signal(self, timesteps: Tensor) -> Tensor:
        """Return the variance of the remaining image (n,) at timesteps (n,): alpha-bar."""
        return self.own_scheduler.alphas_cumprod.float().cpu()[timesteps]

    def advance(self, state: SamplingState, prediction: Tensor, timestep: Tensor, latents: Tensor) -> SamplingState:
        """Make the scheduler's step. Samplers that add noise draw the same noise for every schedule, so that schedules
        can be compared."""
        scheduler = state.scheduler
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(state.index)} if draws else {}
        after = scheduler.step(prediction, timestep, latents, **options).prev_sample
        return SamplingState(after, scheduler, state.index + 1)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser's parameters."""
        return next(self.denoiser.parameters()).dtype

    @property
    def n_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return int(self.own_scheduler.config.num_train_timesteps)

    def timesteps(self, n_steps: int) -> list[float]:
        """Return the timesteps of a sampling run, one per denoiser call (Heun makes two a step), noisiest first."""
        return [float(t) for t in self.fresh_scheduler(n_steps).timesteps]

    def check_sampler(self) -> None:
        """Check that the scheduler counts in training timesteps, because stages are ranges of these.

        Raises:
            DiffesError: its timesteps are something else (logarithms of sigmas, or fractions of the trajectory).
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
        """Return the pipeline's features that diffusers can sample with, but `start`, `step` and `finish` cannot."""
        return []

    def check_sampled(self) -> None:
        """Check that the pipeline has no unusual features.

        Raises:
            DiffesError: it has some.
        """
        if found := self.unusual():
            raise DiffesError(
                f"this {type(self.pipe).__name__} has {' and '.join(found)}. diffes cannot sample with that, so it "
                "cannot search on this pipeline: search on one without it, and apply the run to this one"
            )

    def fresh_scheduler(self, n_steps: int) -> Any:
        """Return a scheduler of the pipeline's kind, ready for `n_steps`. The pipeline's own is left alone.

        Raises:
            DiffesError: there are more steps than training timesteps, or none, or the scheduler does not count in
                training timesteps.
        """
        if not 1 <= n_steps <= self.n_timesteps:
            raise DiffesError(f"steps must be in [1, {self.n_timesteps}], got {n_steps}")
        if not hasattr(self.own_scheduler, "alphas_cumprod"):
            raise _no_training_timestep(type(self.own_scheduler).__name__)
        scheduler = copy.deepcopy(self.own_scheduler)
        scheduler.set_timesteps(n_steps, device=self.device)
        return scheduler

    def ready(self, steps: int | Any) -> Any:
        """Return a new scheduler: one of the pipeline's kind for a number of steps, or a copy of a ready one."""
        return self.fresh_scheduler(steps) if isinstance(steps, int) else copy.deepcopy(steps)

    @torch.no_grad()
    def sample(self, probes: Probes, steps: int | Any, guidance: float) -> Tensor:
        """Sample a whole run with the denoiser as it is, and return its final latents (n, C, h, w).

        Args:
            probes: noise and conditions of the images.
            steps: number of steps of the pipeline's scheduler, or a scheduler that has its timesteps set.
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
        """Return the result of `run(n)` for n images at a time: `batch`, or as many as the device has room for.

        Where the device runs out of memory, `run` is called again with half of the images, and so on. The number that
        fits is remembered.

        Args:
            run: begins anew whenever it is called.
            batch: number of images at a time where there is room for them.
            free: frees memory. Where memory runs out, it is called first, and `run` is tried again with as many images.
            what: use of the images; gradients need more room than calls.

        Raises:
            DiffesError: there is no room for a single image.
        """
        halves = free is None
        while True:
            n = max(1, min(batch, self.room.get(what, batch)))
            try:
                return run(n)
            except torch.OutOfMemoryError as error:
                said = " ".join(str(error).split())[:200]
            if free is not None:  # outside the except clause, where the error no longer holds tensors
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
        """Return latents as the autoencoder reads them, bit-identical to the arithmetic of the family's pipeline."""
        return latents / self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (n, channels, height, width) in [0, 1] of latents (n, C, h, w)."""
        vae = self.pipe.vae
        with _in_float32(vae):
            scaled = self.unscale(latents.to(vae.dtype))
            side = scaled.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
            samples = torch.cat([vae.decode(part).sample for part in scaled.split(_images_at_once(side))])
        return (samples / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return latents (n, C, h, w), scaled for the denoiser, of images (n, channels, height, width) in [0, 1]."""
        vae = self.pipe.vae
        with _in_float32(vae):
            parts = (images.to(vae.device, vae.dtype) * 2 - 1).split(_images_at_once(images.shape[-1]))
            encoded = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
        return (encoded * vae.config.scaling_factor).to(self.dtype)


def _no_training_timestep(scheduler: str, reason: str = "it has no noise schedule of variances") -> DiffesError:
    return DiffesError(
        f"{scheduler} does not count in training timesteps ({reason}), but stages are ranges of them: give the "
        "pipeline another scheduler, for instance DPMSolverMultistepScheduler.from_config, or "
        "EulerDiscreteScheduler.from_config with timestep_type='discrete'"
    )


def check_finite(tensor: Tensor, what: str) -> None:
    """Check that numbers can be used for calibration and comparison.

    Raises:
        DiffesError: some are NaN or infinite.
    """
    if not torch.isfinite(tensor).all():
        raise DiffesError(
            f"the {what} are NaN or infinite. Half precision overflows, for instance in SDXL's autoencoder in float16: "
            "choose dtype bfloat16 or float32, or a pipeline whose autoencoder is made for float16"
        )


def unwrapped(module: Any) -> Any:
    """Return the module itself, without the wrapper of `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def _images_at_once(side: int) -> int:
    """Return how many square images an autoencoder takes in one call; their full-size activations fill a GPU."""
    return max(1, 2**21 // side**2)


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Run an fp16 autoencoder in fp32 inside the context, where its configuration says that it overflows in half
    precision (`force_upcast`, set for SDXL's)."""
    before = vae.dtype
    upcasts = before == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcasts:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcasts:
            vae.to(before)
