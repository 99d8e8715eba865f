"""Memory of a sampling run: layer outputs of earlier calls that a denoiser call may reuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffes.adapters import ModelAdapter, ReuseSet
from diffes.pruning.base import GroupWeights
from diffes.runtime.parts import Part, put_forward


@dataclass(frozen=True)
class Memory:
    """Layer outputs of one run, for one batch.

    A call continues the run where it is the run's next one: on the same conditions, in a batch of the same shape, and
    later than the call before; under a plan, at the plan's next call. Any other call begins a run. A sampler may call
    twice at a place (Heun), but not at the run's first. Pipelines that call for one branch of guidance after the other
    have a memory for each.

    Args:
        begun: place of the run's first call. Places rise along a run: under a plan a place is the number of the call,
            else its timestep, negated.
        last: place of the run's latest call.
        shape: of the latents; of a list of them, that of each.
        conditions: all other tensors that a call was given, except its timestep.
        outputs: by module path, the last one that was computed.
        others: memories of the other branches, which have none themselves.
    """

    begun: float
    last: float
    shape: tuple[torch.Size, ...]
    conditions: tuple[Tensor, ...]
    outputs: dict[str, Any] = field(default_factory=dict)
    others: tuple[Memory, ...] = ()

    @classmethod
    def of_call(
        cls, before: Memory | None, place: float, counted: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Memory:
        """Return the memory for a denoiser call: that of its run so far, or an empty one where a run begins.

        Args:
            before: memory of the call before it.
            place: of the call in its run.
            counted: True where places are numbers of calls, none of which is left out.
            args: of the call.
            kwargs: of the call.
        """
        named = {name: value for name, value in kwargs.items() if name != "timestep"}
        sample = args[0] if args else named.pop("sample" if "sample" in named else "hidden_states")
        conditions = tuple(each for each in tree_leaves([*args[2:], named]) if isinstance(each, Tensor))
        made = cls(place, place, tuple(each.shape for each in tree_leaves(sample)), conditions)
        known = () if before is None else (before, *before.others)
        run = next((each for each in known if each._continued_by(made, counted)), None)
        if run is None:  # a run, or a branch of one that others were called for in the same step
            others = [each for each in known if each.last == place and not each._same(made)]
        else:
            made = replace(made, begun=run.begun, outputs=dict(run.outputs))
            others = [each for each in known if each is not run and each.last >= run.last]
        return replace(made, others=tuple(replace(each, others=()) for each in others))

    def ended(self) -> Memory | None:
        """Return what is left once the run of this branch needs no memory: that of the other branches."""
        return replace(self.others[0], others=self.others[1:]) if self.others else None

    def _continued_by(self, call: Memory, counted: bool) -> bool:
        again = call.last == self.last
        if counted and not again and call.last != self.last + 1:
            return False
        return not (call.last < self.last or (again and call.last == self.begun)) and self._same(call)

    def _same(self, call: Memory) -> bool:
        """Return True where a call has the same conditions and shape."""
        pairs = zip(call.conditions, self.conditions, strict=False)
        return (
            call.shape == self.shape
            and len(call.conditions) == len(self.conditions)
            and all(new is old or (new.shape == old.shape and torch.equal(new, old)) for new, old in pairs)
        )


class ReusePart(Part):
    """The layers of one set whose outputs are remembered while a schedule is routed, and reused at pruned levels.

    Only the forwards of modules are replaced, on the instances, over those that other parts set. The earlier ones are
    put back.

    Args:
        adapter: the model.
        groups: the set.
        memory: returns the memory of the present call.

    Attributes:
        watched: paths of the modules whose outputs are remembered from the next `load_dense` or `load_pruned` on.
    """

    def __init__(self, adapter: ModelAdapter, groups: ReuseSet, memory: Callable[[], Memory]) -> None:
        self.groups = groups
        self._memory = memory
        self._modules: dict[str, nn.Module] = {path: adapter.denoiser.get_submodule(path) for path in groups.modules}
        self._covered: dict[str, Any] = {}  # by module path, the earlier forward, None where it is that of the class
        self.watched: frozenset[str] = frozenset()

    def uncover(self) -> None:
        """Put the earlier forwards back, so that other parts may change them."""
        for path, own in self._covered.items():
            put_forward(self._modules[path], own)
        self._covered = {}

    def load_dense(self) -> None:
        self._load(set(), set())

    def load_pruned(self, left: GroupWeights) -> None:
        kept = left.kept.tolist()
        self._load(set(self.groups.recalled(kept)), set(self.groups.idle(kept)))

    def _load(self, recalled: set[str], idle: set[str]) -> None:
        self.uncover()
        for path, module in self._modules.items():
            if path in recalled:
                forward: Callable[..., Any] = partial(self._recall, path)
            elif path in idle:
                forward = placeholder
            elif path in self.watched:
                forward = partial(self._remember, path, module.forward)
            else:
                continue
            self._covered[path] = module.__dict__.get("forward")
            module.forward = forward

    def _remember(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = self._memory().outputs[path] = forward(*args, **kwargs)
        return output

    def _recall(self, path: str, *_args: Any, **_kwargs: Any) -> Any:
        return self._memory().outputs[path]


def placeholder(hidden_states: Tensor, *_args: Any, **kwargs: Any) -> Any:
    """Return a stand-in for the output of a layer that is neither computed nor read: its input, of an image one channel
    of it; what is returned beside is that of the text."""
    if hidden_states.dim() == 4:
        first = hidden_states[:, :1]
        return (first,) if kwargs.get("return_dict") is False else first
    text = kwargs.get("encoder_hidden_states")
    return hidden_states if text is None else (hidden_states, text)
