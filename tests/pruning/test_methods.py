"""Conformance of every registered pruning method, and the least-squares oracle of OBS."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffes.adapters import GroupSet
from diffes.pruning import METHODS, LayerWeights
from diffes.pruning.obs import OBS, damped

SETS = [
    GroupSet("attention", "heads", 6, 4, ("q", "k", "v"), "out"),
    GroupSet("ffn", "channels", 24, 1, ("in",), "out"),
    GroupSet("gated", "channels", 24, 1, ("gate",), "out"),
]


def example(groups: GroupSet, seed: int = 0) -> tuple[LayerWeights, torch.Tensor]:
    """Random weights and a badly conditioned second moment: inputs that are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    d = groups.n_groups * groups.size
    rows = 2 * d if groups.name == "gated" else d
    producers = tuple(torch.randn(rows, 10, generator=generator) for _ in groups.producers)
    x = torch.randn(400, d // 2, generator=generator) @ torch.randn(d // 2, d, generator=generator)
    x += 0.1 * torch.randn(400, d, generator=generator)
    return LayerWeights(producers, torch.randn(10, d, generator=generator)), x.T @ x / 400


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
@pytest.mark.parametrize("name", METHODS.names())
def test_levels_are_nested_and_of_the_asked_size(name: str, groups: GroupSet) -> None:
    weights, moment = example(groups)
    wanted = [groups.n_kept(level, 6) for level in range(1, 7)]
    thin = METHODS.get(name)().prune(groups, weights, moment, wanted)
    assert [len(t.kept) for t in thin] == wanted
    assert wanted[-1] == 0
    for larger, smaller in itertools.pairwise(thin):
        assert set(smaller.kept.tolist()) < set(larger.kept.tolist())
    for t in thin:
        assert t.kept.tolist() == sorted(set(t.kept.tolist()))
        assert t.consumer is None or t.consumer.shape == (10, len(t.kept) * groups.size)


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
@pytest.mark.parametrize("name", METHODS.names())
def test_methods_leave_their_inputs_alone_and_repeat_themselves(name: str, groups: GroupSet) -> None:
    weights, moment = example(groups)
    before = [t.clone() for t in (*weights.producers, weights.consumer, moment)]
    first, second = (METHODS.get(name)().prune(groups, weights, moment, [3, 1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (*weights.producers, weights.consumer, moment), strict=True))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.kept, b.kept)
        assert a.consumer is b.consumer is None or torch.equal(a.consumer, b.consumer)


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_equals_the_least_squares_optimum_at_every_level(groups: GroupSet) -> None:
    weights, moment = example(groups)
    hessian = damped(moment, 0.01)
    for thin in OBS().prune(groups, weights, moment, [groups.n_kept(level, 6) for level in range(1, 6)]):
        kept = groups.features(thin.kept.long())
        optimum = weights.consumer.double() @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        error = (thin.consumer.double() - optimum).norm() / optimum.norm()
        assert error < 1e-4


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_drops_the_group_of_least_squared_error_first(groups: GroupSet) -> None:
    weights, moment = example(groups, seed=1)
    hessian = damped(moment, 0.01)
    weight = weights.consumer.double()

    def error_without(group: int) -> float:
        kept = groups.features(torch.tensor([g for g in range(groups.n_groups) if g != group]))
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        difference = weight - fitted
        return float((difference @ hessian @ difference.T).trace())

    (thin,) = OBS().prune(groups, weights, moment, [groups.n_groups - 1])
    (dropped,) = set(range(groups.n_groups)) - set(thin.kept.tolist())
    assert dropped == min(range(groups.n_groups), key=error_without)


def test_obs_survives_inputs_that_are_never_active() -> None:
    groups = SETS[1]
    weights, moment = example(groups)
    moment[3] = moment[:, 3] = 0
    thin = OBS().prune(groups, weights, moment, [23, 12, 0])
    assert all(torch.isfinite(t.consumer).all() for t in thin)


def test_magnitude_drops_what_is_smallest_in_all_layers() -> None:
    groups = SETS[0]
    weights, _ = example(groups)
    span = slice(2 * groups.size, 3 * groups.size)
    for producer in weights.producers:
        producer[span] *= 1e-3
    weights.consumer[:, span] *= 1e-3
    (thin,) = METHODS.get("magnitude")().prune(groups, weights, None, [5])
    assert thin.kept.tolist() == [0, 1, 3, 4, 5]
