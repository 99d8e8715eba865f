"""Base class of model adapters: how a pipeline is sampled by its own call, and where a family has prunable groups."""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffes.adapters.blocks import form_of
from diffes.adapters.drive import Answers, Drive, FirstCall, Texts, latents_of, unwrapped
from diffes.adapters.groups import (
    PLAIN_PROCESSORS,
    AnySet,
    BlockSet,
    BranchSet,
    GroupSet,
    NoHeads,
    UpLayerSet,
    norm_across_heads,
)
from diffes.adapters.guidance import ClassifierFreeGuidance, Scales
from diffes.errors import DiffesError
from diffes.files import parse_json
from diffes.solvers import NoiseProcess, own_of
from diffes.solvers.scheduler import PlanScheduler

T = TypeVar("T")
GOLDEN = (5**0.5 - 1) / 2
Split = Literal["search", "heldout", "calibration"]  # disjoint sets of prompts
DENOISERS = ("transformer", "unet", "prior", "denoiser", "dit")  # names of what pipelines call in every step
CONDITIONS = ("prompt", "class_labels")  # arguments that hold a condition of each image
CALL = "call.json"  # arguments of every call of a pipeline, in its folder
CACHED_CALLS = 16  # denoiser calls whose arguments are kept
SET_HERE = {  # arguments that a user's call must leave out
    "generator": "every probe has a seed of its own",
    "guidance_scale": "it is the setting guidance",
    "num_inference_steps": "a plan says how many calls are made",
    "num_images_per_prompt": "a probe is one image",
    "num_videos_per_prompt": "a probe is one video",
    "timesteps": "the timesteps are what is searched",
    "sigmas": "the timesteps are what is searched",
    "latents": "every probe has noise of its own",
    "output_type": "latents are compared, and images where a metric asks for them",
    "return_dict": "the result is read here",
}
Condition = int | str | None  # a class id, a prompt, or the null condition of classifier-free guidance


@dataclass(frozen=True)
class Probes:
    """Images that are sampled again and again: seeds of their noise, conditions, and guidance scales. They stay the
    same when the model changes, so that its images can be compared.

    Args:
        seeds: n seeds; each image has a generator of its own, from which the pipeline draws its noise.
        conditions: n class ids or prompts.
        guidance: n guidance scales, each above 1; None where every probe uses the scale of the call.

    Example:
        >>> probes = Probes((5, 6, 7, 8), (0, 1, 2, 3)).over(2.0, 4.0)
        >>> probes.guidance
        (3.236, 2.472, 3.708, 2.944)
        >>> probes[:2].seeds
        (5, 6)
    """

    seeds: tuple[int, ...]
    conditions: tuple[Condition, ...]
    guidance: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, part: slice) -> Probes:
        return Probes(self.seeds[part], self.conditions[part], self.guidance and self.guidance[part])

    def over(self, low: float, high: float) -> Probes:
        """Return the same probes with a guidance scale each. The scales of any first few probes are spread evenly over
        the range (multiples of the golden ratio, modulo 1)."""
        shares = [i * GOLDEN % 1 for i in range(1, len(self) + 1)]
        return replace(self, guidance=tuple(round(low + (high - low) * share, 3) for share in shares))


@dataclass(frozen=True)
class SamplingState:
    """State of a trajectory between two steps: everything that the remaining steps depend on.

    Args:
        latents: input of the next step, as the pipeline holds it (`DiTPipeline` with guidance: each image twice); None
            before the first step, for which the pipeline draws noise.
        scheduler: the sampler with its memory of earlier steps (multi-step solvers have one).
        index: number of steps done.
        images: n, the number of images.
        memory: outputs of earlier calls that the denoiser may reuse (see `diffes.runtime.memory`); None where nothing
            is reused.
        drive: the pipeline's call that waits at this state; None where a new call has to begin here.
    """

    latents: Tensor | None
    scheduler: Any
    index: int
    images: int
    memory: Any = None
    drive: Drive | None = None


@dataclass(frozen=True)
class Call:
    """Denoiser call of a run: what the pipeline gives its scheduler.

    Args:
        output: prediction, guidance included.
        latents: the latents that belong to it, of the same shape.
        drive: the pipeline's call, which waits for the next latents.
    """

    output: Tensor
    latents: Tensor
    drive: Drive


