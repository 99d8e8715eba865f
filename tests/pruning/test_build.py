from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import skip_twice, small_bank

from diffes.adapters import GroupSet, ModelAdapter
from diffes.adapters.macs import call_once, macs_per_call
from diffes.errors import DiffesError
from diffes.measure.currencies import macs_by_level
from diffes.pruning import METHODS, make_method
from diffes.pruning.bank import WeightBank, split_of
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import load_calibration
from diffes.pruning.factors import MEMORY, FactoredWeights
from diffes.pruning.sensitivity import StageSensitivity
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

STAGES = [1, 2]  # as in the tests of the router: the same banks serve


def width_methods() -> list[str]:
    return [name for name in METHODS.names() if METHODS.make(name).kind == "width"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.names())
def test_costs_of_levels_are_the_macs_that_are_counted(adapter: ModelAdapter, stages: Stages, method: str) -> None:
    """The table, which is arithmetic for width, against a counter on the routed model; equal splits cost no less."""
    skip_twice(adapter, method)
    bank = small_bank(adapter, method, stages, STAGES)
    max_level = bank.max_level
    router = Router(adapter, bank)
    table = macs_by_level(router, stages, STAGES, max_level)
    equal = macs_by_level(
        Router(adapter, small_bank(adapter, method, stages, STAGES, allocation="equal")), stages, STAGES, max_level
    )
    for level in range(max_level + 1):
        with router.routed(Schedule(stages, (0, level, level, 0), max_level)):
            call_once(adapter, 999)  # the first call of a run computes everything
            for stage in reversed(STAGES):
                counted = macs_per_call(adapter, stages.ranges[stage][0])
                assert table[stage][level] == pytest.approx(counted, rel=1e-9), (stage, level)
                assert table[stage][level] <= equal[stage][level] * (1 + 1e-9)


def test_splits_are_uneven_and_differ_by_stage(stages: Stages, tiny_sdxl: ModelAdapter, tiny: ModelAdapter) -> None:
    for adapter in (tiny, tiny_sdxl):
        bank = small_bank(adapter, "obs", stages, STAGES)
        sets = adapter.group_sets()
        shares = {
            stage: [n / p.n_groups for n, p in zip(bank.kept((stage, 2), sets), sets, strict=True)] for stage in STAGES
        }
        assert len(set(shares[1])) > 1
        assert bank.calls > small_bank(adapter, "obs", stages, STAGES, allocation="equal").calls > 0


@pytest.mark.parametrize("method", width_methods())
def test_rungs_of_a_set_are_nested(tiny: ModelAdapter, stages: Stages, method: str) -> None:
    """Levels need not be, but within each set whoever keeps fewer groups keeps a part of them."""
    bank = small_bank(tiny, method, stages, STAGES)
    for groups in tiny.group_sets():
        entries = [bank[1, level].get(groups.name) for level in range(1, 5)]
        kept = sorted((set(entry.kept.tolist()) for entry in entries if entry is not None), key=len)
        assert kept and all(smaller <= larger for smaller, larger in itertools.pairwise(kept))


