"""Files of one calibrated stage, from which an interrupted calibration continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffes.adapters import GroupSet, ModelAdapter
from diffes.errors import DiffesError
from diffes.files import check_seal, file_sha256, read_json, write_safely, write_sealed
from diffes.forms import AGAIN, StageFile, checked
from diffes.pruning.bank import Key, StageWeights, WeightBank, consumer_name, fingerprint
from diffes.pruning.base import GroupWeights, LayerWeights, check_weights
from diffes.pruning.factors import Factor, FactoredWeights, Workshop, packed_size


def write_stage(path: Path, bank: WeightBank, adapter: ModelAdapter) -> None:
    """Write the bank of one stage: triangles, not the levels made from them; tensors first, then `path`.

    Args:
        path: of the JSON; the tensors go beside it, as safetensors.
        bank: of one stage.
        adapter: the model that it was made for.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[int, str] = {}  # places of triangles, and of weights without one, by their id
    entries: list[dict[str, Any]] = []
    for (stage, level), entry in bank.items():
        found: dict[str, Any] = {}
        for name, weights in entry.items():
            source = weights.factor if isinstance(weights, FactoredWeights) else weights
            if id(source) not in places:
                places[id(source)] = place = f"set{len(places)}"
                tensors |= {f"{place}:{part}": tensor for part, tensor in _tensors(source).items()}
            found[name] = [places[id(source)], len(weights.kept)]
        entries.append({"stage": stage, "level": level, "sets": found})
    beside = path.with_suffix(".safetensors")
    write_safely(beside, lambda partial: save_file(tensors, partial))
    facts = {"kind": bank.kind, "max_level": bank.max_level, "calls": bank.calls, "entries": entries}
    write_sealed(path, {**facts, "sha256": file_sha256(beside), "fingerprint": fingerprint(adapter.denoiser)})


def _tensors(source: Factor | GroupWeights) -> dict[str, Tensor]:
    if isinstance(source, Factor):
        whole = (each if isinstance(each, Tensor) else each[: each.size] for each in source.triangles)
        return {"order": source.order, **{triangle_name(i): triangle for i, triangle in enumerate(whole)}}
    consumers = {consumer_name(i): consumer.contiguous() for i, consumer in enumerate(source.consumers)}
    return {"kept": source.kept.clone(), **consumers}


def triangle_name(i: int) -> str:
    """Return the name, in a file, of the triangle of a set's consumer number i."""
    return f"triangle{i or ''}"


def read_stage(path: Path, adapter: ModelAdapter) -> WeightBank:
    """Read the bank of one stage that `write_stage` wrote. Its triangles stay in the file, memory-mapped.

    Raises:
        DiffesError: it is missing, damaged, or of another model.
    """
    data, beside = read_json(path), path.with_suffix(".safetensors")
    stage = checked(StageFile, data, path)
    check_seal(path, data)
    try:
        if file_sha256(beside) != stage.sha256 or fingerprint(adapter.denoiser) != data["fingerprint"]:
            raise ValueError("its tensors were changed, or are of another model")
        with safe_open(beside, framework="pt") as file:
            return _bank(stage, file, adapter)
    except Exception as error:  # safetensors' own error class, and any error that data of another model cause
        raise DiffesError(f"{beside} is damaged ({error}): {AGAIN}") from error


def _bank(stage: StageFile, file: Any, adapter: ModelAdapter) -> WeightBank:
    sets = {prunable.name: prunable for prunable in adapter.prunable(stage.kind)}
    layers = {groups.name: groups for groups in adapter.group_sets()}
    names, workshop = set(file.keys()), Workshop()
    factors: dict[str, Factor] = {}
    known: dict[tuple[str, int], GroupWeights] = {}  # shared weights become one object again
    entries: dict[Key, StageWeights] = {}
    for each in stage.entries:
        entry: dict[str, GroupWeights] = {}
        for name, (place, n_kept) in each.sets.items():
            groups = sets[name]
            if (place, n_kept) not in known:
                if f"{place}:order" in names:
                    if place not in factors:
                        factors[place] = _factor(layers[name], place, file)
                    dense = LayerWeights.of(adapter.denoiser, layers[name]).consumers
                    known[place, n_kept] = FactoredWeights(factors[place], dense, n_kept, workshop)
                else:
                    there = [consumer_name(i) for i in range(len(groups.consumers))]
                    consumers = [file.get_tensor(f"{place}:{x}") for x in there if f"{place}:{x}" in names]
                    known[place, n_kept] = GroupWeights(file.get_tensor(f"{place}:kept"), tuple(consumers))
                    check_weights(groups, known[place, n_kept], n_kept)
            entry[name] = known[place, n_kept]
        entries[each.stage, each.level] = entry
    return WeightBank(entries, stage.kind, calls=stage.calls, max_level=stage.max_level)


def _factor(groups: GroupSet, place: str, file: Any) -> Factor:
    order = file.get_tensor(f"{place}:order")
    if order.sort().values.tolist() != list(range(groups.n_groups)):
        raise ValueError(f"the order of {groups.name} must name each of its groups once")
    triangles = tuple(file.get_tensor(f"{place}:{triangle_name(i)}") for i in range(len(groups.consumers)))
    for triangle in triangles:
        if triangle.shape != (packed_size(groups.width),):
            raise ValueError(
                f"a triangle of {groups.name} must have {packed_size(groups.width)} elements, got {triangle.numel()}"
            )
    return Factor(groups, order, triangles)