class ModelAdapter:
    """Interface to one pipeline, which is sampled by its own call. Subclasses know where families have prunable groups.

    This class itself serves pipelines of every family: plans of dense calls need nothing else than the pipeline's call
    and its scheduler. An adapter of a family is found by the name of its pipeline's class, or of that class's nearest
    base, in the entry points `diffes.adapters`.

    Args:
        pipe: a loaded diffusers pipeline; put in eval mode.

    Attributes:
        argument: name of the argument of the pipeline's call that holds the conditions, one an image; None where images
            have none.
        lists: whether the pipeline's call takes lists of conditions and generators.
        merges: whether the branches of guidance are rows of one denoiser call, two where the scale is above 1.
        null_first: whether the rows with the null condition come first in the pipeline's guided calls.
        unguided: a guidance scale at which the denoiser sees the given conditions only.
        time_scale: the timestep in a denoiser call over that of the scheduler; None where diffes does not know it.
        time_origin: timestep in a denoiser call where that of the scheduler is 0.
        call: further arguments of every call of the pipeline.
        room: largest number of images at a time that the device was found to have room for, by use: "calls" or
            "gradients".
    """

    argument: str | None = None
    lists: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    null_first: ClassVar[bool] = False
    unguided: ClassVar[float] = 1.0
    time_scale: ClassVar[float | None] = None
    time_origin: ClassVar[float] = 0.0

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.room: dict[str, int] = {}
        self._rows: dict[float, int] = {}
        self.call: dict[str, Any] = {}
        self._checked_sampler: Any = None
        self._clock: Any = None
        self._process: tuple[Any, NoiseProcess] | None = None
        self._answers, self._texts = Answers(), Texts()
        self._replayed: OrderedDict[tuple[Condition, ...], FirstCall] = OrderedDict()
        if self.folder is not None and (self.folder / CALL).is_file():
            self.use_call(read_call(self.folder / CALL))
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()

    @property
    def folder(self) -> Path | None:
        """Local folder that the pipeline was loaded from; None where it was built in Python or is a hub's."""
        name = self.pipe.config.get("_name_or_path")
        return Path(name) if name and Path(name).is_dir() else None

    @cached_property
    def denoisers(self) -> list[str]:
        """Names of the pipeline's components that are called in every step.

        Raises:
            DiffesError: none is found.
        """
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        found = [name for name in parts if name.rstrip("_0123456789") in DENOISERS]
        beside = [name for name in parts if name.startswith("controlnet")]  # called with them
        if not found:
            raise DiffesError(
                f"no denoiser is found among the components of {type(self.pipe).__name__} ({', '.join(parts)}): it is "
                f"called {' or '.join(DENOISERS)} in the pipelines that diffes knows"
            )
        return [*found, *beside]

    @property
    def denoiser(self) -> Any:
        """The network that is called in every step, an `nn.Module`; typed loosely because diffusers' attributes are."""
        return unwrapped(getattr(self.pipe, self.denoisers[0]))

    def blocks(self) -> list[str]:
        """Return the module paths of all transformer blocks, in the order of the forward pass; none where diffes does
        not know the family."""
        return []

    def timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """Return the training timestep of a denoiser call, from its arguments: the second one, or the one of that name.
        NaN where diffes does not know what the denoiser is told.

        Raises:
            DiffesError: the rows are at different timesteps, or the timestep is below 0.
        """
        if self.time_scale is None:
            return math.nan
        first = self.process.told_at(0)
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timesteps = given.flatten().tolist() if isinstance(given, Tensor) else [given]
        told = (float(timesteps[0]) - self.time_origin) / self.time_scale
        timestep = max(told - first, 0.0) if told >= 0 else told  # shifted sigmas may end below the first timestep
        if any(other != timesteps[0] for other in timesteps):
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

    def rows_per_image(self, guidance: float) -> int:
        """Return the denoiser calls of a step, in rows, for each image."""
        if self.merges:
            return self.guided(guidance).branches
        if guidance not in self._rows:  # counted in a step: other families may call several times
            rows, module = list[int](), self.denoiser
            hook = module.register_forward_pre_hook(
                lambda _module, args, kwargs: rows.append(len(latents_of(args, kwargs)[1])), with_kwargs=True
            )
            probes = self.make_probes(1, 0)
            scheduler = PlanScheduler.of(self.own_scheduler, [self.reach - 1], "ddim", self.device)
            try:
                with torch.no_grad():
                    self.called(self.start(probes, scheduler, guidance), probes, guidance).drive.close()
            finally:
                hook.remove()
            self._rows[guidance] = sum(rows)
        return self._rows[guidance]

    @cached_property
    def conditions(self) -> dict[Split, list[Condition]]:
        """Conditions by split: those of the call that the adapter was given, of which every second one is held out.
        Where there is one condition only, or none, all splits have it."""
        given = self.call.get(self.argument) if self.argument else None
        known: list[Condition] = list(given) if isinstance(given, list | tuple) else [given]
        if len(known) == 1:
            return {"search": known, "heldout": known, "calibration": known}
        return {"search": known[::2], "heldout": known[1::2], "calibration": known[::2]}

    def choices(self, split: Split) -> Sequence[Condition]:
        """Return the conditions that probes of a split are drawn from."""
        return self.conditions[split]

    def label(self, condition: Condition) -> str:
        """Return the caption for an image of a condition."""
        return "" if condition is None else str(condition)

    def use_prompts(self, path: Path) -> None:
        """Draw probes from the prompts of a file (see `diffes.adapters.prompts.read_prompts`).

        Raises:
            DiffesError: the model takes no prompts, or the file is not of that form.
        """
        raise DiffesError(f"{type(self.pipe).__name__} takes class ids, not prompts: leave --prompts {path} out")

    def use_call(self, call: Mapping[str, Any]) -> None:
        """Make every call of the pipeline with these arguments. Conditions among them, a list or a single one, are
        those that probes are drawn from (see `conditions`).

        Raises:
            DiffesError: the pipeline takes no such argument, or diffes sets it itself.
        """
        known = self._parameters
        for name in (each for each in CONDITIONS if each in call):
            given = call[name] if isinstance(call[name], list | tuple) else [call[name]]
            if not len(given) or any(isinstance(each, str) and not each.strip() for each in given):
                raise DiffesError(f"{name} of the call holds one condition or more, none empty, got {call[name]!r}")
        for name in call:
            if name in SET_HERE:
                raise DiffesError(f"leave {name} out of the call: {SET_HERE[name]}")
            if name not in known:
                raise DiffesError(
                    f"{type(self.pipe).__name__} takes no argument {name!r}; it takes {', '.join(list(known)[1:])}"
                )
        if self.argument is None:
            self.argument = next((name for name in CONDITIONS if call.get(name) is not None), None)
        self.call = dict(call)
        self.__dict__.pop("conditions", None)
        self._replayed.clear()
        self._rows.clear()

    def use_given(self, call: Any, guidance: T | None) -> T | float:
        """Make every call of the pipeline with a user's arguments, and return the guidance scale that they are for.

        Args:
            call: arguments by name, `guidance_scale` maybe among them, or the path of a JSON file of them.
            guidance: scale that was given beside the call; None where none was.

        Returns:
            That scale, or the one of the call, or the pipeline's default.

        Raises:
            DiffesError: both are given, or the arguments are not usable (see `use_call`).
        """
        arguments = read_call(Path(call)) if isinstance(call, str) else call
        if not isinstance(arguments, Mapping):
            raise DiffesError(f"call holds arguments of the pipeline's call by name, got {type(arguments).__name__}")
        scale = arguments.get("guidance_scale")
        if scale is not None and guidance is not None:
            raise DiffesError(f"guidance={guidance} and guidance_scale={scale} of the call: leave one out")
        self.use_call({name: value for name, value in arguments.items() if name != "guidance_scale"})
        if guidance is not None:
            return guidance
        return self.default_guidance if scale is None else float(scale)

    def configure(self, prompts: str | None, call: str | None) -> None:
        """Draw probes from the prompts of a file, and make calls with the arguments in another, where they are named.

        Raises:
            DiffesError: the model takes no prompts or no such arguments, or a file is not of its form.
        """
        if prompts is not None:
            self.use_prompts(Path(prompts))
        if call is not None:
            self.use_call(read_call(Path(call)))

    @property
    def batched(self) -> bool:
        """True where a call makes several images. Pipelines that begin with an image of the user's make one a call."""
        return self.lists and "image" not in self.takes

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return dict(inspect.signature(type(self.pipe).__call__).parameters)  # a dict can be copied deeply

    @property
    def takes(self) -> Collection[str]:
        """Names of the arguments of the pipeline's call."""
        return self._parameters.keys()

    @property
    def default_guidance(self) -> float:
        """Guidance scale of a call of the pipeline that names none; 1 where the pipeline takes none."""
        return float(self._parameters["guidance_scale"].default) if self._has_scale else 1.0

    @property
    def _has_scale(self) -> bool:
        known = self._parameters.get("guidance_scale")
        return known is not None and isinstance(known.default, int | float)

    def call_of(self, probes: Probes, guidance: float) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that makes these images, without its scheduler's steps."""
        generators = [torch.Generator().manual_seed(seed) for seed in probes.seeds]
        made = dict(self.call)
        if self.argument is not None:
            conditions = list(probes.conditions)
            made[self.argument] = conditions if self.batched else conditions[0]
        if self._has_scale:
            scales = probes.guidance
            several = scales is not None and self.batched
            made["guidance_scale"] = Scales(guidance, scales or ()) if several else scales[0] if scales else guidance
        if self._changes_latents:
            made["output_type"] = "latent"
        return made | {"generator": generators if self.batched else generators[0]}

    @property
    def _changes_latents(self) -> bool:
        """True where the pipeline, or a callback of the call, changes latents after the scheduler's last step."""
        return "output_type" in self.takes and ("mask_image" in self.takes or "callback_on_step_end" in self.call)

    def start(self, probes: Probes, steps: int | Any, guidance: float) -> SamplingState:
        """Return the state before the first step of a run of `steps` steps, or of a scheduler with timesteps set."""
        if not self.batched and len(probes) > 1:
            raise DiffesError(f"a call of {type(self.pipe).__name__} makes one image here, got {len(probes)} probes")
        return SamplingState(None, self.ready(steps), 0, len(probes))

    def called(self, state: SamplingState, probes: Probes, guidance: float) -> Call:
        """Make the next denoiser call of a run, exactly as the pipeline does. The state's scheduler counts the call."""
        drive = state.drive
        if drive is None or drive.index != state.index:
            drive = self._drive(probes, guidance, state.scheduler, state.index)
        with self.counted_by(state.scheduler):
            output, latents = drive.next(state.latents)
        scale = drive.argument("guidance_scale")
        if isinstance(scale, Scales) and scale > 1 and not scale.used:
            drive.close()
            raise DiffesError(
                f"{type(self.pipe).__name__} does not mix branches by a guidance scale for each image, so a plan for a "
                "range of guidance cannot be fitted: give one scale"
            )
        return Call(output, latents, drive)

    def _drive(
        self,
        probes: Probes,
        guidance: float,
        scheduler: Any,
        index: int = 0,
        n_steps: int | None = None,
        **options: Any,
    ) -> Drive:
        """Begin a call of the pipeline. With `n_steps` the pipeline sets the scheduler's timesteps."""
        call, n = self.call_of(probes, guidance) | options, len(scheduler.timesteps) if n_steps is None else n_steps
        if "num_inference_steps" in self.takes:
            call["num_inference_steps"] = n
        return Drive(
            self.pipe, self.denoisers, call, scheduler, index=index, answers=self._answers, texts=self._texts,
            prepared=n_steps is None, strength=self.strength,
        )  # fmt: skip

    def advance(self, state: SamplingState, call: Call) -> SamplingState:
        """Make the scheduler's step. Samplers that add noise draw the same noise for every schedule, so that schedules
        can be compared."""
        scheduler = state.scheduler
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(state.index)} if draws else {}
        timestep = scheduler.timesteps[state.index]
        after = scheduler.step(call.output, timestep, call.latents, **options).prev_sample
        ended = state.index + 1 == len(scheduler.timesteps)
        if ended and self._changes_latents:
            found = call.drive.output(after)[0]
            after = found if isinstance(found, Tensor) and found.shape == after.shape else after
        elif ended:
            call.drive.close()
        return SamplingState(after, scheduler, state.index + 1, state.images, drive=None if ended else call.drive)

    def step(self, state: SamplingState, probes: Probes, guidance: float) -> SamplingState:
        """Make one denoiser call and one scheduler step, exactly as the pipeline does."""
        return self.advance(state, self.called(state, probes, guidance))

    def finish(self, state: SamplingState) -> Tensor:
        """Return the final latents (n, ...) of a finished trajectory."""
        assert state.latents is not None
        return state.latents[: state.images]

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

    @property
    def process(self) -> NoiseProcess:
        """Noise process of the pipeline's own scheduler.

        Raises:
            DiffesError: diffes does not know it.
        """
        if self._process is None or self._process[0] is not self.own_scheduler:
            self._process = self.own_scheduler, NoiseProcess.of(self.own_scheduler)
        return self._process[1]

    def _first_call(self, conditions: Sequence[Condition], seeds: Sequence[int], guidance: float) -> FirstCall:
        """Return the arguments of the first denoiser call on images, under a scheduler that does not scale latents."""
        scheduler = PlanScheduler.of(self.own_scheduler, [self.reach - 1], "ddim", self.device)
        probes = Probes(tuple(seeds), tuple(conditions))
        with torch.no_grad():
            return self._drive(probes, guidance, scheduler).first_call()

    def noise(self, probes: Probes) -> Tensor:
        """Return the noise (n, ...) that the pipeline begins with."""
        parts = [probes] if self.batched else [probes[i : i + 1] for i in range(len(probes))]
        calls = [self._first_call(part.conditions, part.seeds, self.unguided) for part in parts]
        return torch.cat([latents_of(*call)[1] for call in calls])

    def denoise_once(self, latents: Tensor, timesteps: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Make a bare denoiser call: return predictions (n, ...) for latents (n, ...) at timesteps (n,).

        The arguments are those of a call of the pipeline on these conditions, with other latents and timesteps. None
        among the conditions is the null condition.
        """
        given, named = self._arguments(tuple(conditions))
        args, kwargs = list(given), dict(named)
        place, _ = latents_of(args, kwargs)
        holder: Any = kwargs if isinstance(place, str) else args
        listed = isinstance(holder[place], list)
        holder[place] = list(latents) if listed else latents
        if self.time_scale is not None:
            told = self.process.told(timesteps.to(self.device))
            told = told if self.time_scale == 1 else self.time_origin + told * self.time_scale
            at: Any = "timestep" if "timestep" in kwargs else 1
            before = (kwargs if at == "timestep" else args)[at]
            float_told = isinstance(before, Tensor) and before.is_floating_point()
            (kwargs if at == "timestep" else args)[at] = told.to(before.dtype) if float_told else told
        found = self.denoiser(*args, **kwargs)[0]
        return torch.stack(found) if listed else found

    def _arguments(self, conditions: tuple[Condition, ...]) -> FirstCall:
        """Return the arguments of a denoiser call with a row for each condition."""
        if conditions in self._replayed:
            self._replayed.move_to_end(conditions)
            return self._replayed[conditions]
        nulls = [i for i, condition in enumerate(conditions) if condition is None]
        guided = bool(nulls) and self.argument is not None
        if guided and not self.merges:
            raise DiffesError(f"{type(self).__name__} makes no denoiser calls with the null condition")
        stand_in = next((c for c in conditions if c is not None), self.choices("search")[0])
        known = [stand_in if condition is None else condition for condition in conditions]
        found = self._first_call(known, [0] * len(known), 2.0 if guided else self.unguided)
        n = len(conditions)
        if guided and len(latents_of(*found)[1]) == 2 * n:
            first, second = (n, 0) if self.null_first else (0, n)  # where rows with and without condition begin
            rows = torch.tensor([(second if i in nulls else first) + i for i in range(n)], device=self.device)
            found = tree_map_only(Tensor, lambda x: x[rows.to(x.device)] if x.dim() and len(x) == 2 * n else x, found)
        self._replayed[conditions] = found
        while len(self._replayed) > CACHED_CALLS:
            self._replayed.popitem(last=False)
        return found

    @torch.no_grad()
    def generate(
        self, conditions: Sequence[Condition], *, n_steps: int, guidance: float, generator: torch.Generator
    ) -> Tensor:
        """Return images (n, channels, height, width) in [0, 1] from the pipeline's own call.

        Args:
            conditions: n conditions.
            n_steps: sampling steps.
            guidance: classifier-free guidance scale.
            generator: noise of all images.
        """
        self.check_conditions(conditions)
        parts = [conditions] if self.batched else [[condition] for condition in conditions]
        found = []
        for part in parts:
            call = self.call_of(Probes((0,) * len(part), tuple(part)), guidance)
            options = {"num_inference_steps": n_steps, "output_type": "np"}
            call |= {name: value for name, value in options.items() if name in self.takes} | {"generator": generator}
            found.append(_pixels(self.pipe(**call)))
        return torch.cat(found)

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        """Check conditions that a user asks for.

        Raises:
            DiffesError: the pipeline does not know one.
        """

    def max_level(self, kind: str) -> int:
        """Return H. Under the equal allocation, level `k` removes `k / H` of every group set.

        Width: the number of heads, the largest where layers differ (SDXL has 10 and 20); a layer with fewer rounds to
        whole heads. Depth: the number of blocks. Reuse of attentions and FFNs: as many levels as width.
        """
        if kind == "depth":
            return max(len(self.blocks()), 1)
        layers = (self.denoiser.get_submodule(path) for path in self.branches().sources)
        return max((int(layer.heads) for layer in layers if hasattr(layer, "heads")), default=1)

    def prunable(self, kind: str) -> Sequence[AnySet]:
        """Return the sets that methods of a kind remove or reuse. Kinds of several methods are joined by "+".

        Raises:
            DiffesError: the pipeline has several denoisers, so that no level has one cost.
        """
        several = [name for name in self.denoisers if not name.startswith("controlnet")]
        if len(several) > 1:
            raise DiffesError(
                f"{type(self.pipe).__name__} has {len(several)} denoisers ({', '.join(several)}), and diffes prunes "
                "pipelines with one: search plans of dense calls (--genes steps)"
            )
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
        blocks = [(path, self.denoiser.get_submodule(path)) for path in self.blocks()]
        found = [each for path, block in blocks for each in form_of(block).branches(path, block)]
        return BranchSet(tuple(each[0] for each in found), tuple(each[1:] for each in found))

    def up_layers(self) -> UpLayerSet | None:
        """Return the layers of a U-Net's decoder path; None where the denoiser is no U-Net."""
        return None

    def group_sets(self) -> list[GroupSet]:
        """Return the heads and FFN channels of every block, in the order of the forward pass."""
        submodule = self.denoiser.get_submodule
        return [groups for path in self.blocks() for groups in form_of(submodule(path)).sets(path, submodule(path))]

    def whole_attentions(self) -> list[str]:
        """Return the paths of attention layers whose heads cannot be removed, because a norm runs across them all."""
        sources = [(path, self.denoiser.get_submodule(path)) for path in self.branches().sources]
        return [path for path, layer in sources if hasattr(layer, "heads") and norm_across_heads(layer)]

    def skipped(self, block: nn.Module) -> Callable[..., Any]:
        """Return the forward that a block gets when it is skipped. The block itself stays in the model."""
        return form_of(block).skipped

    def without_heads(self, attention: nn.Module) -> Any:
        """Return the forward of an attention layer that has lost all its heads: it is called with the layer, then the
        arguments of the forward. Return None where the layer's own processor, such as the user's, must see the call."""
        return NoHeads() if type(attention.processor) in PLAIN_PROCESSORS else None

    def make_probes(self, n: int, seed: int, split: Split = "search") -> Probes:
        """Draw `n` probes with balanced conditions. Probe i depends on `seed`, i and, for its condition, `split`."""
        choices = self.choices(split)
        turns = [
            torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed * 100_003 + turn))
            for turn in range(n // len(choices) + 1)
        ]
        seeds = tuple((seed * 100_003 + i) % (1 << 63) for i in range(n))
        return Probes(seeds, tuple(choices[i] for i in torch.cat(turns)[:n].tolist()))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the denoiser's input at training timesteps (n,): `alpha x + sigma e` (n, ...).

        This is the forward process of the scheduler's noise schedule. Samplers that count in sigmas (Euler, Heun) add
        noise only at the timesteps of a run and scale it afterwards, with the same result.
        """
        # in fp32: bf16 has no number between 0.996 and 1, so the cleanest timesteps would get no noise at all
        alphas, sigmas = (each.to(latents.device) for each in self._scales(timesteps, latents.dim()))
        return (alphas * latents.float() + sigmas * noise.to(latents.device).float()).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the training target of the denoiser (n, ...) for clean latents noised to timesteps (n,)."""
        kind = self.process.prediction
        if kind == "v_prediction":
            alphas, sigmas = self._scales(timesteps, latents.dim())
            return alphas * noise - sigmas * latents
        return {"epsilon": noise, "sample": latents, "flow_prediction": noise - latents}[kind]

    def _scales(self, timesteps: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at timesteps (n,), in fp32, with `dim` dimensions."""
        shape = (-1, *[1] * (dim - 1))
        chosen = timesteps.cpu().numpy()
        alphas, sigmas = (torch.from_numpy(each[chosen]) for each in (self.process.alphas, self.process.sigmas))
        return alphas.float().view(shape), sigmas.float().view(shape)

    def log_snr(self, timestep: int) -> float:
        """Return the natural logarithm of the signal-to-noise ratio, in variances, at a training timestep."""
        return 2 * self.process.at(timestep).log_snr

    @property
    def device(self) -> torch.device:
        """Device on which the denoiser computes."""
        if "_hf_hook" in vars(self.denoiser):  # its parameters are elsewhere between calls
            return torch.device(self.pipe._execution_device)
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser's parameters."""
        return next(self.denoiser.parameters()).dtype

    @property
    def n_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return int(self.own_scheduler.config.num_train_timesteps)

    @property
    def strength(self) -> float | None:
        """Share of the trajectory that the pipeline samples, from an image of the call; None where it samples all."""
        known = self._parameters.get("strength")
        given = self.call.get("strength", known.default if known is not None else None)
        return float(given) if isinstance(given, int | float) and given < 1 else None

    @property
    def reach(self) -> int:
        """Number of training timesteps that plans choose from: all of them, or with a strength s the cleanest s T."""
        return self.n_timesteps if self.strength is None else max(round(self.strength * self.n_timesteps), 1)

    def timesteps(self, n_steps: int) -> list[float]:
        """Return the training timesteps of a sampling run, one per denoiser call (Heun makes two a step), noisiest
        first."""
        first = self.process.told_at(0)
        return [max(float(t) - first, 0.0) if t >= 0 else float(t) for t in self.fresh_scheduler(n_steps).timesteps]

    def check_sampler(self) -> None:
        """Check that the scheduler counts in training timesteps, because stages are ranges of these.

        Raises:
            DiffesError: its timesteps are something else (logarithms of sigmas, or fractions of the trajectory).
        """
        if self.own_scheduler is self._checked_sampler or self.device.type == "meta":
            return
        scheduler = copy.deepcopy(self.own_scheduler)  # not by a run of the pipeline: this may be inside of one
        shifts = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(min(10, self.n_timesteps), **shifts)
        visited = [float(t) for t in scheduler.timesteps]
        if min(visited) < 0 or 2 * max(visited) < self.n_timesteps:
            raise _no_training_timestep(
                type(self.own_scheduler).__name__, f"it goes from {max(visited):.4g} to {min(visited):.4g}"
            )
        self._checked_sampler = self.own_scheduler

    def fresh_scheduler(self, n_steps: int) -> Any:
        """Return a scheduler of the pipeline's kind, ready for `n_steps`. The pipeline's own is left alone.

        Raises:
            DiffesError: there are more steps than training timesteps, or none, or the scheduler does not count in
                training timesteps.
        """
        if not 1 <= n_steps <= self.n_timesteps:
            raise DiffesError(f"steps must be in [1, {self.n_timesteps}], got {n_steps}")
        _ = self.process  # refuses schedulers that do not count in training timesteps
        scheduler = copy.deepcopy(self.own_scheduler)
        if "mu" in inspect.signature(scheduler.set_timesteps).parameters:  # the pipeline knows what sigmas it wants
            probes = self.make_probes(1, 0)
            with torch.no_grad():
                self._drive(probes, 1.0, scheduler, n_steps=n_steps).first_call()
        else:
            scheduler.set_timesteps(n_steps, device=self.device)
        return scheduler

    def ready(self, steps: int | Any) -> Any:
        """Return a new scheduler: one of the pipeline's kind for a number of steps, or a copy of a ready one."""
        return self.fresh_scheduler(steps) if isinstance(steps, int) else copy.deepcopy(steps)

    @torch.no_grad()
    def sample(self, probes: Probes, steps: int | Any, guidance: float) -> Tensor:
        """Sample a whole run with the denoiser as it is, and return its final latents (n, ...).

        Args:
            probes: noise and conditions of the images.
            steps: number of steps of the pipeline's scheduler, or a scheduler that has its timesteps set.
            guidance: classifier-free guidance scale.
        """

        def sampled(part: Probes) -> Tensor:
            state = self.start(part, steps, guidance)
            for _ in range(len(state.scheduler.timesteps)):
                state = self.step(state, part, guidance)
            return self.finish(state)

        def run(n: int) -> Tensor:
            return torch.cat([sampled(probes[i : i + n]) for i in range(0, len(probes), n)])

        return self.within_room(run, len(probes) if self.batched else 1)

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

    @cached_property
    def makes_images(self) -> bool:
        """True where the pipeline makes images (n, channels, height, width) of latents, and not video or sound."""
        try:
            self.decode(self.noise(self.make_probes(1, 0)))
        except DiffesError:
            return False
        return True

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (n, channels, height, width) in [0, 1] of final latents (n, ...), as the pipeline makes them.

        Raises:
            DiffesError: the pipeline makes no images.
        """
        return torch.cat([_pixels(output) for output in self.render(latents)]).to(self.device)

    @torch.no_grad()
    def render(self, latents: Tensor) -> list[Any]:
        """Return the outputs of the pipeline's calls that end with these latents (n, ...)."""
        side = latents.shape[-1] * 8
        parts = latents.to(self.device, self.dtype).split(_images_at_once(side) if self.batched else 1)
        return [self._rendered(part) for part in parts]

    def _rendered(self, latents: Tensor) -> Any:
        """Return what the pipeline makes of final latents: a run whose calls are all made."""
        scheduler = PlanScheduler.of(self.own_scheduler, [self.reach - 1], "ddim", self.device)
        probes = Probes((0,) * len(latents), (self.choices("search")[0],) * len(latents))
        options: dict[str, Any] = {"output_type": "np"} if "output_type" in self.takes else {}
        return self._drive(probes, self.unguided, scheduler, 1, **options).output(latents)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return latents (n, C, h, w), scaled for the denoiser, of images (n, channels, height, width) in [0, 1]."""
        vae: Any = getattr(self.pipe, "vae", None)
        if vae is None:
            raise DiffesError(f"{type(self.pipe).__name__} has no autoencoder, so images cannot calibrate it")
        with _in_float32(vae):
            parts = (images.to(vae.device, vae.dtype) * 2 - 1).split(_images_at_once(images.shape[-1]))
            encoded = torch.cat([_mean_of(vae.encode(part)) for part in parts])
        scale, shift = getattr(vae.config, "scaling_factor", 1.0), getattr(vae.config, "shift_factor", None)
        return ((encoded - (shift or 0.0)) * scale).to(self.dtype)


def read_call(path: Path) -> dict[str, Any]:
    """Read arguments of a pipeline's call by name from a JSON file.

    Raises:
        DiffesError: there is none, or it holds something else.
    """
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DiffesError(f"{path} holds no arguments of a call ({error}): expected a JSON object") from error
    if not isinstance(found, dict):
        raise DiffesError(f"{path} holds no arguments of a call: expected a JSON object, got {type(found).__name__}")
    return found


def _mean_of(encoded: Any) -> Tensor:
    """Return the latents of an autoencoder's result: the mean of a distribution, or the latents themselves."""
    found: Tensor = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    return found


def _pixels(output: Any) -> Tensor:
    """Return the images (n, channels, height, width) of a pipeline's output.

    Raises:
        DiffesError: it holds something else.
    """
    found = output[0]
    pixels = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        shape = tuple(getattr(pixels, "shape", ())) or type(found).__name__
        raise DiffesError(f"the pipeline makes no images that metrics can compare, got {shape}: take a latent metric")
    return pixels.permute(0, 3, 1, 2) if isinstance(found, np.ndarray) else pixels


def _no_training_timestep(scheduler: str, reason: str) -> DiffesError:
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
