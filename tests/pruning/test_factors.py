"""Levels made from one triangle: exact, the same whenever they are made, within a limit of memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import open_adapter
from test_methods import SETS, consumer_of, example

from diffes.adapters import GroupSet, ModelAdapter
from diffes.errors import DiffesError
from diffes.pruning import METHODS, GroupWeights, LayerWeights, build, factors, obs
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import StagePass, load_calibration
from diffes.pruning.factors import FactoredWeights, LayerStatistics, Workshop
from diffes.pruning.obs import OBS, damped
from diffes.pruning.sensitivity import StageSensitivity
from diffes.spaces.schedule import Stages

HALF = [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)]


def optimum(weights: LayerWeights, moment: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    hessian = damped(moment, 0.01)
    return weights.consumers[0].double() @ hessian[:, features] @ torch.linalg.inv(hessian[features][:, features])


@pytest.mark.parametrize("rows", [1, 5, 8, 128])
@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_every_number_of_groups_is_the_least_squares_optimum(
    groups: GroupSet, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks of the triangle, whether they end with a group or not."""
    monkeypatch.setattr(factors, "ROWS", rows)
    weights, moment = example(groups)
    factor = OBS().factor(groups, weights, (moment,))
    assert sorted(factor.order.tolist()) == [*range(groups.n_groups)]
    for n in range(1, groups.n_groups + 1):
        kept = factor.kept(n)
        assert kept.tolist() == sorted(factor.order[groups.n_groups - n :].tolist())
        wanted = optimum(weights, moment, groups.features(kept.long()))
        assert (factor.consumers(weights.consumers, n)[0] - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(factor.consumers(weights.consumers, groups.n_groups)[0], weights.consumers[0])
    assert factor.consumers(weights.consumers, 0)[0].shape == (10, 0)


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_layers_side_by_side_are_each_as_if_alone(groups: GroupSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU eliminates them, in blocks that end in the middle."""
    monkeypatch.setattr(obs, "BLOCK", 7)
    examples = [example(groups, seed) for seed in range(5)]
    layers = [LayerStatistics(groups, weights, (moment,)) for weights, moment in examples]
    alone = [OBS().factor(each.groups, each.weights, each.inputs) for each in layers]
    monkeypatch.setattr(obs, "_at_once", lambda _: 3)
    together = list(OBS().factors(layers))
    assert len({tuple(factor.order.tolist()) for factor in alone}) == 5
    for one, other in zip(alone, together, strict=True):
        assert one.order.tolist() == other.order.tolist()
        torch.testing.assert_close(one.triangles[0], other.triangles[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), HALF)
@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_triangles_of_half_precision_models_are_as_exact_as_their_weights(
    groups: GroupSet, dtype: torch.dtype, tolerance: float
) -> None:
    single, moment = example(groups)
    weights = LayerWeights(single.producers, (single.consumers[0].to(dtype),))
    factor = OBS().factor(groups, weights, (moment,))
    assert factor.triangles[0].dtype == torch.float16
    for n in (1, groups.n_groups // 2, groups.n_groups - 1):
        wanted = optimum(weights, moment, groups.features(factor.kept(n).long()))
        (found,) = factor.consumers(weights.consumers, n)
        assert found.dtype == dtype and (found.double() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_effects_are_those_of_the_weights_that_are_made(groups: GroupSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "ROWS", 7)
    weights, moment = example(groups)
    factor = OBS().factor(groups, weights, (moment,))
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 5, groups.n_groups * groups.size, generator=generator)
    backward = torch.randn(3, 2, 5, 10, generator=generator)
    effects = factor.effects(0, weights.consumers[0], inputs, backward)
    assert effects.shape == (3, 2, groups.n_groups + 1) and effects.dtype == torch.float64
    assert effects[..., 0].abs().max() == 0
    for dropped in range(groups.n_groups + 1):
        thin = torch.zeros_like(weights.consumers[0])
        n = groups.n_groups - dropped
        thin[:, groups.features(factor.kept(n).long())] = factor.consumers(weights.consumers, n)[0]
        wanted = (backward * (inputs @ (thin - weights.consumers[0]).T)).sum((2, 3)).double()
        torch.testing.assert_close(effects[..., dropped], wanted, rtol=1e-4, atol=1e-3)


def banks(adapter: ModelAdapter, stages: Stages, *limits: int) -> list[WeightBank]:
    data = load_calibration(adapter, Path(adapter.pipe.config._name_or_path) / "calibration.npz", 8)
    return [
        build_bank(
            adapter, METHODS.make("obs"), stages, data, guidance=2.0, seed=0, allocation="sensitivity", only=[1, 2],
            memory=limit,
        )
        for limit in limits
    ]  # fmt: skip


@pytest.mark.slow
def test_levels_do_not_depend_on_the_limit_nor_on_when_they_are_made(
    tiny_folder: Path, tiny_sdxl_folder: Path, stages: Stages
) -> None:
    """With room for all, and with room for nothing: triangles in the file, one level ready, statistics set by set."""
    for folder in (tiny_folder, tiny_sdxl_folder):
        roomy, narrow = banks(open_adapter(str(folder)), stages, factors.MEMORY, 1)
        assert roomy.workshop is not None and narrow.workshop is not None
        assert roomy.workshop.filed == 0 < narrow.workshop.filed
        assert narrow.calls > roomy.calls
        assert sorted(roomy) == sorted(narrow)
        for key in reversed(sorted(roomy)):
            assert roomy[key].keys() == narrow[key].keys()
            for name, weights in roomy[key].items():
                other = narrow[key][name]
                assert torch.equal(weights.kept, other.kept)
                for _ in range(2):
                    assert torch.equal(consumer_of(weights), consumer_of(other))


def test_what_is_ready_stays_within_the_limit_and_the_oldest_goes_first() -> None:
    groups = SETS[1]
    weights, moment = example(groups)
    factor = OBS().factor(groups, weights, (moment,))
    one = factor.consumers(weights.consumers, 12)[0].nbytes
    (triangle,) = factor.triangles
    assert isinstance(triangle, torch.Tensor)
    shop = Workshop(2 * triangle.nbytes)
    assert shop.keep(factor) is factor and shop.nbytes == triangle.nbytes and shop.filed == 0
    shop.limit = shop.nbytes + 2 * one
    a, b, c = (FactoredWeights(factor, weights.consumers, n, shop) for n in (12, 11, 10))
    (first,) = a.consumers
    assert a.consumers[0] is first and shop.made == 1
    _ = b.consumers
    _ = a.consumers  # b is now the one that was not asked for longest
    _ = c.consumers
    assert shop.made == 3 and shop.nbytes <= shop.limit
    assert a.consumers[0] is first and shop.made == 3
    _ = b.consumers
    assert shop.made == 4 and shop.seconds > 0


def test_a_triangle_that_finds_no_room_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, moment = example(SETS[1])
    factor = OBS().factor(SETS[1], weights, (moment,))

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(
        DiffesError,
        match=r"0\.0 GB so far, have no room in .*TMPDIR to a folder with more room, or raise --bank-memory",
    ):
        Workshop(1).keep(factor)


def test_sensitivity_needs_no_level_to_be_made(tiny: ModelAdapter, stages: Stages) -> None:
    """And is, to rounding, that of levels that are there as weights."""
    data = load_calibration(tiny, Path(tiny.pipe.config._name_or_path) / "calibration.npz", 8)
    shop, method = Workshop(), METHODS.make("obs")
    sets = build._Ladders(tiny, method, "sensitivity").sets
    run = StagePass(tiny, stages.ranges[1], data, True, 0)
    pruned = build.pruned_weights(tiny, method, run, sets, shop)
    measuring = StageSensitivity(tiny, stages.ranges[1], data, 2.0, 0)
    found = measuring.measure(sets, pruned)
    assert shop.made == 0
    there = {
        name: [first, *(GroupWeights(w.kept, w.consumers) for w in rest)] for name, (first, *rest) in pruned.items()
    }
    for one, other in zip(found, measuring.measure(sets, there), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-4, atol=0)
