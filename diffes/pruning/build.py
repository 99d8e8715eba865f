"""Construction of a bank: calibrate, prune, and allocate every level over the layers, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffes.adapters import BlockSet, GroupSet, ModelAdapter
from diffes.adapters.macs import macs_by_module, macs_per_group
from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.pruning.allocation import Rungs, allocate, by_sensitivity
from diffes.pruning.bank import Key, StageWeights, WeightBank
from diffes.pruning.base import (
    DepthMethod,
    GroupWeights,
    LayerWeights,
    PruningMethod,
    ReuseMethod,
    Sum,
    WidthMethod,
    check_weights,
    nested,
)
from diffes.pruning.calibration import CalibrationSet, StagePass, block_changes, input_moments
from diffes.pruning.factors import MEMORY, Factor, FactoredMethod, FactoredWeights, LayerStatistics, Workshop
from diffes.pruning.sensitivity import StageSensitivity
from diffes.spaces.schedule import Stages

FINER = 2  # rungs of a set for each level, where it has enough groups


def build_bank(
    adapter: ModelAdapter,
    method: PruningMethod | Sum,
    stages: Stages,
    data: CalibrationSet | None,
    *,
    guidance: float,
    seed: int,
    allocation: str = "equal",
    only: Iterable[int] | None = None,
    progress: Callable[[int], None] | None = None,
    memory: int = MEMORY,
) -> WeightBank:
    """Calibrate and prune stage by stage. Only one stage's statistics are in memory at a time.

    Args:
        adapter: the dense model.
        method: pruning or reuse method; for a sum, the levels of all parts follow each other.
        stages: their ranges of timesteps.
        data: clean latents; not needed where neither the method nor the allocation uses data.
        guidance: classifier-free guidance scale of the later sampling.
        seed: of the calibration timesteps and noise. A stage draws the same ones whichever other stages are calibrated.
        allocation: "equal", as in the paper: a level removes the same fraction of every group set; "sensitivity": a
            level saves at least as many multiply-accumulates where the prediction is least sensitive. Depth has one set
            only.
        only: numbers of the stages to prune; all when left out.
        progress: called with the number of each finished stage.
        memory: bytes of host memory for triangles and ready levels, of all parts of a sum together; and, while a part
            is calibrated, for its statistics of a stage. Where the statistics need more, they are taken in passes over
            some of the layers at a time.

    Raises:
        DiffesError: calibration data are needed and there are none, or a layer's statistics are not finite.
    """
    chosen = list(range(len(stages)) if only is None else only)
    guidance = guidance if adapter.merges else 1.0  # else the calls of the null condition are made apart
    workshop = Workshop(memory)

    def built(part: PruningMethod) -> WeightBank:
        if isinstance(part, ReuseMethod):
            return _reusing(adapter, part, stages, data, guidance, seed, chosen, progress)
        return _removing(adapter, part, stages, data, guidance, seed, allocation, chosen, progress, workshop)

    return joined([built(part) for part in (method.parts if isinstance(method, Sum) else (method,))])


def _removing(
    adapter: ModelAdapter,
    method: PruningMethod,
    stages: Stages,
    data: CalibrationSet | None,
    guidance: float,
    seed: int,
    allocation: str,
    only: Sequence[int],
    progress: Callable[[int], None] | None,
    workshop: Workshop,
) -> WeightBank:
    """Build the bank of a width or depth method. Its triangles go to the workshop."""
    ladders = _Ladders(adapter, method, allocation)
    if data is None and (method.needs != "nothing" or ladders.splits):
        raise DiffesError(f"{type(method).__name__} with allocation {allocation} needs calibration data, got none")
    pruned: dict[str, list[GroupWeights]] | None = None
    entries: dict[Key, StageWeights] = {}
    calls = 0
    for stage in only:
        drawn = stage_seed(seed, stage)
        if pruned is None or method.needs != "nothing":
            run = None
            if method.needs != "nothing":
                assert data is not None
                weigh = method.timestep_weights
                guided = adapter.guided(guidance).branches > 1
                run = StagePass(adapter, stages.ranges[stage], data, guided, drawn, weigh)
                calls += len(data) * len(passes(method, ladders.sets, workshop.limit))
            pruned = pruned_weights(adapter, method, run, ladders.sets, workshop)
        split = ladders.equal
        if ladders.splits:
            assert data is not None
            sensitivity = StageSensitivity(adapter, stages.ranges[stage], data, guidance, drawn)
            split = allocate(ladders.sets, sensitivity.measure(ladders.sets, pruned))
            calls += sensitivity.calls
        for level in range(1, ladders.max_level + 1):
            entries[stage, level] = at_split(pruned, split[level])
        if progress:
            progress(stage)
    return WeightBank(entries, method.kind, calls=calls, max_level=ladders.max_level, workshop=workshop)


def gathered(
    adapter: ModelAdapter, banks: Iterable[WeightBank], memory: int, *, held: bool = True, alike: bool = False
) -> WeightBank:
    """Join banks that other processes made, each of different stages, into one.

    Args:
        adapter: the dense model, from whose weights levels are made on request.
        banks: all of one method.
        memory: as in `build_bank`.
        held: True to move triangles into that memory; otherwise they stay where they are.
        alike: True to make equal weights one object, for methods that use no data.
    """
    workshop, entries, calls = Workshop(memory), dict[Key, StageWeights](), 0
    known: dict[tuple[str, tuple[int, ...]], GroupWeights] = {}
    kind, max_level, makes = "", 0, False
    for bank in banks:
        ours = _rebound(adapter, bank, workshop, held)
        makes |= bool(ours)
        for key, entry in bank.items():
            found = {name: ours.get(id(weights), weights) for name, weights in entry.items()}
            if alike:
                found = {name: known.setdefault((name, tuple(w.kept.tolist())), w) for name, w in found.items()}
            entries[key] = found
        kind, max_level, calls = bank.kind, bank.max_level, calls + bank.calls
    entries = dict(sorted(entries.items()))  # banks come in any order
    return WeightBank(entries, kind, calls=calls, max_level=max_level, workshop=workshop if makes else None)


def _rebound(adapter: ModelAdapter, bank: WeightBank, workshop: Workshop, held: bool) -> dict[int, GroupWeights]:
    """Return the weights of a bank that are made on request, bound to this model and workshop, by the old ids."""
    factors: dict[int, Factor] = {}
    dense: dict[str, tuple[Tensor, ...]] = {}
    made: dict[int, GroupWeights] = {}
    for weights in (each for entry in bank.values() for each in entry.values() if isinstance(each, FactoredWeights)):
        factor = weights.factor
        if id(factor) not in factors:
            factors[id(factor)] = workshop.keep(factor) if held else factor
        if factor.groups.name not in dense:
            dense[factor.groups.name] = LayerWeights.of(adapter.denoiser, factor.groups).consumers
        if id(weights) not in made:  # weights that share an object go on sharing it
            n_kept = len(weights.kept)
            made[id(weights)] = FactoredWeights(factors[id(factor)], dense[factor.groups.name], n_kept, workshop)
    return made


def joined(banks: Sequence[WeightBank]) -> WeightBank:
    """Join banks that share a workshop into one. The levels of each bank follow those of the banks before it."""
    if len(banks) == 1:
        return banks[0]
    entries: dict[Key, StageWeights] = {}
    below = 0
    for bank in banks:
        entries |= {(stage, below + level): entry for (stage, level), entry in bank.items()}
        below += bank.max_level
    kind = "+".join(dict.fromkeys(bank.kind for bank in banks))
    workshop = next((bank.workshop for bank in banks if bank.workshop is not None), None)
    return WeightBank(entries, kind, calls=sum(bank.calls for bank in banks), max_level=below, workshop=workshop)


def _reusing(
    adapter: ModelAdapter,
    method: ReuseMethod,
    stages: Stages,
    data: CalibrationSet | None,
    guidance: float,
    seed: int,
    only: Sequence[int],
    progress: Callable[[int], None] | None,
) -> WeightBank:
    """Build the bank of a reuse method: for each level, the groups that are computed."""
    groups, top = method.groups(adapter), method.max_level(adapter)
    measures = method.needs == "changes"
    if measures and data is None:
        raise DiffesError(f"{type(method).__name__} needs calibration data, got none")
    macs = macs_by_module(adapter) if measures else {}
    prices = torch.tensor([float(max(macs.get(path, 0), 1)) for path in groups.sources], dtype=torch.float64)
    entries: dict[Key, StageWeights] = {}
    calls = 0
    for stage in only:
        sensitivity = None
        if measures:
            assert data is not None
            measuring = StageSensitivity(adapter, stages.ranges[stage], data, guidance, stage_seed(seed, stage))
            sensitivity = measuring.of_earlier_outputs(groups.sources) / prices
            calls += measuring.calls + measuring.rows
        what, wanted = f"pruning method {type(method).__name__}", f"return indices of {groups.name} for {top} levels"
        with guarded(method, what, wanted):
            levels = method.kept(groups, top, sensitivity)
        if not isinstance(levels, list) or len(levels) != top:
            raise unexpected(what, wanted, levels)
        for level, kept in enumerate(levels, 1):
            try:
                check_weights(groups, GroupWeights(kept))
            except ValueError as error:
                raise DiffesError(f"{what} must {wanted}: {error}") from error
            entries[stage, level] = {groups.name: GroupWeights(kept)} if len(kept) < groups.n_groups else {}
        if progress:
            progress(stage)
    return WeightBank(entries, method.kind, calls=calls, max_level=top)


def stage_seed(seed: int, stage: int) -> int:
    """Return the seed of a stage's calibration timesteps and noise."""
    return seed * 100_003 + stage


