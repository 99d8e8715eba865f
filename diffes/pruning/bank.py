"""Weight bank: what is left in every stage at every level, in memory during a search, as safetensors on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffes.adapters import AnySet, Kind, ModelAdapter
from diffes.adapters.groups import REUSE_SETS, unused_copies
from diffes.errors import DiffesError
from diffes.files import parse_json
from diffes.forms import AGAIN, BankHeader, checked
from diffes.pruning.base import GroupWeights, check_weights
from diffes.pruning.factors import Workshop
from diffes.spaces.schedule import Plan, Schedule

FORMAT = "diffes-bank"
FORMAT_VERSION = 3
PLACE = r"stage(\d{1,9})\.level(\d{1,9})\.(.+)"  # name of a group set's weights in a file
StageWeights = Mapping[str, GroupWeights]
Key = tuple[int, int]  # stage, level


class WeightBank(Mapping[Key, StageWeights]):
    """Pruned weights by (stage, level), then by group-set name, in host memory. Level 0 is dense and never stored.

    Args:
        entries: the weights; a set that an entry does not name is dense at that level.
        kind: "width", "depth" (the one group set is then the blocks) or "reuse"; for sums, joined by "+".
        file: source of entries that are not in memory yet; each is read once.
        calls: denoiser calls, in rows, that making the bank took.
        max_level: H; 0 where it is that of the model and kind.
        workshop: makes the weights that are made on request.

    On disk a bank is one safetensors file. Its tensors are `stage{s}.level{k}.{name}:kept` (n,) int32, the groups that
    stay, and, where the method compensates, `stage{s}.level{k}.{name}:consumer` (d_out, n * size); further consumers of
    the set are `:consumer1`, `:consumer2` and so on. Its metadata has one key, `diffes-bank`, a JSON object:

    - `format_version`: of this layout, now 3; version 2 had no kind `reuse`, no sums and no `same`; version 1 had no
      `split`, and every set in every entry
    - `same`: for each `stage{s}.level{k}.{name}` without tensors of its own, the one whose tensors it shares
    - `kind`: "width", "depth", "reuse" (a set keeps what is computed; the rest is reused from the last call that
      computed it), or some of them joined by "+"; `method`: spec of the pruning method; `model`: the model that it was
      made for
    - `stages`: [[lo, hi], ...] timesteps; `levels`: (S,) those held; `max_level`: H
    - `split`: how the levels held are allocated over the layers (see `split_of`), also in `schedule.json`
    - `fingerprint`: identifies the denoiser (see `fingerprint`)
    """

    def __init__(
        self,
        entries: Mapping[Key, StageWeights],
        kind: str,
        file: BankFile | None = None,
        calls: int = 0,
        max_level: int = 0,
        workshop: Workshop | None = None,
    ) -> None:
        self.kind = kind
        self.calls = calls
        self.max_level = max_level
        self.workshop = workshop
        self._entries = dict(entries)
        self._file = file

    def __getitem__(self, key: Key) -> StageWeights:
        if key not in self._entries:
            if self._file is None or key not in self._file.names:
                raise DiffesError(
                    f"the bank has no weights for stage {key[0]} at level {key[1]}; it holds {sorted(self)}"
                )
            self._entries[key] = self._file.read(key)
        return self._entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter({**self._entries, **(self._file.names if self._file else {})})

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in memory, those of a file as far as it was read; shared weights count once."""
        tensors = {id(w): w.nbytes for entry in self._entries.values() for w in entry.values()}
        return sum(tensors.values()) + (self.workshop.nbytes if self.workshop else 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the methods that made the bank."""
        return tuple(self.kind.split("+"))

    @property
    def reuses(self) -> bool:
        """True where a method that reuses outputs made some of its levels."""
        return "reuse" in self.kinds

    @property
    def reusing(self) -> tuple[int, ...]:
        """Levels that reuse outputs of an earlier call."""
        named = {key: set(entry) for key, entry in self._entries.items()}
        if self._file is not None:
            named |= {key: set(names) for key, names in self._file.names.items()}
        return tuple(sorted({level for (_, level), names in named.items() if names & REUSE_SETS}))

    def for_schedule(self, *schedules: Schedule | Plan) -> WeightBank:
        """Return the part that these schedules or plans need, in memory."""
        keys = sorted({key for schedule in schedules for key in schedule.pruned()})
        return WeightBank({key: self[key] for key in keys}, self.kind, max_level=self.max_level, workshop=self.workshop)

    def in_order(self, levels: Sequence[int]) -> WeightBank:
        """Return the same bank with its levels renumbered: `levels[0]` becomes level 1."""
        new = {level: i for i, level in enumerate(levels, 1)}
        entries = {(stage, new[level]): entry for (stage, level), entry in self.items()}
        return WeightBank(entries, self.kind, calls=self.calls, max_level=self.max_level, workshop=self.workshop)

    def kept(self, key: Key, prunable: Sequence[AnySet]) -> list[int]:
        """Return the number of groups of each set that stay at a stage and level; level 0 keeps all."""
        entry = self[key] if key[1] else {}
        return [len(entry[p.name].kept) if p.name in entry else p.n_groups for p in prunable]

    def save(self, path: Path, header: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
        """Write all entries as one safetensors file. Shared weights are written once.

        Args:
            path: the file.
            header: facts for its metadata; format version, kind and `same` come from this bank.
            dtype: of the compensated weights; unchanged when left out.
        """
        tensors: dict[str, Tensor] = {}
        written: dict[int, str] = {}
        same: dict[str, str] = {}
        for (stage, level), entry in self.items():
            for name, weights in entry.items():
                prefix = f"stage{stage}.level{level}.{name}"
                if id(weights) in written:
                    same[prefix] = written[id(weights)]
                    continue
                written[id(weights)] = prefix
                tensors[f"{prefix}:kept"] = weights.kept.clone()
                for i, consumer in enumerate(weights.consumers):
                    tensors[f"{prefix}:{consumer_name(i)}"] = consumer.to(dtype=dtype).contiguous()
        facts = {
            **header,
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "same": same,
        }  # header may be an old one
        # One metadata key: safetensors writes several keys in random order, and equal banks should be equal files.
        save_file(tensors, path, metadata={FORMAT: json.dumps(facts)})

    @classmethod
    def open(cls, path: Path, dtype: torch.dtype | None = None) -> tuple[WeightBank, dict[str, Any]]:
        """Open a file that `save` wrote, and read its header. Entries are read when first requested.

        Args:
            path: the file.
            dtype: of the compensated weights once in memory; as stored when left out.

        Raises:
            DiffesError: the file is missing, truncated, no bank, or of a newer format version.
        """
        file = BankFile(path, dtype)
        return cls({}, file.header["kind"], file, max_level=file.header.get("max_level", 0)), file.header


class BankFile:
    """An open safetensors file of a bank.

    Attributes:
        header: the facts in its metadata.
        names: the sets of each (stage, level), each with the place of its tensors, `stage{s}.level{k}.{name}`.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        self.path = path
        self._dtype = dtype
        self.names: dict[Key, dict[str, str]] = {}
        self._read: dict[str, GroupWeights] = {}
        try:
            file: Any = safe_open(path, framework="pt")
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise DiffesError(f"{path} is a safetensors file, but not a diffes bank")
            self.header: dict[str, Any] = parse_json(metadata[FORMAT])
            if self.header["format_version"] > FORMAT_VERSION:
                raise DiffesError(
                    f"{path} has bank format version {self.header['format_version']}, but this diffes reads versions "
                    f"up to {FORMAT_VERSION}: install a newer diffes"
                )
            checked(BankHeader, self.header, path)
            own = {full.rsplit(":", 1)[0] for full in file.keys()}  # noqa: SIM118 (a safe_open handle is no mapping)
            for place, source in ({place: place for place in own} | self.header.get("same", {})).items():
                if (found := re.fullmatch(PLACE, place)) is None:
                    raise ValueError(f"tensors must be called stageS.levelK.NAME:..., got {place!r}")
                self.names.setdefault((int(found[1]), int(found[2])), {})[found[3]] = source
            if not set(self.header["kind"].split("+")) <= set(get_args(Kind)):
                raise ValueError(f"kind must be of {', '.join(get_args(Kind))}, got {self.header['kind']!r}")
            self._file = file
        except DiffesError:
            raise
        except FileNotFoundError as error:
            raise DiffesError(f"{path} is missing: {AGAIN}") from error
        except Exception as error:  # safetensors' own error class, and any error that a damaged header causes
            raise self._damaged(error) from error

    def read(self, key: Key) -> StageWeights:
        """Read one stage at one level.

        Raises:
            DiffesError: the data there are damaged.
        """
        try:
            weights = {name: self._tensors(source) for name, source in sorted(self.names[key].items())}
            if (split := self.header.get("split")) is not None:
                self._check_split(f"stage{key[0]}.level{key[1]}", weights, split)
            return weights
        except Exception as error:
            raise self._damaged(error) from error

    def _tensors(self, place: str) -> GroupWeights:
        """Return the weights stored at a place, read once."""
        if place not in self._read:
            kept, names = self._file.get_tensor(f"{place}:kept"), set(self._file.keys())
            found = itertools.takewhile(names.__contains__, (f"{place}:{consumer_name(i)}" for i in itertools.count()))
            self._read[place] = GroupWeights(
                kept, tuple(self._file.get_tensor(name).to(dtype=self._dtype) for name in found)
            )
        return self._read[place]

    def _check_split(self, place: str, weights: StageWeights, split: Mapping[str, Any]) -> None:
        for name, n_groups, n_kept in zip(split["sets"], split["groups"], split["kept"][place], strict=True):
            found = len(weights[name].kept) if name in weights else n_groups
            if found != n_kept:
                raise ValueError(f"{place} keeps {found} groups of {name}, but its split says {n_kept}")

    def _damaged(self, error: Exception) -> DiffesError:
        return DiffesError(f"{self.path} is damaged ({error}): {AGAIN}")


def consumer_name(i: int) -> str:
    """Return the name, in a file, of the tensor of a set's consumer number i."""
    return f"consumer{i or ''}"


def split_of(bank: WeightBank, prunable: Sequence[AnySet]) -> dict[str, Any]:
    """Return how the levels of a bank are allocated over the layers, as JSON for `schedule.json` and the bank's file.

    Returns:
        `sets`: names of the group sets, in the order of the forward pass; `groups`: number of groups in each; `kept`:
        by `stage{s}.level{k}`, (sets,) the number of them that stay there.
    """
    return {
        "sets": [p.name for p in prunable],
        "groups": [p.n_groups for p in prunable],
        "kept": {f"stage{stage}.level{level}": bank.kept((stage, level), prunable) for stage, level in sorted(bank)},
    }


def fingerprint(denoiser: nn.Module) -> dict[str, Any]:
    """Return what identifies a denoiser, in whatever dtype it was loaded: names, shapes and a sample of values.

    A LoRA that is loaded but not fused changes nothing here. Neither do projections that were fused once and are no
    longer used: their parameters do not count.
    """
    found = {n.replace(".base_layer", ""): p for n, p in denoiser.named_parameters() if ".lora_" not in n}
    copies = unused_copies(found)
    parameters = sorted((n, p) for n, p in found.items() if n not in copies)
    structure = json.dumps([[name, list(p.shape)] for name, p in parameters])
    sample = [float(p.detach().flatten()[p.numel() // 2]) for _, p in parameters]
    return {"structure": hashlib.sha256(structure.encode()).hexdigest(), "sample": sample}


def check_bank(bank: WeightBank, header: Mapping[str, Any], adapter: ModelAdapter, path: Path) -> None:
    """Check that weights fit the model and their levels, because a file is not trusted.

    Args:
        bank: the part of a file that a schedule or plan needs.
        header: of the file.
        adapter: the model, dense, recognised by its fingerprint.
        path: of the file.

    Raises:
        DiffesError: a set is none of the model's, an index is out of range, too many or too few groups stay, or a
            weight has another shape or is not finite.
    """
    sets = {prunable.name: prunable for prunable in adapter.prunable(bank.kind)}
    alone = len(bank.kinds) == 1 and not bank.reuses and "+" not in header.get("method", "")
    equal = alone and header.get("allocation", "equal") == "equal"  # others have their own order of levels
    try:
        for (stage, level), entry in bank.items():
            if unknown := sorted(set(entry) - set(sets)):
                raise ValueError(f"it has weights of {unknown[0]}, but the model has no such set")
            for name, prunable in sets.items():
                n = prunable.n_kept(level, bank.max_level or adapter.max_level(bank.kind)) if equal else None
                if name in entry:
                    layers = [adapter.denoiser.get_submodule(path) for path in prunable.consumers]
                    outputs = [layer.weight.numel() // layer.weight.shape[1] for layer in layers]
                    check_weights(prunable, entry[name], n, outputs)
                elif n not in (None, prunable.n_groups):
                    raise ValueError(f"stage {stage} at level {level} must prune {name}, but has no weights of it")
    except ValueError as error:
        raise DiffesError(f"{path} is damaged ({error}): {AGAIN}") from error


def check_fingerprint(denoiser: nn.Module, expected: Mapping[str, Any] | None, path: Path) -> None:
    """Check that a bank was made for this model.

    Raises:
        DiffesError: structure or weights differ by more than half precision explains.
    """
    if expected is None:
        raise DiffesError(f"{path} is damaged (it does not name its model): {AGAIN}")
    found = fingerprint(denoiser)
    same_layers = found["structure"] == expected["structure"] and len(found["sample"]) == len(expected["sample"])
    sample, expected_sample = torch.tensor(found["sample"]), torch.tensor(expected["sample"])
    if not same_layers or not torch.allclose(sample, expected_sample, rtol=2e-2, atol=1e-3):
        raise DiffesError(
            f"{path} was made for another model, with other {'weights' if same_layers else 'layers'} than this "
            "pipeline's: load the pipeline named in the run's config.json, or fit a plan of dense calls to this one "
            "with `diffes fit` or diffes.fit"
        )
