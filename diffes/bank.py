"""The weight bank: thin weights of every stage and level, in memory during a search, as safetensors on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffes.adapters.base import ModelAdapter
from diffes.errors import DiffesError
from diffes.pruning.base import GroupWeights, LayerWeights, PruningMethod
from diffes.pruning.calibration import CalibrationSet, second_moments
from diffes.schedule import Schedule, StagePlan

FORMAT = "diffes-bank"
FORMAT_VERSION = 1
StageWeights = Mapping[str, GroupWeights]


class WeightBank(Mapping[tuple[int, int], StageWeights]):
    """Thin weights by (stage, level), inside by group-set name, in host memory. Level 0 is dense and never stored."""

    def __init__(self, entries: Mapping[tuple[int, int], StageWeights]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: tuple[int, int]) -> StageWeights:
        try:
            return self._entries[key]
        except KeyError:
            raise DiffesError(
                f"the bank has no weights for stage {key[0]} at level {key[1]}; it holds {sorted(self._entries)}"
            ) from None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; stages that share weights count them once."""
        tensors = {id(w): w.nbytes for entry in self._entries.values() for w in entry.values()}
        return sum(tensors.values())

    def for_schedule(self, schedule: Schedule) -> WeightBank:
        """The part that one schedule needs."""
        keys = [(stage, level) for stage, level in enumerate(schedule.levels) if level]
        return WeightBank({key: self[key] for key in keys})

    @classmethod
    def build(
        cls,
        adapter: ModelAdapter,
        method: PruningMethod,
        plan: StagePlan,
        data: CalibrationSet | None,
        *,
        guided: bool,
        seed: int,
        stages: Iterable[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> WeightBank:
        """Calibrates and prunes stage by stage; only one stage's statistics are in memory at a time.

        Args:
            adapter: the dense model.
            method: how to prune.
            plan: the stages.
            data: clean latents; not needed by methods that look at weights alone.
            guided: whether sampling will use classifier-free guidance.
            seed: of the calibration timesteps and noise; stage s draws the same ones whatever the other stages do.
            stages: which stages; all when left out.
            progress: told the stage after each.

        Raises:
            DiffesError: the method needs calibration data and there is none, or a layer's statistics are not finite.
        """
        sets = adapter.group_sets()
        levels = range(1, adapter.max_level + 1)
        shared: dict[int, dict[str, GroupWeights]] | None = None
        entries: dict[tuple[int, int], StageWeights] = {}
        for stage in range(len(plan)) if stages is None else stages:
            if method.needs_inputs or shared is None:
                moments: dict[str, Tensor] = {}
                if method.needs_inputs:
                    if data is None:
                        raise DiffesError(f"{type(method).__name__} needs calibration data, got none")
                    generator = torch.Generator().manual_seed(seed * 100_003 + stage)
                    moments = second_moments(
                        adapter, sets, plan.stages[stage], data, guided=guided, generator=generator
                    )
                shared = {level: {} for level in levels}
                for groups in sets:
                    moment = moments.get(groups.name)
                    if moment is not None and not torch.isfinite(moment).all():
                        raise DiffesError(
                            f"calibration of {groups.name} in stage {stage} overflowed: its inputs are not finite; "
                            "try another --dtype"
                        )
                    thin = method.prune(
                        groups,
                        LayerWeights.of(adapter.denoiser, groups),
                        moment,
                        [groups.n_kept(level, adapter.max_level) for level in levels],
                    )
                    for level, weights in zip(levels, thin, strict=True):
                        consumer = None if weights.consumer is None else weights.consumer.cpu()
                        shared[level][groups.name] = GroupWeights(weights.kept.cpu(), consumer)
            entries.update({(stage, level): shared[level] for level in levels})
            if progress:
                progress(stage)
        return cls(entries)

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Writes all entries as one safetensors file with `header` as JSON in its metadata."""
        tensors: dict[str, Tensor] = {}
        for (stage, level), entry in self.items():
            for name, weights in entry.items():
                prefix = f"stage{stage}.level{level}.{name}"
                tensors[f"{prefix}:kept"] = weights.kept.clone()
                if weights.consumer is not None:
                    tensors[f"{prefix}:consumer"] = weights.consumer.contiguous()
        # One metadata key: safetensors writes several in random order, and equal banks should be equal files.
        save_file(tensors, path, metadata={FORMAT: json.dumps({"format_version": FORMAT_VERSION, **header})})

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> tuple[WeightBank, dict[str, Any]]:
        """Reads a file that `save` wrote, and its header.

        Raises:
            DiffesError: the file is missing, truncated, no bank, or of a newer format version.
        """
        entries: dict[tuple[int, int], dict[str, dict[str, Tensor]]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if FORMAT not in metadata:
                    raise DiffesError(f"{path} is a safetensors file but no diffes bank")
                header = json.loads(metadata[FORMAT])
                if header["format_version"] > FORMAT_VERSION:
                    raise DiffesError(
                        f"{path} has bank format version {header['format_version']}, this diffes reads up to "
                        f"{FORMAT_VERSION}: install a newer diffes"
                    )
                for key in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                    place, part = key.rsplit(":", 1)
                    stage, level, name = place.split(".", 2)
                    entry = entries.setdefault((int(stage[5:]), int(level[5:])), {})
                    tensor = file.get_tensor(key)
                    entry.setdefault(name, {})[part] = tensor.to(dtype) if part == "consumer" else tensor
        except DiffesError:
            raise
        except FileNotFoundError as error:
            raise DiffesError(f"{path} is missing: run `diffes search` again") from error
        except Exception as error:  # safetensors' own error class, and whatever a damaged header leads to
            raise DiffesError(f"{path} is damaged ({error}): run `diffes search` again") from error
        return cls({k: {n: GroupWeights(**parts) for n, parts in e.items()} for k, e in entries.items()}), header


def fingerprint(denoiser: nn.Module) -> dict[str, Any]:
    """What tells one denoiser from another, in whatever dtype it was loaded: names, shapes and a sample of values."""
    parameters = sorted(denoiser.named_parameters())
    structure = json.dumps([[name, list(p.shape)] for name, p in parameters])
    sample = [float(p.detach().flatten()[p.numel() // 2]) for _, p in parameters]
    return {"structure": hashlib.sha256(structure.encode()).hexdigest(), "sample": sample}


def check_fingerprint(denoiser: nn.Module, expected: Mapping[str, Any], path: Path) -> None:
    """Refuses a bank that was made for another model.

    Raises:
        DiffesError: structure or weights differ by more than half precision explains.
    """
    found = fingerprint(denoiser)
    same_layers = found["structure"] == expected["structure"]
    sample, expected_sample = torch.tensor(found["sample"]), torch.tensor(expected["sample"])
    if not same_layers or not torch.allclose(sample, expected_sample, rtol=2e-2, atol=1e-3):
        raise DiffesError(
            f"{path} was made for another model: its denoiser has other {'weights' if same_layers else 'layers'} than "
            "this pipeline's; load the pipeline named in the run's config.json"
        )