def at_split(pruned: Mapping[str, Sequence[GroupWeights]], split: Sequence[int]) -> StageWeights:
    """Return an entry of a bank: each set at its rung, without the sets that stay dense.

    Entries that share weights share the same objects: `nbytes` and the file of a search depend on it.
    """
    return {name: pruned[name][rung] for name, rung in zip(pruned, split, strict=True) if rung}


class _Ladders:
    """Rungs of every group set, and the rung of each level under the equal split.

    Attributes:
        sets: the rungs of each set.
        max_level: H.
        splits: True where levels are allocated by sensitivity.
        equal: (H + 1, sets) rungs of the equal split.
    """

    def __init__(self, adapter: ModelAdapter, method: PruningMethod, allocation: str) -> None:
        self.max_level = method.max_level(adapter)
        self.splits = by_sensitivity(method.kind, allocation)
        macs = macs_per_group(adapter, macs_by_module(adapter)) if self.splits else {}
        self.sets: list[Rungs[Any]] = [
            Rungs.of(p, self.max_level, macs.get(p.name, 0.0), FINER if self.splits else 1)
            for p in adapter.prunable(method.kind)
        ]
        self.equal = [[rungs.equal(level) for rungs in self.sets] for level in range(self.max_level + 1)]


def pruned_weights(
    adapter: ModelAdapter, method: PruningMethod, run: StagePass | None, sets: Sequence[Rungs[Any]], workshop: Workshop
) -> dict[str, list[GroupWeights]]:
    """Return what is left of every set at every rung (the first is dense), in host memory or made on request."""
    if isinstance(method, DepthMethod):
        (rungs,) = sets
        assert run is not None
        return {rungs.groups.name: _blocks_left(method, run, rungs)}
    assert isinstance(method, WidthMethod)
    pruned = {p.groups.name: [GroupWeights(torch.arange(p.groups.n_groups, dtype=torch.int32))] for p in sets}
    for part in passes(method, sets, workshop.limit):
        groups_of: list[GroupSet] = [rungs.groups for rungs in part]
        moments = {} if run is None else input_moments(run, groups_of, full=method.needs == "second_moment")
        for name, values in moments.items():
            _check_finite(name, run, values)
        n_kept = {rungs.groups.name: rungs.kept[1:] for rungs in part}
        if isinstance(method, FactoredMethod):
            for dense, factor in _factors(adapter, method, groups_of, moments):
                name, kept = factor.groups.name, workshop.keep(factor)
                pruned[name] += [FactoredWeights(kept, dense, n, workshop) for n in n_kept[name]]
            continue
        for groups in groups_of:
            weights, inputs = LayerWeights.of(adapter.denoiser, groups), moments.pop(groups.name, ())
            pruned[groups.name] += _rungs(method, groups, weights, inputs, n_kept[groups.name])
    return pruned