def test_the_equal_allocation_is_the_papers(tiny: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(tiny, "obs", stages, STAGES, allocation="equal")
    for level in range(5):
        kept = bank.kept((1, level), tiny.group_sets())
        assert kept == [groups.n_kept(level, 4) for groups in tiny.group_sets()]


def test_sensitivity_is_measured_in_the_stage_and_decides(
    tiny: ModelAdapter, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that is told to be insensitive gives all it has before any other set gives."""
    data = load_calibration(tiny, Path(tiny.pipe.config._name_or_path) / "calibration.npz", 8)
    asked = []

    def measure(self: StageSensitivity, sets, pruned):  # type: ignore[no-untyped-def]
        asked.append((self.stage, self.guidance))
        return [torch.arange(len(r.kept)).double().numpy() * (r.groups.name != sets[1].groups.name) for r in sets]

    monkeypatch.setattr(StageSensitivity, "measure", measure)
    bank = build_bank(
        tiny, METHODS.make("magnitude"), stages, data, guidance=3.0, seed=0, allocation="sensitivity", only=[0, 2]
    )
    assert asked == [((0, 250), 3.0), ((500, 750), 3.0)]
    sets = tiny.group_sets()
    assert isinstance(sets[1], GroupSet)
    first, second, *others = bank.kept((0, 1), sets)
    assert second < sets[1].n_groups and [first, *others] == [s.n_groups for s in (sets[0], *sets[2:])]


def test_allocation_by_sensitivity_needs_data_even_where_the_method_does_not(
    tiny: ModelAdapter, stages: Stages
) -> None:
    with pytest.raises(DiffesError, match="Magnitude with allocation damage needs calibration data, got none"):
        build_bank(tiny, METHODS.make("magnitude"), stages, None, guidance=2.0, seed=0, allocation="damage")


def test_the_split_is_kept_with_the_bank_and_checked(tiny: ModelAdapter, stages: Stages, tmp_path: Path) -> None:
    schedule = Schedule(stages, (0, 1, 3, 0), 4)
    bank = small_bank(tiny, "obs", stages).for_schedule(schedule)
    sets = tiny.group_sets()
    split = split_of(bank, sets)
    assert split["sets"] == [s.name for s in sets] and split["groups"] == [s.n_groups for s in sets]
    assert split["kept"].keys() == {"stage1.level1", "stage2.level3"}
    assert split["kept"]["stage2.level3"] == bank.kept((2, 3), sets) and bank.kept((0, 0), sets) == split["groups"]
    bank.save(tmp_path / "bank", {"split": split})
    loaded, header = WeightBank.open(tmp_path / "bank")
    assert header["split"] == split and loaded.kept((2, 3), sets) == bank.kept((2, 3), sets)
    split["kept"]["stage2.level3"][0] += 1
    bank.save(tmp_path / "bank", {"split": split})
    loaded, _ = WeightBank.open(tmp_path / "bank")
    assert loaded[1, 1]
    with pytest.raises(DiffesError, match=r"is damaged \(stage2.level3 keeps \d+ groups of transformer_blocks"):
        _ = loaded[2, 3]


def test_damage_is_another_name_of_sensitivity(tiny: ModelAdapter, stages: Stages) -> None:
    data = load_calibration(tiny, Path(tiny.pipe.config._name_or_path) / "calibration.npz", 8)
    build = {"guidance": 2.0, "seed": 0, "only": [1]}
    old, new = (
        build_bank(tiny, METHODS.make("magnitude"), stages, data, allocation=name, **build)  # type: ignore[arg-type]
        for name in ("damage", "sensitivity")
    )
    sets = tiny.group_sets()
    assert [old.kept(key, sets) for key in sorted(old)] == [new.kept(key, sets) for key in sorted(new)]
    with pytest.raises(DiffesError, match="allocation must be sensitivity or equal, got 'harm'"):
        build_bank(tiny, METHODS.make("magnitude"), stages, data, allocation="harm", **build)  # type: ignore[arg-type]


def test_a_memory_limit_bounds_all_parts_of_a_sum_together(tiny: ModelAdapter, stages: Stages) -> None:
    data = load_calibration(tiny, Path(tiny.pipe.config._name_or_path) / "calibration.npz", 8)

    def bank_of(spec: str, memory: int) -> WeightBank:
        return build_bank(tiny, make_method(spec), stages, data, guidance=2.0, seed=0, only=[1, 2], memory=memory)

    alone = bank_of("obs", MEMORY).workshop
    assert alone is not None
    limit = 2 * alone.nbytes  # half of it takes the triangles of one part
    both = bank_of("obs+obs:weighting=log", limit)
    assert both.workshop is not None and both.workshop.filed == alone.nbytes == both.workshop.nbytes
    made = {id(w): w for entry in both.values() for w in entry.values() if isinstance(w, FactoredWeights)}
    assert all(len(weights.consumers) == 1 and both.workshop.nbytes <= limit for weights in made.values())
    assert both.workshop.made == len(made)
