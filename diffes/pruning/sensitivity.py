"""Sensitivity of a prediction to pruning one group set, measured for all sets at once from gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from diffes.adapters import ClassifierFreeGuidance, GroupSet, ModelAdapter
from diffes.adapters.convolutions import as_rows, as_tokens
from diffes.errors import DiffesError
from diffes.pruning.allocation import Floats, Rungs
from diffes.pruning.base import GroupWeights, LayerWeights
from diffes.pruning.calibration import CalibrationSet
from diffes.pruning.factors import FactoredWeights

SAMPLES = 32  # noised latents a stage
DIRECTIONS = 4  # random directions of each prediction
BACKWARD = 2  # cost of a backward pass in calls
OWN_STREAM = 1 << 40  # added to the seed, so that timesteps and noise differ from those of calibration
ELEMENTS = 1 << 26  # elements of the gradients that are held at once
_SPARING: WeakSet[nn.Module] = WeakSet()  # models whose activations did not fit on the device


@dataclass(frozen=True)
class StageSensitivity:
    """First-order sensitivity to pruned layers in one stage.

    With `f` the guided prediction and `D` the change of the consumers' weights (those of dropped inputs become zero),
    the sensitivity is the mean of `|J D|^2` over noised latents, J being the Jacobian of f. For random signs v, the
    mean of `(v^T J D)^2` over v equals it, and `v^T J` takes one backward pass for all layers. So `DIRECTIONS` backward
    passes give every rung of every set, where one denoiser call for each rung of each set would take hundreds.

    Args:
        adapter: the dense model.
        stage: [lo, hi) timesteps.
        data: clean latents.
        guidance: classifier-free guidance scale of the later sampling; above 1 both branches are predicted from the
            same latents, and their changes partly cancel as they do in sampling.
        seed: of the latents, timesteps, noise and signs.

    Source: Hutchinson's estimator of the trace of the Gauss-Newton matrix.
    """

    adapter: ModelAdapter
    stage: tuple[int, int]
    data: CalibrationSet
    guidance: float
    seed: int

    @property
    def rows(self) -> int:
        """Rows of one prediction of all noised latents."""
        return min(SAMPLES, len(self.data)) * self._branches

    @property
    def calls(self) -> int:
        """Cost of a measurement, in rows of denoiser calls; a backward pass counts as two."""
        return self.rows * (1 + BACKWARD * DIRECTIONS)

    def measure(self, sets: Sequence[Rungs[GroupSet]], pruned: Mapping[str, Sequence[GroupWeights]]) -> list[Floats]:
        """Measure the mean squared change of an element of the prediction when only one set is pruned: for each set,
        (rungs,).

        Args:
            sets: the rungs of each set.
            pruned: what is left of each set at each of its rungs.

        Raises:
            DiffesError: the gradients overflowed.
        """
        groups_of = [rungs.groups for rungs in sets]
        weights = [LayerWeights.of(self.adapter.denoiser, groups).consumers for groups in groups_of]

        def measured(n: int) -> list[Tensor]:
            total = [torch.zeros(len(rungs.kept), dtype=torch.float64) for rungs in sets]
            for drawn in self._drawn(n):
                found = self._seen(groups_of, drawn)
                for i, (groups, dense, seen) in enumerate(zip(groups_of, weights, found, strict=True)):
                    total[i] += _squares(groups, dense, pruned[groups.name], seen).cpu()
            return total

        largest = max(weight.numel() for dense in weights for weight in dense)
        most = max(1, ELEMENTS // (DIRECTIONS * largest))  # samples with gradients at once
        total = self.adapter.within_room(measured, min(most, SAMPLES), what="gradients")
        if not all(bool(torch.isfinite(each).all()) for each in total):
            raise DiffesError(
                f"the sensitivity to pruned layers at timesteps [{self.stage[0]}, {self.stage[1]}) is not finite: the "
                "gradients overflowed. Choose another --dtype, or --allocation equal, which needs no gradients"
            )
        return [np.asarray(each) / self._elements for each in total]

    def of_earlier_outputs(self, paths: Sequence[str]) -> Tensor:
        """Measure the mean squared change of an element of the prediction when only one module's output comes from an
        earlier call, at a timestep noisier by the length of the stage: for n modules, (n,).

        Args:
            paths: of modules that return tensors, one or several, with a row for each latent.

        Raises:
            DiffesError: the gradients overflowed.
        """
        lo, hi = self.stage

        def measured(n: int) -> Tensor:
            total = torch.zeros(len(paths), dtype=torch.float64)
            for drawn in self._drawn(n):
                noisier = (drawn.timesteps + (hi - lo)).clamp_max(self.adapter.n_timesteps - 1)
                with torch.no_grad():
                    earlier, _ = self._observed(paths, replace(drawn, timesteps=noisier))
                seen, gradients = self._observed(paths, drawn, backward=True)
                for i, path in enumerate(paths):
                    pairs = zip(_tensors(earlier[path][-1]), _tensors(seen[path][-1]), strict=True)
                    changes = [(before - now).detach().float().flatten(1) for before, now in pairs]
                    for direction in gradients:
                        together = zip(direction[i], changes, strict=True)
                        along = torch.stack([(g.float().flatten(1) * change).sum(1) for g, change in together]).sum(0)
                        total[i] += along.unflatten(0, (self._branches, -1)).sum(0).double().square().sum().cpu()
            return total

        total = self.adapter.within_room(measured, SAMPLES, what="gradients")
        if not torch.isfinite(total).all():
            raise DiffesError(
                f"the sensitivity to reused outputs at timesteps [{self.stage[0]}, {self.stage[1]}) is not finite: the "
                "gradients overflowed. Choose another --dtype"
            )
        return total / self._elements

    @property
    def _guided(self) -> ClassifierFreeGuidance:
        return ClassifierFreeGuidance(self.guidance)

    @property
    def _branches(self) -> int:
        return self._guided.branches

    @property
    def _elements(self) -> int:
        """Number of elements of all predictions measured, in all directions."""
        return self.data.latents[0].numel() * min(SAMPLES, len(self.data)) * DIRECTIONS

    def _drawn(self, at_once: int) -> Iterator[_Drawn]:
        """Yield noised latents and signs, `at_once` latents at a time."""
        lo, hi = self.stage
        generator = torch.Generator().manual_seed(self.seed + OWN_STREAM)
        chosen = torch.randperm(len(self.data), generator=generator)[:SAMPLES]
        timesteps = torch.randint(lo, hi, (len(chosen),), generator=generator)
        noise = torch.randn((len(chosen), *self.data.latents.shape[1:]), generator=generator)
        signs = torch.randint(0, 2, (DIRECTIONS, *noise.shape), generator=generator) * 2.0 - 1
        for rows in torch.arange(len(chosen)).split(at_once):
            yield _Drawn(chosen[rows], timesteps[rows], noise[rows], signs[:, rows])

    def _observed(
        self, paths: Sequence[str], drawn: _Drawn, *, backward: bool = False
    ) -> tuple[dict[str, tuple[Any, ...]], list[list[list[Tensor]]]]:
        """Return the first input, if it is given by place, and the output of modules in one guided prediction and,
        where `backward` is set, for each direction v and module the gradients of `v^T f` with respect to the tensors of
        the output.

        Where the device has no room for the activations that backward passes need, these are recomputed in each pass,
        for this model from then on. The gradients are the same.
        """
        denoiser = self.adapter.denoiser
        able = backward and getattr(denoiser, "_supports_gradient_checkpointing", False)
        if not able or denoiser in _SPARING:
            with _checkpointing(denoiser) if able else nullcontext():
                return self._observe(paths, drawn, backward)
        try:
            return self._observe(paths, drawn, backward)
        except torch.OutOfMemoryError:
            _SPARING.add(denoiser)
        if torch.cuda.is_available():  # outside the except clause, where the error no longer holds tensors
            torch.cuda.empty_cache()
        return self._observed(paths, drawn, backward=backward)

    def _observe(
        self, paths: Sequence[str], drawn: _Drawn, backward: bool
    ) -> tuple[dict[str, tuple[Any, ...]], list[list[list[Tensor]]]]:
        adapter, denoiser, guided = self.adapter, self.adapter.denoiser, self._guided
        clean = self.data.latents[drawn.chosen].to(adapter.device, adapter.dtype)
        noisy = guided.rows(adapter.add_noise(clean, drawn.noise, drawn.timesteps))
        timesteps = guided.rows(drawn.timesteps)
        conditions = guided.conditions([self.data.conditions[i] for i in drawn.chosen.tolist()])
        seen: dict[str, tuple[Any, ...]] = {}
        handles = [
            denoiser.get_submodule(path).register_forward_hook(
                lambda _module, inputs, output, path=path: seen.update({path: (*inputs[:1], output)})
            )
            for path in paths
        ]
        by_direction: list[list[list[Tensor]]] = []
        try:
            with torch.set_grad_enabled(backward):
                predicted = adapter.denoise_once(noisy.requires_grad_(backward), timesteps, conditions)
                predicted = predicted[:, : drawn.noise.shape[1]].float()  # without a learned variance, if any
                if guided.branches > 1:  # as weights, which the gradients of the branches then are
                    conditional, null = guided.split(predicted)
                    predicted = guided.scale * conditional + (1 - guided.scale) * null
                found = dict(seen)  # a copy: gradient checkpointing may call the same modules again
                outputs = [_tensors(found[path][-1]) for path in paths]
                flat = list(itertools.chain(*outputs))
                for v in drawn.signs if backward else ():
                    along = (predicted * v.to(predicted.device)).sum()
                    gradients = iter(  # the last block of a joint transformer leaves states of the text unused
                        torch.autograd.grad(along, flat, retain_graph=True, allow_unused=True, materialize_grads=True)
                    )
                    by_direction.append([[next(gradients) for _ in each] for each in outputs])
        finally:
            for handle in handles:
                handle.remove()
        return found, by_direction

    def _seen(self, groups_of: Sequence[GroupSet], drawn: _Drawn) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield, for each consumer of each set, its inputs (n, tokens, d_in) and the gradients (directions, n, tokens,
        d_out) of `v^T f` with respect to its outputs; of a convolution, pixels and the rows of its matrix. The tokens
        of both branches are those of one sample."""
        paths = list(dict.fromkeys(path for groups in groups_of for path in groups.consumers))
        seen, by_direction = self._observed(paths, drawn, backward=True)
        of_path = dict(zip(paths, zip(*by_direction, strict=True), strict=True))
        for groups in groups_of:  # one set at a time: together they are large in single precision
            found = []
            for path in groups.consumers:
                layer = self.adapter.denoiser.get_submodule(path)
                inputs = _side_by_side(groups.own(as_tokens(seen[path][0].detach().float(), layer)), self._branches)
                gradients = [as_rows(gradient.float(), layer) for (gradient,) in of_path[path]]
                backward = [_side_by_side(gradient, self._branches) for gradient in gradients]
                found.append((inputs, torch.stack(backward)))
            yield found


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors that a module returned."""
    return [output] if isinstance(output, Tensor) else [each for each in output if isinstance(each, Tensor)]


@contextmanager
def _checkpointing(denoiser: Any) -> Iterator[None]:
    """Use diffusers' gradient checkpointing inside the context."""
    before = denoiser.is_gradient_checkpointing
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            denoiser.disable_gradient_checkpointing()