def _blocks_left(method: DepthMethod, run: StagePass, rungs: Rungs[BlockSet]) -> list[GroupWeights]:
    """Return the blocks that are left at every rung."""
    changes, n = block_changes(run, rungs.groups), rungs.groups.n_groups
    what, wanted = f"pruning method {type(method).__name__}", f"return a tensor of {n} importances"
    with guarded(method, what, wanted):
        importance = method.importance(changes)
    if not isinstance(importance, Tensor) or importance.shape != (n,):
        raise unexpected(what, wanted, importance)
    _check_finite(rungs.groups.name, run, [importance])
    return nested(importance, rungs.kept)


def _factors(
    adapter: ModelAdapter, method: FactoredMethod, sets: Sequence[GroupSet], moments: dict[str, tuple[Tensor, ...]]
) -> Iterator[tuple[tuple[Tensor, ...], Factor]]:
    """Yield the consumers' dense weights and the factor of each set, sets of one shape together. The moments of a set
    are removed from `moments` when they are used."""
    of_shape: dict[tuple[int, ...], list[tuple[GroupSet, LayerWeights]]] = {}
    for groups in sets:
        weights = LayerWeights.of(adapter.denoiser, groups)
        shape = (groups.size, len(weights.consumers), *weights.consumers[0].shape)
        of_shape.setdefault(shape, []).append((groups, weights))
    for alike in of_shape.values():
        layers = (LayerStatistics(groups, weights, moments.pop(groups.name, ())) for groups, weights in alike)
        for (_, weights), factor in zip(alike, method.factors(layers), strict=True):
            yield weights.consumers, factor


