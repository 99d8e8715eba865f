"""Conformance of every registered pruning method, and the least-squares oracle of OBS."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from diffes.adapters import GroupSet
from diffes.errors import DiffesError
from diffes.pruning import METHODS, BlockChanges, DepthMethod, GroupWeights, LayerWeights, WidthMethod, obs
from diffes.pruning.base import nested
from diffes.pruning.magnitude import Magnitude
from diffes.pruning.obs import OBS, damped

WIDTH = [name for name in METHODS.names() if issubclass(METHODS.get(name), WidthMethod)]
DEPTH = [name for name in METHODS.names() if issubclass(METHODS.get(name), DepthMethod)]
SETS = [
    GroupSet("attention", 6, 4, ("q", "k", "v"), ("out",), attention="attention"),
    GroupSet("ffn", 24, 1, ("in",), ("out",)),
    GroupSet("gated", 24, 1, ("gate",), ("out",)),
]


def example(groups: GroupSet, seed: int = 0) -> tuple[LayerWeights, torch.Tensor]:
    """Random weights and a badly conditioned second moment: inputs that are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    d = groups.n_groups * groups.size
    rows = 2 * d if groups.name == "gated" else d
    producers = tuple(torch.randn(rows, 10, generator=generator) for _ in groups.producers)
    x = torch.randn(400, d // 2, generator=generator) @ torch.randn(d // 2, d, generator=generator)
    x += 0.1 * torch.randn(400, d, generator=generator)
    return LayerWeights(producers, (torch.randn(10, d, generator=generator),)), x.T @ x / 400


def consumer_of(thin: GroupWeights) -> torch.Tensor:
    """The compensated weight of one level."""
    (consumer,) = thin.consumers
    return consumer


def statistics(method: WidthMethod, moment: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return {"second_moment": (moment,), "squares": (moment.diagonal(),), "nothing": ()}[method.needs]


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
@pytest.mark.parametrize("name", WIDTH)
def test_levels_are_nested_and_of_the_asked_size(name: str, groups: GroupSet) -> None:
    weights, moment = example(groups)
    wanted = [groups.n_kept(level, 6) for level in range(1, 7)]
    method = METHODS.make(name)
    thin = method.prune(groups, weights, statistics(method, moment), wanted)
    assert [len(t.kept) for t in thin] == wanted
    assert wanted[-1] == 0
    for larger, smaller in itertools.pairwise(thin):
        assert set(smaller.kept.tolist()) < set(larger.kept.tolist())
    for t in thin:
        assert t.kept.tolist() == sorted(set(t.kept.tolist()))
        assert all(consumer.shape == (10, len(t.kept) * groups.size) for consumer in t.consumers)


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
@pytest.mark.parametrize("name", WIDTH)
def test_methods_leave_their_inputs_alone_and_repeat_themselves(name: str, groups: GroupSet) -> None:
    weights, moment = example(groups)
    before = [t.clone() for t in (*weights.producers, *weights.consumers, moment)]
    method = METHODS.make(name)
    given = statistics(method, moment)
    first, second = (method.prune(groups, weights, given, [3, 1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (*weights.producers, *weights.consumers, moment), strict=True))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.kept, b.kept)
        assert all(torch.equal(x, y) for x, y in zip(a.consumers, b.consumers, strict=True))


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_equals_the_least_squares_optimum_at_every_level(groups: GroupSet) -> None:
    weights, moment = example(groups)
    hessian = damped(moment, 0.01)
    for thin in OBS().prune(groups, weights, (moment,), [groups.n_kept(level, 6) for level in range(1, 6)]):
        kept = groups.features(thin.kept.long())
        optimum = weights.consumers[0].double() @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        error = (consumer_of(thin).double() - optimum).norm() / optimum.norm()
        assert error < 1e-4


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_drops_the_group_of_least_squared_error_first(groups: GroupSet) -> None:
    weights, moment = example(groups, seed=1)
    hessian = damped(moment, 0.01)

    def error_without(group: int) -> float:
        kept = [g for g in range(groups.n_groups) if g != group]
        return without(groups, weights.consumers[0], hessian, kept)

    (thin,) = OBS().prune(groups, weights, (moment,), [groups.n_groups - 1])
    (dropped,) = set(range(groups.n_groups)) - set(thin.kept.tolist())
    assert dropped == min(range(groups.n_groups), key=error_without)


@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_hands_out_levels_of_an_fp64_model_that_stay_as_they_are(groups: GroupSet) -> None:
    """In fp64 no cast makes a copy, and what is left goes on being overwritten."""
    single, moment = example(groups)
    weights = LayerWeights(tuple(p.double() for p in single.producers), (single.consumers[0].double(),))
    hessian = damped(moment, 0.01)
    levels = OBS().prune(groups, weights, (moment,), [groups.n_kept(level, 6) for level in range(6)])
    assert len({consumer_of(thin).data_ptr() for thin in levels}) == 6
    for thin in levels:
        kept = groups.features(thin.kept.long())
        optimum = weights.consumers[0] @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        assert consumer_of(thin).dtype == torch.float64
        torch.testing.assert_close(consumer_of(thin), optimum, rtol=1e-6, atol=1e-8)


def greedily(groups: GroupSet, weight: torch.Tensor, hessian: torch.Tensor, n_kept: list[int]) -> list[GroupWeights]:
    """The definition: every loss anew from `W` and `H^-1`, the cheapest group out of both, and so on."""
    inverse, weight, kept, levels = torch.linalg.inv(hessian), weight.double(), list(range(groups.n_groups)), []
    for n in n_kept:
        while len(kept) > n:
            spans = torch.arange(len(kept) * groups.size).view(-1, groups.size)
            losses = [(weight[:, s] @ torch.linalg.inv(inverse[s][:, s]) @ weight[:, s].T).trace() for s in spans]
            cheapest = int(torch.stack(losses).argmin())
            gone = spans[cheapest]
            rest = [i for i in range(spans.numel()) if i not in gone.tolist()]
            factor = torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
            weight = (weight - weight[:, gone] @ factor)[:, rest]
            inverse = (inverse - inverse[:, gone] @ factor)[rest][:, rest]
            del kept[cheapest]
        levels.append(GroupWeights(torch.tensor(kept, dtype=torch.int32), (weight,)))
    return levels


@pytest.mark.parametrize("block", [1, 5, 7, 128])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_in_blocks_is_greedy_elimination(
    groups: GroupSet, seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks larger than what a level drops, and ones that do not divide it; levels that drop nothing, and all."""
    monkeypatch.setattr(obs, "BLOCK", block)
    single, moment = example(groups, seed)
    double = LayerWeights(single.producers, (single.consumers[0].double(),))
    n_kept = [groups.n_groups, *(round(groups.n_groups * part) for part in (0.95, 0.5, 0.5, 0.17, 0))]
    wanted = greedily(groups, single.consumers[0], damped(moment, 0.01), n_kept)
    for weights, tolerance in ((double, 1e-10), (single, 1e-6)):
        thin = OBS().prune(groups, weights, (moment,), n_kept)
        assert [t.kept.tolist() for t in thin] == [t.kept.tolist() for t in wanted]
        for found, expected in zip(map(consumer_of, thin), map(consumer_of, wanted), strict=True):
            assert found.dtype == weights.consumers[0].dtype and found.is_contiguous()
            assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("groups", SETS, ids=lambda groups: groups.name)
def test_obs_drops_what_costs_least_over_all_consumers(
    groups: GroupSet, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of two consumers are added up, by the definition; each consumer is compensated on its own."""
    monkeypatch.setattr(obs, "BLOCK", block)
    (first, one), (second, two) = example(groups, 0), example(groups, 1)
    weights = LayerWeights(first.producers, (*first.consumers, *second.consumers))
    alone = OBS().factor(groups, first, (one,)).order.tolist()
    groups = replace(groups, consumers=("out", "other"))
    kept, order = list(range(groups.n_groups)), []
    while kept:
        losses = [
            sum(without(groups, weight, damped(moment, 0.01), [g for g in kept if g != gone])
                for weight, moment in zip(weights.consumers, (one, two), strict=True))
            for gone in kept
        ]  # fmt: skip
        order.append(kept.pop(losses.index(min(losses))))
    factor = OBS().factor(groups, weights, (one, two))
    assert factor.order.tolist()[:-1] == order[:-1] != alone[:-1]
    for n in (1, groups.n_groups // 2, groups.n_groups):
        features = groups.features(factor.kept(n).long())
        for found, weight, moment in zip(
            factor.consumers(weights.consumers, n), weights.consumers, (one, two), strict=True
        ):
            hessian = damped(moment, 0.01)
            optimum = weight.double() @ hessian[:, features] @ torch.linalg.inv(hessian[features][:, features])
            assert (found - optimum).norm() <= 1e-5 * optimum.norm()


def without(groups: GroupSet, weight: torch.Tensor, hessian: torch.Tensor, kept: list[int]) -> float:
    """The squared error of the least-squares optimum on the groups kept."""
    features, weight = groups.features(torch.tensor(kept, dtype=torch.long)), weight.double()
    fitted = torch.zeros_like(weight)
    fitted[:, features] = weight @ hessian[:, features] @ torch.linalg.inv(hessian[features][:, features])
    return float(((weight - fitted) @ hessian @ (weight - fitted).T).trace())


def test_obs_looks_further_than_the_inputs_that_seemed_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs 0 and 1 nearly cancel each other: with 0 gone, 1 is cheapest, which was most expensive before."""
    monkeypatch.setattr(obs, "BLOCK", 2)
    groups = GroupSet("ffn", 12, 1, ("in",), ("out",))
    moment = torch.eye(12)
    moment[0, 1] = moment[1, 0] = 0.9
    consumer = torch.cat([torch.tensor([5, -6.5]), torch.linspace(2.3, 2.7, 10)])[None]
    wanted = greedily(groups, consumer, damped(moment, 0.01), [10, 5])
    thin = OBS().prune(groups, LayerWeights((torch.ones(12, 1),), (consumer,)), (moment,), [10, 5])
    assert [t.kept.tolist() for t in thin] == [t.kept.tolist() for t in wanted] == [[*range(2, 12)], [*range(7, 12)]]


def test_obs_survives_inputs_that_are_the_same() -> None:
    groups = SETS[1]
    weights, moment = example(groups)
    twin = torch.arange(24) // 2
    moment = moment[twin][:, twin]
    hessian = damped(moment, 0.01)
    for thin in OBS().prune(groups, weights, (moment,), [17, 12, 5]):
        kept = thin.kept.long()
        optimum = weights.consumers[0].double() @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        assert (consumer_of(thin).double() - optimum).norm() < 1e-6 * optimum.norm()


def test_obs_refuses_a_moment_that_cannot_be_one() -> None:
    weights, moment = example(SETS[1])
    with pytest.raises(DiffesError, match=r"second moment of ffn is not positive definite with damping 0.01"):
        OBS().prune(SETS[1], weights, (-moment,), [12])


def test_obs_survives_inputs_that_are_never_active() -> None:
    groups = SETS[1]
    weights, moment = example(groups)
    moment[3] = moment[:, 3] = 0
    thin = OBS().prune(groups, weights, (moment,), [23, 12, 0])
    assert all(torch.isfinite(consumer_of(t)).all() for t in thin)


def test_of_equal_groups_the_first_ones_stay() -> None:
    importance = torch.tensor([1.0, 2, 1, 2, 1])
    assert [thin.kept.tolist() for thin in nested(importance, [4, 3, 1, 0])] == [[0, 1, 2, 3], [0, 1, 3], [1], []]


def test_magnitude_drops_what_is_smallest_in_all_layers() -> None:
    groups = SETS[0]
    weights, _ = example(groups)
    span = slice(2 * groups.size, 3 * groups.size)
    for producer in weights.producers:
        producer[span] *= 1e-3
    weights.consumers[0][:, span] *= 1e-3
    (thin,) = Magnitude().prune(groups, weights, (), [5])
    assert thin.kept.tolist() == [0, 1, 3, 4, 5]


def test_activation_drops_what_is_quietest_whatever_its_weights() -> None:
    groups = SETS[0]
    weights, moment = example(groups)
    squares = moment.diagonal().clone()
    squares[8:12] = 1e-6
    weights.consumers[0][:, 8:12] *= 1e9
    (thin,) = METHODS.make("activation").prune(groups, weights, (squares,), [5])
    assert thin.kept.tolist() == [0, 1, 3, 4, 5]


def test_wanda_weighs_activations_with_weights() -> None:
    """By hand: scores |W| summed over outputs times the norm are 2 * 3, 1 * 5 and 4 * 1."""
    groups = GroupSet("ffn", 3, 1, ("in",), ("out",))
    weights = LayerWeights((torch.ones(3, 1),), (torch.tensor([[1.0, -1, 2], [-1, 0, 2]]),))
    order = METHODS.make("wanda").prune(groups, weights, [torch.tensor([9.0, 25, 1])], [2, 1])
    assert [thin.kept.tolist() for thin in order] == [[0, 1], [0]]


@pytest.mark.parametrize(("spec", "expected"), [("layer_drop", [0.5, 0.1]), ("layer_drop:importance=mse", [2.0, 3.0])])
def test_layer_drop_ranks_by_what_it_is_told_to(spec: str, expected: list[float]) -> None:
    changes = BlockChanges(torch.tensor([0.5, 0.1]), torch.tensor([2.0, 3.0]))
    assert METHODS.make(spec).importance(changes).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", METHODS.names())
def test_timestep_weights_are_positive_and_never_rise(name: str) -> None:
    weights = METHODS.make(name).timestep_weights(torch.linspace(0, 1, 11))
    assert weights.shape == (11,) and weights.min() > 0
    assert (weights.diff() <= 0).all()


def test_log_weighting_of_obs_falls_from_one_to_a_half() -> None:
    method = METHODS.make("obs:weighting=log")
    assert method.timestep_weights(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1, 0.5])
    assert METHODS.make("obs:damping=0.1").damping == 0.1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("obs:weighting=linear", "weighting of obs must be uniform or log, got 'linear'"),
        ("obs:damping=0", r"damping of obs must be in \(0, 1\], got 0"),
        ("obs:dampin=0.1", "Its options: damping, weighting"),
        ("obs:damping", "is not an option"),
        ("layer_drop:importance=l1", "must be cosine or mse, got 'l1'"),
        ("magnitude:x=1", "Its options: none"),
        ("obss", "Did you mean 'obs'"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(DiffesError, match=message):
        METHODS.make(spec)