@dataclass(frozen=True)
class _Drawn:
    """Noised latents, and random signs (directions, n, C, h, w)."""

    chosen: Tensor
    timesteps: Tensor
    noise: Tensor
    signs: Tensor


def _side_by_side(rows: Tensor, branches: int) -> Tensor:
    """Reshape (branches * n, tokens, d) to (n, branches * tokens, d)."""
    return torch.cat(rows.chunk(branches), 1)


def _squares(
    groups: GroupSet,
    dense: Sequence[Tensor],
    pruned: Sequence[GroupWeights],
    seen: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Return (rungs,) fp64 sums over directions and samples of the squared change of `v^T f` when the set is pruned.

    Args:
        groups: the set.
        dense: (d_out, d_in) the weight of each consumer.
        pruned: what is left of the set at each rung.
        seen: inputs and gradients of each consumer.
    """
    last, weights = pruned[-1], [weight.float() for weight in dense]
    if isinstance(last, FactoredWeights):
        parts = [last.factor.effects(i, weights[i], *each) for i, each in enumerate(seen)]
        dropped = torch.tensor([groups.n_groups - len(left.kept) for left in pruned], device=parts[0].device)
        return reduce(torch.add, parts)[..., dropped].square().sum((0, 1))
    gradients = [torch.einsum("vnto,nti->vnoi", backward, inputs).flatten(2).flatten(0, 1) for inputs, backward in seen]
    sums = []
    for left in pruned:
        changes = _changes(groups, weights, left)
        effects = [each @ change.flatten() for each, change in zip(gradients, changes, strict=True)]
        sums.append(reduce(torch.add, effects).double().square().sum())
    return torch.stack(sums)


def _changes(groups: GroupSet, dense: Sequence[Tensor], left: GroupWeights) -> Iterator[Tensor]:
    """Yield (d_out, d_in) the pruned weights of each consumer minus the dense ones; dropped inputs have weight zero."""
    features = groups.features(left.kept.to(dense[0].device, torch.long))
    for weight, consumer in zip(dense, left.consumers or [None] * len(dense), strict=True):
        change = -weight
        change[:, features] = 0.0 if consumer is None else consumer.to(weight) - weight[:, features]
        yield change
