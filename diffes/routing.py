"""The router: puts the thin weights of a stage into the denoiser when the sampler enters the stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffes.adapters.base import GroupSet, ModelAdapter
from diffes.bank import StageWeights, WeightBank
from diffes.errors import DiffesError
from diffes.schedule import Schedule


class NoHeads:
    """Attention processor of a layer that has lost all its heads: the output projection's bias is all that is left."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(hidden_states)
        if attn.to_out[0].bias is not None:
            shape = (-1, *[1] * (hidden_states.ndim - 2)) if hidden_states.ndim == 4 else (-1,)
            out = out + attn.to_out[0].bias.view(shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class Router:
    """Routes one schedule at a time through one denoiser.

    A pre-forward hook reads the timestep of every call; when it lies in another stage than the last call's, the
    parameters of the prunable layers are swapped in place. Attention modules keep diffusers' own processors: only their
    number of heads changes. The dense tensors themselves are kept and put back, so restoration is exact. The bank stays
    in host memory; the device holds the dense weights and the present stage's thin ones.

    Args:
        adapter: the model, dense.
        bank: thin weights, at least those of the schedules routed.

    Attributes:
        schedule: what is routed now; None while the model is dense.
    """

    def __init__(self, adapter: ModelAdapter, bank: WeightBank) -> None:
        self.adapter = adapter
        self.bank = bank
        self.schedule: Schedule | None = None
        self._sets = adapter.group_sets()
        self._layers = {groups.name: _SwappableLayers(adapter.denoiser, groups) for groups in self._sets}
        self._current: StageWeights | None = None
        self._swapping = False  # an interrupted swap leaves it True: what is loaded is then unknown
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def install(self, schedule: Schedule) -> None:
        """Routes `schedule` from the next denoiser call on, in place of any schedule before.

        Raises:
            DiffesError: the bank lacks a stage and level of the schedule, or the schedule is for another model.
        """
        if schedule.max_level != self.adapter.max_level:
            raise DiffesError(
                f"the schedule has max_level {schedule.max_level}, this model {self.adapter.max_level}: "
                "it was made for another model"
            )
        for stage, level in enumerate(schedule.levels):
            if level:
                _ = self.bank[stage, level]
        self.schedule = schedule
        if self._hook is None:
            self._hook = self.adapter.denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def remove(self) -> None:
        """Takes the hook away and makes the denoiser dense again, bit for bit."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.schedule = None
        self._load(None)

    @contextmanager
    def routed(self, schedule: Schedule) -> Iterator[None]:
        """Routes `schedule` inside the context; dense again however the context is left."""
        try:
            self.install(schedule)
            yield
        finally:
            self.remove()

    def _before_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.schedule is not None
        self._layers[self._sets[0].name].check_not_moved()
        stage = self.schedule.plan.stage_of(self.adapter.timestep(args, kwargs))
        level = self.schedule.levels[stage]
        self._load(self.bank[stage, level] if level else None)

    def _load(self, weights: StageWeights | None) -> None:
        if weights is self._current and not self._swapping:
            return
        self._swapping = True
        for groups in self._sets:
            layers = self._layers[groups.name]
            if weights is None:
                layers.load_dense()
            else:
                thin = weights[groups.name]
                layers.load_thin(thin.kept, thin.consumer)
        self._current = weights
        self._swapping = False


class _SwappableLayers:
    """The layers around one group set, with their dense tensors at hand."""

    def __init__(self, denoiser: Any, groups: GroupSet) -> None:
        self.groups = groups
        self.producers = [denoiser.get_submodule(path) for path in groups.producers]
        self.consumer = denoiser.get_submodule(groups.consumer)
        self.attention = denoiser.get_submodule(groups.name) if groups.kind == "heads" else None
        self.dense_producers = [(p.weight.data, None if p.bias is None else p.bias.data) for p in self.producers]
        self.dense_consumer = self.consumer.weight.data
        self.processor = self.attention.processor if self.attention is not None else None

    def check_not_moved(self) -> None:
        now, then = self.consumer.weight, self.dense_consumer
        if (now.dtype, now.device) != (then.dtype, then.device):
            raise DiffesError(
                f"the model was moved or cast, from {then.dtype} on {then.device} to {now.dtype} on {now.device}, "
                "while a schedule was routed through it: call diffes.remove(pipe), move it, call diffes.apply again"
            )

    def load_dense(self) -> None:
        for layer, (weight, bias) in zip(self.producers, self.dense_producers, strict=True):
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias
        self.consumer.weight.data = self.dense_consumer
        if self.attention is not None:
            self.attention.heads = self.groups.n_groups
            self.attention.processor = self.processor

    def load_thin(self, kept: Tensor, consumer: Tensor | None) -> None:
        features = self.groups.features(kept.to(self.dense_consumer.device, torch.long))
        for layer, (weight, bias) in zip(self.producers, self.dense_producers, strict=True):
            width = self.dense_consumer.shape[1]
            halves = len(weight) // width  # 2 where value rows lie over gate rows, else 1
            rows = torch.cat([features + i * width for i in range(halves)])
            layer.weight.data = weight.index_select(0, rows)
            if bias is not None:
                layer.bias.data = bias.index_select(0, rows)
        if consumer is None:
            self.consumer.weight.data = self.dense_consumer.index_select(1, features)
        else:
            self.consumer.weight.data = consumer.to(self.dense_consumer.device)
        if self.attention is not None:
            self.attention.heads = max(len(kept), 1)
            self.attention.processor = self.processor if len(kept) else NoHeads()
