"""Construction of a bank: calibrate, prune, and allocate every level over the layers, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diffes.adapters import BlockSet, GroupSet, ModelAdapter
from diffes.adapters.macs import macs_by_module, macs_per_group
from diffes.config import Allocation
from diffes.errors import DiffesError
from diffes.plugins import guarded, unexpected
from diffes.pruning.allocation import Rungs, allocate, allocation_of
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
from diffes.pruning.damage import StageDamage
from diffes.pruning.factors import MEMORY, Factor, FactoredMethod, FactoredWeights, LayerStatistics, Workshop
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
    allocation: Allocation = "equal",
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
        allocation: "equal", as in the paper: a level removes the same fraction of every group set; "damage": a level
            saves at least as many multiply-accumulates where the prediction is least sensitive. Depth has one set only.
        only: numbers of the stages to prune; all when left out.
        progress: called with the number of each finished stage.
        memory: bytes of host memory for triangles and ready levels, and for the statistics of a stage. Where the
            statistics need more, they are taken in passes over some of the layers at a time.

    Raises:
        DiffesError: calibration data are needed and there are none, or a layer's statistics are not finite.
    """
    chosen = list(range(len(stages)) if only is None else only)
    if isinstance(method, Sum):
        banks = [
            build_bank(
                adapter, part, stages, data, guidance=guidance, seed=seed, allocation=allocation, only=chosen,
                progress=progress, memory=memory,
            )
            for part in method.parts
        ]  # fmt: skip
        return joined(banks)
    if isinstance(method, ReuseMethod):
        return _reusing(adapter, method, stages, data, guidance, seed, chosen, progress)
    ladders = _Ladders(adapter, method, allocation)
    if data is None and (method.needs != "nothing" or ladders.splits):
        raise DiffesError(f"{type(method).__name__} with allocation {allocation} needs calibration data, got none")
    thin: dict[str, list[GroupWeights]] | None = None
    entries: dict[Key, StageWeights] = {}
    workshop = Workshop(memory)
    calls = 0
    for stage in chosen:
        drawn = stage_seed(seed, stage)
        if thin is None or method.needs != "nothing":
            run = None
            if method.needs != "nothing":
                assert data is not None
                weigh = method.timestep_weights
                guided = adapter.guided(guidance).branches > 1
                run = StagePass(adapter, stages.ranges[stage], data, guided, drawn, weigh)
                calls += len(data) * len(passes(method, ladders.sets, memory))
            thin = thin_weights(adapter, method, run, ladders.sets, workshop)
        split = ladders.equal
        if ladders.splits:
            assert data is not None
            damage = StageDamage(adapter, stages.ranges[stage], data, guidance, drawn)
            split = allocate(ladders.sets, damage.measure(ladders.sets, thin))
            calls += damage.calls
        for level in range(1, ladders.max_level + 1):
            entries[stage, level] = at_split(thin, split[level])
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
    dense: dict[str, Tensor] = {}
    made: dict[int, GroupWeights] = {}
    for weights in (each for entry in bank.values() for each in entry.values() if isinstance(each, FactoredWeights)):
        factor = weights.factor
        if id(factor) not in factors:
            factors[id(factor)] = workshop.keep(factor) if held else factor
        if factor.groups.name not in dense:
            dense[factor.groups.name] = LayerWeights.of(adapter.denoiser, factor.groups).consumer
        if id(weights) not in made:  # weights that share an object go on sharing it
            n_kept = len(weights.kept)
            made[id(weights)] = FactoredWeights(factors[id(factor)], dense[factor.groups.name], n_kept, workshop)
    return made


def joined(banks: Sequence[WeightBank]) -> WeightBank:
    """Join banks into one. The levels of each bank follow those of the banks before it."""
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
        harm = None
        if measures:
            assert data is not None
            damage = StageDamage(adapter, stages.ranges[stage], data, guidance, stage_seed(seed, stage))
            harm = damage.of_earlier_outputs(groups.sources) / prices
            calls += damage.calls + damage.rows
        what, wanted = f"pruning method {type(method).__name__}", f"return indices of {groups.name} for {top} levels"
        with guarded(method, what, wanted):
            levels = method.kept(groups, top, harm)
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


def at_split(thin: Mapping[str, Sequence[GroupWeights]], split: Sequence[int]) -> StageWeights:
    """Return an entry of a bank: each set at its rung, without the sets that stay dense.

    Entries that share weights share the same objects: `nbytes` and the file of a search depend on it.
    """
    return {name: thin[name][rung] for name, rung in zip(thin, split, strict=True) if rung}


class _Ladders:
    """Rungs of every group set, and the rung of each level under the equal split.

    Attributes:
        sets: the rungs of each set.
        max_level: H.
        splits: True where levels are allocated by sensitivity.
        equal: (H + 1, sets) rungs of the equal split.
    """

    def __init__(self, adapter: ModelAdapter, method: PruningMethod, allocation: Allocation) -> None:
        self.max_level = method.max_level(adapter)
        self.splits = allocation_of(method.kind, allocation) == "damage"
        macs = macs_per_group(adapter, macs_by_module(adapter)) if self.splits else {}
        self.sets = [
            Rungs.of(p, self.max_level, macs.get(p.name, 0.0), FINER if self.splits else 1)
            for p in adapter.prunable(method.kind)
        ]
        self.equal = [[rungs.equal(level) for rungs in self.sets] for level in range(self.max_level + 1)]


