"""Router: loads the pruned weights of a stage into the denoiser when the sampler enters the stage."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffes.adapters import AnySet, Kind, ModelAdapter
from diffes.errors import DiffesError, DiffesWarning
from diffes.pruning.bank import StageWeights, WeightBank
from diffes.runtime.checks import check_cuttable, check_not_offloaded, replaced, tree_of, written
from diffes.runtime.in_place import copied, unshared
from diffes.runtime.memory import Memory, ReusePart
from diffes.runtime.parts import DepthPart, Part, SharedPart, SwappedPart, WidthPart
from diffes.runtime.resident import Resident, limit_of
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Plan, Schedule

FAR = 2.0  # factor by which guidance may differ from that of a plan before a warning
HALF_PRECISION = 4.5  # largest error of a timestep below 1000 that is passed in bf16
SPOILT = "is in rows of the dense ones, because resident='stream' makes no copies of them: load the model again"


class Router:
    """Router of one schedule or plan at a time through one denoiser.

    A pre-forward hook reads the timestep of every call. Where its stage or level differs from that of the last call,
    the bank's weights for it are loaded. Width: the parameters of the prunable layers are swapped; attention modules
    keep their processors, and only their number of heads changes; LoRA matrices on these layers are cut to match.
    Depth: skipped blocks return their input. Reuse: layers return their output of the last call of the run that
    computed them; the first call of a run computes everything. The dense tensors themselves are kept and put back, so
    restoration is exact.

    The bank stays in host memory. The device holds the dense weights, the pruned weights of the present stage, and
    those that stay ready there. With "stream" it holds no more than the dense weights and one layer: pruned rows are
    the first rows of dense tensors, whose rows change places in their memory and are put back; pruned consumers take
    the place of dense ones, which wait in host memory. Anything else that reads that memory, such as a `state_dict`
    taken before, sees rows in another order while they are pruned. Where the model itself shares that memory, pruned
    layers are copies.

    Args:
        adapter: the model, dense.
        bank: pruned weights, at least those of the schedules routed.
        resident: which pruned layers stay ready on the device: "all" that were used, so that a change of stage or level
            moves nothing; "stream" (or 0) none, those in use lie in the memory of the dense weights; "auto" as many as
            fit into half of the memory that is free now; or a number of bytes.

    Attributes:
        schedule: the schedule or plan routed now; None while the model is dense.
        max_level: H, of the schedules that it routes.
        memory: outputs that the next call may reuse; None between runs, and where nothing is reused.
        timestep: of the last call.
        resident: cache of pruned layers on the device.
        guidance: lowest and highest scale that a plan was made for; None where unknown, or after the warning.

    `state_dict` and `load_state_dict` of the model, or of a part of it, read and write the dense weights. A deep copy
    of a routed model is routed too, by a router of its own.

    Raises:
        DiffesError: the model is offloaded, compiled inside or quantised, or carries adapters that cannot be cut.
    """

    def __init__(self, adapter: ModelAdapter, bank: WeightBank, *, resident: str | int = "auto") -> None:
        self.adapter = adapter
        self.bank = bank
        self.schedule: Schedule | Plan | None = None
        self.memory: Memory | None = None
        self.timestep = math.nan
        self.guidance: tuple[float, ...] | None = None
        self.max_level = bank.max_level or adapter.max_level(bank.kind)
        if len(bank):
            check_not_offloaded(adapter.denoiser)
            check_cuttable(adapter)
        device = next(adapter.denoiser.parameters()).device
        self.resident = Resident(resident if isinstance(resident, int) else limit_of(resident, device))
        alone = unshared(adapter.denoiser) if self.resident.limit == 0 else frozenset()
        self._parts = {p.name: self._part(p, alone) for p in adapter.prunable(bank.kind)}
        parts = [part for part in self._parts.values() if isinstance(part, WidthPart)]
        for path in dict.fromkeys(
            path for part in parts if part.groups.first is not None for path in part.groups.consumers
        ):
            sharing = [part for part in parts if path in part.groups.consumers]  # they are loaded before it
            self._parts[path] = SharedPart(adapter.denoiser.get_submodule(path), path, sharing, self.resident)
        self._tree = list(tree_of(adapter.denoiser, adapter.group_sets()))
        self._reuse = [part for part in self._parts.values() if isinstance(part, ReusePart)]
        self._keeps = False  # True to keep outputs that this schedule does not reuse
        self._wanted: frozenset[str] = frozenset()  # modules whose outputs are kept
        self._reused_until = -math.inf  # the last place of a run at which outputs are reused
        swapped = [part for part in self._parts.values() if isinstance(part, SwappedPart)]
        self._saved = list(_owners(adapter.denoiser, swapped))
        self._in_place = {module for part in parts if part.in_place for module in part.in_place.modules}
        self._current: StageWeights | None = None
        self._watching = False
        self._swapping = False  # an interrupted swap leaves it True: what is loaded is then unknown
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def _part(self, prunable: AnySet, alone: frozenset[int]) -> Part:
        make: dict[Kind, Callable[[Any], Part]] = {
            "width": lambda groups: WidthPart(self.adapter, groups, self.resident, alone),
            "depth": lambda blocks: DepthPart(self.adapter, blocks),
            "reuse": lambda layers: ReusePart(self.adapter, layers, self._remembered),
        }
        return make[prunable.kind](prunable)

    def _remembered(self) -> Memory:
        assert self.memory is not None  # layers are watched, and recalled, only in calls with a memory
        return self.memory

    def install(self, schedule: Schedule | Plan, *, keep: bool = False) -> None:
        """Route a schedule or a plan from the next denoiser call on, in place of any schedule before.

        Args:
            schedule: the schedule or plan to route.
            keep: True to keep also outputs in `memory` that this schedule does not reuse, for schedules that continue
                from here.

        Raises:
            DiffesError: the bank lacks a stage and level of the schedule, the schedule is for another model, or another
                router has changed the order of rows in this model's weights.
        """
        if schedule.max_level != self.max_level:
            raise DiffesError(
                f"the schedule has max_level {schedule.max_level}, this model {self.max_level} for {self.bank.kind} "
                "pruning: it was made for another model"
            )
        pruned = {key: self.bank[key] for key in schedule.pruned()}  # refused where the bank lacks one
        reused = [key for key, entry in pruned.items() if any(part.groups.name in entry for part in self._reuse)]
        if not self._hooks:
            for part in self._parts.values():
                part.check_dense()
        self.schedule, self.memory, self._keeps = schedule, None, keep
        self._wanted = frozenset(itertools.chain(*map(self._recalled, self.bank if keep and self._reuse else reused)))
        self._reused_until = max((_last(schedule, key) for key in reused), default=-math.inf)
        if not self._hooks:
            if any(part.changed for part in self._parts.values()):
                self.resident.clear()  # rows of producers, and LoRA matrices, may have been written to
            for part in self._parts.values():
                part.note()
            denoiser = self.adapter.denoiser
            self._hooks = [
                denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True),
                *([denoiser.register_forward_hook(self._after_call)] if self._reuse else []),
                *(module.register_state_dict_pre_hook(self._before_state) for module in self._saved),
                *(module.register_load_state_dict_pre_hook(self._before_state) for module in self._saved),
                *(module.register_state_dict_post_hook(copied) for module in self._in_place),
            ]

    def remove(self) -> None:
        """Make the denoiser dense again, bit for bit, and remove the hooks. A warning tells of changes written to
        pruned weights: they are lost or, where pruned rows are those of the dense weights, left in these."""
        parts = self._parts.values() if self._current is not None else ()
        lost, spoilt = any(part.changed for part in parts), any(part.spoilt for part in parts)
        self._load(None)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.schedule, self.memory = [], None, None
        for part in self._parts.values():
            part.released()
        if lost:
            self.resident.clear()
            warnings.warn(
                "weights of the model were written to while a schedule was routed through it, and what was written to "
                f"pruned layers {SPOILT if spoilt else 'is lost: write again, now that it is dense'}",
                DiffesWarning,
                stacklevel=2,
            )

    @contextmanager
    def routed(self, schedule: Schedule | Plan, *, keep: bool = False) -> Iterator[None]:
        """Route `schedule` inside the context, as `install` does, and make the model dense again at any exit."""
        try:
            self.install(schedule, keep=keep)
            yield
        finally:
            self.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.schedule is not None
        if len(self.bank):
            check_not_offloaded(self.adapter.denoiser)
        if not all(children.get(name) is module for children, name, module in self._tree):
            raise replaced()
        for part in self._parts.values():
            part.check_unchanged()
            self._swapping |= part.outdated()
        if isinstance(self.schedule, Schedule):
            self.adapter.check_sampler()
        self.timestep = timestep = self.adapter.timestep(args, kwargs)
        counted = isinstance(self.schedule, Plan)
        if isinstance(self.schedule, Plan):
            place: float = self._number(self.schedule, timestep)
            self._check_guidance()
            stage, level = self.schedule.keys()[int(place)]
        else:
            place, (stage, level) = -timestep, self.schedule.key(timestep)
        weights = self.bank[stage, level] if level else None
        watching = bool(self._reuse) and (self._keeps or place < self._reused_until)
        if watching or place == self._reused_until:
            self.memory = Memory.of_call(self.memory, place, counted, args, kwargs)
            if weights is not None and not self.memory.outputs.keys() >= set(self._recalled((stage, level))):
                weights = None
        self._load(weights, watching)

    def _number(self, plan: Plan, timestep: float) -> int:
        """Return the number of a plan's call, as the scheduler of the run counts it.

        Raises:
            DiffesError: no scheduler of the plan counts the run, its calls are all made, or the denoiser was called at
                another timestep than the scheduler gave.
        """
        clock = self.adapter.clock
        counts = isinstance(clock, PlanScheduler) and clock.plan == plan.timesteps and clock.index < len(plan.calls)
        if counts and not abs(clock.plan[clock.index] - timestep) >= HALF_PRECISION:  # NaN: not known
            return int(clock.index)
        raise DiffesError(
            f"the denoiser was called at timestep {timestep:g}, which is not the next call of the plan that is applied "
            f"(timesteps {list(plan.timesteps)}): it runs with the scheduler that diffes.apply puts into the pipeline, "
            "whose set_timesteps begins a run; call diffes.remove(pipe) to go back to other schedulers"
        )

    def _check_guidance(self) -> None:
        """Warn, once, where the pipeline's guidance scale is far above or below that of the plan. Text-to-image
        pipelines keep their guidance scale as an attribute; `DiTPipeline` does not, so nothing is checked there."""
        given = getattr(self.adapter.pipe, "_guidance_scale", None)
        if self.guidance is None or not isinstance(given, int | float):
            return
        low, high = self.guidance[0], self.guidance[-1]
        if not low / FAR <= max(given, 1.0) <= max(high, 1.0) * FAR:
            made_for = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            warnings.warn(
                f"the plan that is applied was made for guidance {made_for}, and the pipeline is called with "
                f"{given:g}: its error may be much larger; `diffes fit RUN OUT --guidance {given:g}` fits it again",
                DiffesWarning,
                stacklevel=2,
            )
            self.guidance = None

    def _before_state(self, *_: Any) -> None:
        """Load the dense model before a `state_dict` is saved or loaded."""
        if self._current is None and not self._swapping:
            return
        for name, part in self._parts.items():
            if part.changed:
                raise written(name)
        self._load(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for part in made._parts.values():
            part.note()
        made._swapping |= self._current is not None  # pruned rows were copied apart from the dense ones
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DiffesError(
            "a model with a schedule routed through it cannot be pickled: call diffes.remove(pipe), pickle the dense "
            "one, and call diffes.apply again wherever it is unpickled; diffes.load opens a run in one line"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_call(self, *_: Any) -> None:
        if not self._watching and self.memory is not None:
            self.memory = self.memory.ended()

    def _recalled(self, key: tuple[int, int]) -> list[str]:
        """Return the modules that return an earlier output in a stage at a level."""
        entry = self.bank[key]
        parts = [part for part in self._reuse if part.groups.name in entry]
        return [path for part in parts for path in part.groups.recalled(entry[part.groups.name].kept.tolist())]

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside of it
    def _load(self, weights: StageWeights | None, watching: bool = False) -> None:
        if weights is self._current and watching == self._watching and not self._swapping:
            return
        self._swapping, self._watching = True, watching
        for reuse in self._reuse:
            reuse.uncover()
            reuse.watched = self._wanted if watching else frozenset()
        for name, part in self._parts.items():
            left = None if weights is None else weights.get(name)  # sets that are not named are dense
            if left is None:
                part.load_dense()
            else:
                part.load_pruned(left)
        self._current = weights
        self._swapping = False


def _last(schedule: Schedule | Plan, key: tuple[int, int]) -> float:
    """Return the last place of a run at which a schedule is in a stage and at a level (see `Memory`)."""
    if isinstance(schedule, Plan):
        return max(i for i, each in enumerate(schedule.keys()) if each == key)
    return -schedule.stages.ranges[key[0]][0]


def _owners(denoiser: nn.Module, parts: Sequence[SwappedPart]) -> Iterator[nn.Module]:
    """Yield the denoiser, and every module that contains a swapped parameter."""
    swapped = {id(module) for part in parts for module in part.modules}
    for module in denoiser.modules():
        if module is denoiser or any(id(inner) in swapped for inner in module.modules()):
            yield module
