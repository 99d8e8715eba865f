"""The router: puts the thin weights of a stage into the denoiser when the sampler enters the stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffes.adapters import AnySet, BlockSet, GroupSet, ModelAdapter
from diffes.adapters.groups import REUSE_SETS
from diffes.errors import DiffesError
from diffes.pruning.bank import StageWeights, WeightBank
from diffes.pruning.base import GroupWeights
from diffes.runtime.memory import Memory, ReusePart
from diffes.search.schedule import Plan, Schedule


class Router:
    """Routes one schedule at a time through one denoiser.

    A pre-forward hook reads the timestep of every call; when it lies in another stage than the last call's, what the
    bank holds for it is put in place. Width: the parameters of the prunable layers are swapped; attention modules keep
    diffusers' own processors, only their number of heads changes; LoRA matrices on these layers are cut to match.
    Depth: skipped blocks hand their input on. Reuse: layers give again what they gave in the last call of the run that
    computed them; the first call of a run computes everything. The dense tensors themselves are kept and put back, so
    restoration is exact. The bank stays in host memory; the device holds the dense weights and the present stage's
    thin ones.

    Args:
        adapter: the model, dense.
        bank: thin weights, at least those of the schedules routed.

    Attributes:
        schedule: what is routed now; None while the model is dense.
        max_level: H, of the schedules that it routes.
        memory: what the next call may reuse; None between runs, and where nothing is reused.

    Raises:
        DiffesError: the model is offloaded, or carries adapters that cannot be cut.
    """

    def __init__(self, adapter: ModelAdapter, bank: WeightBank) -> None:
        self.adapter = adapter
        self.bank = bank
        self.schedule: Schedule | Plan | None = None
        self.memory: Memory | None = None
        self.max_level = bank.max_level or adapter.max_level(bank.kind)
        check_not_offloaded(adapter.denoiser)
        self._parts = {p.name: self._part(p) for p in adapter.prunable(bank.kind)}
        self._tree = list(_tree(adapter.denoiser, [p for p in adapter.prunable("width") if isinstance(p, GroupSet)]))
        self._reuse = [part for part in self._parts.values() if isinstance(part, ReusePart)]
        self._keeps = False  # outputs that this schedule does not reuse
        self._wanted: frozenset[str] = frozenset()  # modules whose outputs are kept
        self._reused_until = math.inf  # the lowest timestep at which outputs are reused
        self._current: StageWeights | None = None
        self._watching = False
        self._swapping = False  # an interrupted swap leaves it True: what is loaded is then unknown
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def _part(self, prunable: AnySet) -> _WidthPart | _DepthPart | ReusePart:
        if isinstance(prunable, GroupSet):
            return _WidthPart(self.adapter, prunable)
        if isinstance(prunable, BlockSet):
            return _DepthPart(self.adapter, prunable)
        return ReusePart(self.adapter, prunable, self._remembered)

    def _remembered(self) -> Memory:
        assert self.memory is not None  # layers are watched, and recalled, in calls that have one
        return self.memory

    def install(self, schedule: Schedule | Plan, *, keep: bool = False) -> None:
        """Routes a schedule or a plan from the next denoiser call on, in place of any schedule before.

        Args:
            schedule: what to route.
            keep: also keeps outputs in `memory` that this schedule does not reuse, for others that go on from here.

        Raises:
            DiffesError: the bank lacks a stage and level of the schedule, or the schedule is for another model.
        """
        if schedule.max_level != self.max_level:
            raise DiffesError(
                f"the schedule has max_level {schedule.max_level}, this model {self.max_level} for {self.bank.kind} "
                "pruning: it was made for another model"
            )
        reused = [key for key in schedule.thin() if not REUSE_SETS.isdisjoint(self.bank[key])]
        self.schedule, self.memory, self._keeps = schedule, None, keep
        self._wanted = frozenset(itertools.chain(*map(self._recalled, self.bank if keep and self._reuse else reused)))
        self._reused_until = min((_lowest(schedule, key) for key in reused), default=math.inf)
        if not self._hooks:
            denoiser = self.adapter.denoiser
            self._hooks = [
                denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True),
                *([denoiser.register_forward_hook(self._after_call)] if self._reuse else []),
                denoiser.register_state_dict_pre_hook(lambda *_: self._load(None)),  # what is saved is the dense model
            ]

    def remove(self) -> None:
        """Takes the hook away and makes the denoiser dense again, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.schedule, self.memory = [], None, None
        self._load(None)

    @contextmanager
    def routed(self, schedule: Schedule | Plan, *, keep: bool = False) -> Iterator[None]:
        """Routes `schedule` inside the context, as `install` does; dense again however the context is left."""
        try:
            self.install(schedule, keep=keep)
            yield
        finally:
            self.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.schedule is not None
        check_not_offloaded(self.adapter.denoiser)
        if not all(children.get(name) is module for children, name, module in self._tree):
            raise _replaced()
        for part in self._parts.values():
            part.check_unchanged()
        timestep = self.adapter.timestep(args, kwargs)
        stage, level = self.schedule.key(timestep)
        weights = self.bank[stage, level] if level else None
        watching = bool(self._reuse) and (self._keeps or timestep > self._reused_until)
        if watching or timestep == self._reused_until:
            self.memory = Memory.of_call(self.memory, self.schedule, timestep, args, kwargs)
            if weights is not None and not self.memory.outputs.keys() >= set(self._recalled((stage, level))):
                weights = None
        self._load(weights, watching)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_call(self, *_: Any) -> None:
        if not self._watching:
            self.memory = None

    def _recalled(self, key: tuple[int, int]) -> list[str]:
        """Modules that give an earlier output in a stage at a level."""
        entry = self.bank[key]
        parts = [part for part in self._reuse if part.groups.name in entry]
        return [path for part in parts for path in part.groups.recalled(entry[part.groups.name].kept.tolist())]

    def _load(self, weights: StageWeights | None, watching: bool = False) -> None:
        if weights is self._current and watching == self._watching and not self._swapping:
            return
        self._swapping, self._watching = True, watching
        for name, part in self._parts.items():
            thin = None if weights is None else weights.get(name)  # a set that is not named is dense
            if isinstance(part, ReusePart):
                part.watched = self._wanted if watching else frozenset()
            if thin is None:
                part.load_dense()
            else:
                part.load_thin(thin)
        self._current = weights
        self._swapping = False