def _rungs(
    method: WidthMethod, groups: GroupSet, weights: LayerWeights, inputs: Sequence[Tensor], n_kept: Sequence[int]
) -> list[GroupWeights]:
    """Return what is left of one set at all its rungs but the dense one."""
    what = f"pruning method {type(method).__name__}"
    wanted = f"return GroupWeights for each of the {len(n_kept)} numbers of groups to keep of {groups.name}"
    with guarded(method, what, wanted):
        found = method.prune(groups, weights, inputs, n_kept)
    if not isinstance(found, list) or [type(each) for each in found] != [GroupWeights] * len(n_kept):
        raise unexpected(what, wanted, found)
    try:
        for each, n in zip(found, n_kept, strict=True):
            check_weights(groups, each, n, [len(consumer) for consumer in weights.consumers])
    except ValueError as error:
        raise DiffesError(f"{what} must {wanted}: {error}") from error
    return [GroupWeights(w.kept.cpu(), tuple(consumer.cpu() for consumer in w.consumers)) for w in found]


def passes(method: PruningMethod, sets: Sequence[Rungs[Any]], memory: int) -> list[list[Rungs[Any]]]:
    """Group the sets whose statistics are taken together: all of them, or as many as fit into `memory` bytes."""
    parts: list[list[Rungs[Any]]] = [[]]
    held = 0
    for rungs in sets:
        width, n_consumers = rungs.groups.n_groups * rungs.groups.size, len(rungs.groups.consumers)
        nbytes = 4 * n_consumers * width**2 if method.needs == "second_moment" else 0
        if parts[-1] and held + nbytes > memory:
            parts.append([])
            held = 0
        parts[-1].append(rungs)
        held += nbytes
    return parts


def _check_finite(name: str, run: StagePass | None, values: Sequence[Tensor]) -> None:
    if run is not None and not all(bool(torch.isfinite(each).all()) for each in values):
        raise DiffesError(
            f"calibration of {name} at timesteps {list(run.stage)} overflowed: not all values are finite. Choose "
            "another --dtype"
        )