def thin_weights(
    adapter: ModelAdapter, method: PruningMethod, run: StagePass | None, sets: Sequence[Rungs], workshop: Workshop
) -> dict[str, list[GroupWeights]]:
    """Return what is left of every set at every rung (the first is dense), in host memory or made on request."""
    if isinstance(method, DepthMethod):
        (rungs,) = sets
        assert run is not None and isinstance(rungs.groups, BlockSet)
        changes, n = block_changes(run, rungs.groups), rungs.groups.n_groups
        what, wanted = f"pruning method {type(method).__name__}", f"return a tensor of {n} importances"
        with guarded(method, what, wanted):
            importance = method.importance(changes)
        if not isinstance(importance, Tensor) or importance.shape != (n,):
            raise unexpected(what, wanted, importance)
        _check_finite(rungs.groups.name, run, importance)
        return {rungs.groups.name: nested(importance, rungs.kept)}
    assert isinstance(method, WidthMethod)
    thin = {p.groups.name: [GroupWeights(torch.arange(p.groups.n_groups, dtype=torch.int32))] for p in sets}
    for part in passes(method, sets, workshop.limit):
        groups_of = [rungs.groups for rungs in part if isinstance(rungs.groups, GroupSet)]
        moments = {} if run is None else input_moments(run, groups_of, full=method.needs == "second_moment")
        for name, values in moments.items():
            _check_finite(name, run, values)
        n_kept = {rungs.groups.name: rungs.kept[1:] for rungs in part}
        if isinstance(method, FactoredMethod):
            for dense, factor in _factors(adapter, method, groups_of, moments):
                name, kept = factor.groups.name, workshop.keep(factor)
                thin[name] += [FactoredWeights(kept, dense, n, workshop) for n in n_kept[name]]
            continue
        for groups in groups_of:
            weights, moment = LayerWeights.of(adapter.denoiser, groups), moments.pop(groups.name, None)
            thin[groups.name] += _rungs(method, groups, weights, moment, n_kept[groups.name])
    return thin


def _factors(
    adapter: ModelAdapter, method: FactoredMethod, sets: Sequence[GroupSet], moments: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Factor]]:
    """Yield the consumer's dense weight and the factor of each set, sets of one shape together. Each moment is removed
    from `moments` when it is used."""
    of_shape: dict[tuple[int, ...], list[tuple[GroupSet, LayerWeights]]] = {}
    for groups in sets:
        weights = LayerWeights.of(adapter.denoiser, groups)
        of_shape.setdefault((groups.size, *weights.consumer.shape), []).append((groups, weights))
    for alike in of_shape.values():
        layers = (LayerStatistics(groups, weights, moments.pop(groups.name, None)) for groups, weights in alike)
        for (_, weights), factor in zip(alike, method.factors(layers), strict=True):
            yield weights.consumer, factor


def _rungs(
    method: WidthMethod, groups: GroupSet, weights: LayerWeights, moment: Tensor | None, n_kept: Sequence[int]
) -> list[GroupWeights]:
    """Return what is left of one set at all its rungs but the dense one."""
    what = f"pruning method {type(method).__name__}"
    wanted = f"return GroupWeights for each of the {len(n_kept)} numbers of groups to keep of {groups.name}"
    with guarded(method, what, wanted):
        found = method.prune(groups, weights, moment, n_kept)
    if not isinstance(found, list) or [type(each) for each in found] != [GroupWeights] * len(n_kept):
        raise unexpected(what, wanted, found)
    try:
        for each, n in zip(found, n_kept, strict=True):
            check_weights(groups, each, n, weights.consumer.shape[0])
    except ValueError as error:
        raise DiffesError(f"{what} must {wanted}: {error}") from error
    return [GroupWeights(w.kept.cpu(), None if w.consumer is None else w.consumer.cpu()) for w in found]


def passes(method: PruningMethod, sets: Sequence[Rungs], memory: int) -> list[list[Rungs]]:
    """Group the sets whose statistics are taken together: all of them, or as many as fit into `memory` bytes."""
    parts: list[list[Rungs]] = [[]]
    held = 0
    for rungs in sets:
        width = rungs.groups.n_groups * rungs.groups.size if isinstance(rungs.groups, GroupSet) else 0
        nbytes = 4 * width**2 if method.needs == "second_moment" else 0
        if parts[-1] and held + nbytes > memory:
            parts.append([])
            held = 0
        parts[-1].append(rungs)
        held += nbytes
    return parts


def _check_finite(name: str, run: StagePass | None, values: Tensor) -> None:
    if run is not None and not torch.isfinite(values).all():
        raise DiffesError(
            f"calibration of {name} at timesteps {list(run.stage)} overflowed: not all values are finite; "
            "try another --dtype"
        )