def _tree(denoiser: nn.Module, sets: Sequence[GroupSet]) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Children of a module, the name of one of them, and that one: each step on the way to the layers of the sets."""
    known = set()
    for path in (path for groups in sets for path in (*groups.producers, groups.consumer)):
        module = denoiser
        for name in path.split("."):
            child = module.get_submodule(name)
            if (id(module), name) not in known:
                known.add((id(module), name))
                yield module._modules, name, child
            module = child


def _replaced() -> DiffesError:
    return DiffesError(
        "layers of the model were replaced (a LoRA loaded, fused or unloaded?) while a schedule was routed through it: "
        "call diffes.remove(pipe), load it, call diffes.apply again"
    )


def _lowest(schedule: Schedule | Plan, key: tuple[int, int]) -> float:
    """The lowest timestep at which a schedule is in a stage and at a level."""
    if isinstance(schedule, Plan):
        return min(timestep for timestep in schedule.timesteps if schedule.key(timestep) == key)
    return schedule.stages.ranges[key[0]][0]


def check_not_offloaded(denoiser: Any) -> None:
    """Refuses a denoiser whose parameters something else moves between devices.

    Raises:
        DiffesError: hooks of accelerate, or of diffusers' group offloading, are on it.
    """
    registry = getattr(denoiser, "_diffusers_hook", None)
    grouped = registry is not None and any("group_offloading" in name for name in registry.hooks)
    if hasattr(denoiser, "_hf_hook") or grouped:
        raise DiffesError(
            "the denoiser is offloaded (enable_model_cpu_offload, enable_group_offload or another of that kind): its "
            "weights move between devices while it runs, so they cannot be routed; call pipe.remove_all_hooks(), move "
            "the pipeline to one device, then apply"
        )


class _WidthPart:
    """The layers around one group set, with their dense tensors at hand."""

    def __init__(self, adapter: ModelAdapter, groups: GroupSet) -> None:
        self.groups = groups
        self._adapter = adapter
        denoiser = adapter.denoiser
        producers = [denoiser.get_submodule(path) for path in groups.producers]
        consumer = denoiser.get_submodule(groups.consumer)
        layers = [layer for layer in (*producers, consumer) if hasattr(layer, "base_layer")]  # others have no adapters
        self._adapters = [(layer, _adapters(layer)) for layer in layers]
        self.consumer = consumer.weight
        self.dense_consumer = self.consumer.data
        rows = [p for layer in producers for p in (layer.weight, layer.bias, *_lora(layer, "lora_B")) if p is not None]
        self.by_row = [(parameter, parameter.data) for parameter in rows]
        self.by_column = [(p, p.data) for p in _lora(consumer, "lora_A")]
        self.attention = denoiser.get_submodule(groups.name) if groups.kind == "heads" else None
        self.processor = self.attention.processor if self.attention is not None else None
        if isinstance(self.processor, nn.Module) or getattr(self.attention, "fused_projections", False):
            raise DiffesError(
                f"{groups.name} has fused projections or an adapter of its own (IP-Adapter?), which cannot be cut to "
                "thin layers; unfuse or unload it"
            )

    def check_unchanged(self) -> None:
        now, then = self.consumer, self.dense_consumer
        if (now.dtype, now.device) != (then.dtype, then.device):
            raise DiffesError(
                f"the model was moved or cast, from {then.dtype} on {then.device} to {now.dtype} on {now.device}, "
                "while a schedule was routed through it: call diffes.remove(pipe), move it, call diffes.apply again"
            )
        if any(_adapters(layer) != known for layer, known in self._adapters):
            raise _replaced()

    def load_dense(self) -> None:
        for parameter, dense in (*self.by_row, *self.by_column, (self.consumer, self.dense_consumer)):
            parameter.data = dense.to(parameter.device, parameter.dtype)  # itself, unless the model was moved since
        if self.attention is not None:
            self.attention.heads = self.groups.n_groups
            self.attention.processor = self.processor

    def load_thin(self, thin: GroupWeights) -> None:
        features = self.groups.features(thin.kept.to(self.dense_consumer.device, torch.long))
        width = self.dense_consumer.shape[1]
        gated = torch.cat([features, features + width])  # value rows lie over gate rows
        for parameter, dense in self.by_row:
            parameter.data = dense.index_select(0, gated if len(dense) == 2 * width else features)
        for parameter, dense in self.by_column:
            parameter.data = dense.index_select(1, features)
        if thin.consumer is None:
            self.consumer.data = self.dense_consumer.index_select(1, features)
        else:
            self.consumer.data = thin.consumer.to(self.dense_consumer.device)
        if self.attention is not None:
            self.attention.heads = max(len(thin.kept), 1)
            self.attention.processor = self.processor if len(thin.kept) else self._adapter.without_heads(self.attention)


class _DepthPart:
    """All blocks; a skipped one stays where it is (other layers may read parts of it) and hands its input on."""

    def __init__(self, adapter: ModelAdapter, blocks: BlockSet) -> None:
        self._adapter = adapter
        self.blocks = [adapter.denoiser.get_submodule(path) for path in blocks.blocks]
        self.forwards = [block.__dict__.get("forward") for block in self.blocks]  # one of their own, where hooks set it

    def check_unchanged(self) -> None:
        """Moving, casting and adapters do not touch which blocks are skipped."""

    def load_dense(self) -> None:
        for i in range(len(self.blocks)):
            self._keep(i)

    def load_thin(self, thin: GroupWeights) -> None:
        kept = set(thin.kept.tolist())
        for i, block in enumerate(self.blocks):
            if i in kept:
                self._keep(i)
            else:
                block.forward = self._adapter.skipped(block)

    def _keep(self, i: int) -> None:
        if self.forwards[i] is None:
            self.blocks[i].__dict__.pop("forward", None)
        else:
            self.blocks[i].forward = self.forwards[i]


def _lora(layer: Any, part: str) -> list[nn.Parameter]:
    """Parameters of the LoRA matrices that peft put beside a layer.

    Raises:
        DiffesError: the layer carries an adapter of another kind.
    """
    if not hasattr(layer, "base_layer"):
        return []
    plain = hasattr(layer, part) and not len(getattr(layer, "lora_magnitude_vector", ()))
    matrices = list(getattr(layer, part).values()) if plain else []
    if not plain or layer.merged or any(getattr(matrix, "bias", None) is not None for matrix in matrices):
        raise DiffesError(
            f"{type(layer).__name__} carries an adapter that is no plain LoRA, or one that is fused, which cannot be "
            "cut to thin layers; unfuse or unload it, or save the fused model and search on that"
        )
    return [matrix.weight for matrix in matrices]


def _adapters(layer: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether a layer's adapters are fused into it, and their names."""
    return getattr(layer, "merged", False), tuple(getattr(layer, "lora_A", ()))
