"""Thin rows that are the first rows of the dense weights' own memory: `resident="stream"`."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_bank
from masking import assert_dense, state
from routing import device_bytes
from test_apply import add_lora
from test_changed_models import call, thin
from torch import nn

import diffes.runtime
from diffes.adapters import ModelAdapter
from diffes.errors import DiffesError
from diffes.pruning import METHODS
from diffes.runtime.in_place import Held, InPlace, unshared
from diffes.runtime.parts import WidthPart
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

WIDTH = [name for name in METHODS.names() if METHODS.get(name).kind == "width"]
RUNTIME = str(Path(diffes.runtime.__file__).parent)


def parts_of(router: Router) -> list[WidthPart]:
    return [part for part in router._parts.values() if isinstance(part, WidthPart)]


def producers(adapter: ModelAdapter) -> list[Any]:
    return [adapter.denoiser.get_submodule(path) for groups in adapter.group_sets() for path in groups.producers]


def interrupted(run: Callable[[], object], at: int = 0) -> int:
    """Runs something with Ctrl-C before one of the bytecodes of `diffes.runtime`. Returns how many came until then."""
    n, before = 0, sys.gettrace()

    def trace(frame: Any, event: str, _arg: object) -> Any:
        nonlocal n
        if not frame.f_code.co_filename.startswith(RUNTIME):
            return None
        frame.f_trace_opcodes = True
        n += event == "opcode"
        if n == at and event == "opcode":
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        assert n == at
    finally:
        sys.settrace(before)
    return n


class Rows:
    """Layers of 3 groups of 2 rows, or of twice as many."""

    def __init__(self, layers: int) -> None:
        n = 6 * layers
        self.held = [Held(nn.Linear(5, n), "weight"), Held(nn.Linear(1, n), "bias"), Held(nn.Linear(2, n), "weight")]
        self.dense = [held.dense.clone() for held in self.held]
        self.in_place = InPlace(self.held, 3, layers)
        self.layers = layers

    def check(self, groups: list[int]) -> None:
        rows = [6 * layer + 2 * group + i for layer in range(self.layers) for group in groups for i in range(2)]
        for found, held, dense in zip(self.in_place.first(np.array(groups, int)), self.held, self.dense, strict=True):
            assert torch.equal(found, dense[rows])
            assert found.untyped_storage().data_ptr() == held.dense.untyped_storage().data_ptr()
            assert found.is_contiguous()


KEPT = [[0, 1, 2], [], [0], [1], [2], [0, 1], [0, 2], [1, 2]]


@pytest.mark.parametrize("layers", [1, 2])
def test_rows_of_some_groups_come_first_whatever_came_first_before(layers: int) -> None:
    rows = Rows(layers)
    choose = random.Random(0)
    for groups in (choose.choice(KEPT) for _ in range(200)):
        rows.check(groups)
    rows.in_place.dense()
    assert all(torch.equal(held.dense, dense) for held, dense in zip(rows.held, rows.dense, strict=True))


@pytest.mark.parametrize("then", [[0, 1, 2], [1], [2, 0]])
@pytest.mark.parametrize("layers", [1, 2])
def test_no_row_is_lost_wherever_a_move_is_interrupted(layers: int, then: list[int]) -> None:
    rows = Rows(layers)
    rows.check([0, 2])
    total = interrupted(lambda: rows.in_place.first(np.array([1, 2])))
    assert total > 100
    for at in range(1, total + 1):
        rows = Rows(layers)
        rows.check([0, 2])
        assert interrupted(partial(rows.in_place.first, np.array([1, 2])), at) == at
        if at % 3 == 0:  # once more, in what mends it
            interrupted(partial(rows.in_place.first, np.array([0])), at // 2)
        rows.check(then)
        rows.check([0, 1, 2])


@pytest.mark.parametrize("method", WIDTH)
def test_any_levels_in_any_order_predict_what_copies_predict(
    untrained: ModelAdapter, stages: Stages, method: str
) -> None:
    bank = small_bank(untrained, method, stages, [0, 1], "equal")
    before, whole = state(untrained), {n: p.data_ptr() for n, p in untrained.denoiser.named_parameters()}
    routers = {mode: Router(untrained, bank, resident=mode) for mode in ("all", "stream")}
    assert all(part.in_place is not None for part in parts_of(routers["stream"]))
    assert all(part.in_place is None for part in parts_of(routers["all"]))
    expected: dict[tuple[int, int], torch.Tensor] = {}
    for level in range(bank.max_level + 1):
        with routers["all"].routed(Schedule(stages, (level, level, 0, 0), bank.max_level)):
            expected |= {(timestep, level): call(untrained, timestep) for timestep in (100, 300)}
    choose, stream = random.Random(0), routers["stream"]
    for _ in range(12):
        levels = choose.choices(range(bank.max_level + 1), k=2)
        stream.install(Schedule(stages, (*levels, 0, 0), bank.max_level))
        for timestep, level in zip((100, 300), levels, strict=True):
            assert torch.equal(call(untrained, timestep), expected[timestep, level])
    stream.remove()
    assert_dense(untrained, before)
    assert {n: p.data_ptr() for n, p in untrained.denoiser.named_parameters()} == whole


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_the_device_holds_no_more_than_the_dense_model(untrained: ModelAdapter, stages: Stages, method: str) -> None:
    bank = small_bank(untrained, method, stages, [1], "equal")
    held: dict[str, list[int]] = {}
    for mode in ("all", "stream"):
        router = Router(untrained, bank, resident=mode)
        for level in (0, 2, 3, 1, 4, 2):
            with router.routed(thin(stages, level)):
                call(untrained)
                held.setdefault(mode, []).append(device_bytes(untrained, router))
    dense = sum(parameter.nbytes for parameter in untrained.denoiser.parameters())
    assert max(held["stream"]) == held["stream"][0] == dense
    assert max(held["stream"][1:]) < dense < max(held["all"])


def test_thin_consumers_of_a_bank_are_not_copied_where_they_lie_on_the_device(
    tiny: ModelAdapter, stages: Stages
) -> None:
    bank = small_bank(tiny, "obs", stages, [1], "equal")
    with Router(tiny, bank, resident="stream").routed(thin(stages, 2)):
        call(tiny)
        for groups in tiny.group_sets():
            made = bank[1, 2][groups.name].consumers[0]
            assert made is not None
            assert tiny.denoiser.get_submodule(groups.consumers[0]).weight.data_ptr() == made.data_ptr()


def test_a_lora_moves_with_its_layers(untrained: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(untrained, "magnitude", stages, [1], "equal")
    add_lora(untrained)
    before = state(untrained)
    found: dict[str, list[torch.Tensor]] = {}
    for mode in ("all", "stream"):
        router = Router(untrained, bank, resident=mode)
        for level in (1, 3, 0, 2, 4, 1):
            router.install(thin(stages, level))
            found.setdefault(mode, []).append(call(untrained))
        router.remove()
    assert all(torch.equal(*each) for each in zip(*found.values(), strict=True))
    assert not torch.equal(found["stream"][0], found["stream"][1])
    assert_dense(untrained, before)


@pytest.mark.slow
def test_a_call_or_a_removal_may_be_interrupted_anywhere(untrained: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(untrained, "magnitude", stages, [0, 1], "equal")
    before = state(untrained)
    router = Router(untrained, bank, resident="stream")
    schedule = Schedule(stages, (1, 2, 0, 0), bank.max_level)
    with router.routed(schedule):
        expected = call(untrained)
    router.install(schedule)
    call(untrained, 100)
    choose, totals = random.Random(0), [interrupted(lambda: call(untrained)), interrupted(router.remove)]
    for _ in range(60):
        router.install(schedule)
        call(untrained, 100)
        interrupted(lambda: call(untrained), choose.randrange(1, totals[0]))
        if choose.random() < 0.5:
            try:
                assert torch.equal(call(untrained), expected)
            except DiffesError as error:  # what was loaded was not noted any more
                assert "were changed while a run was applied" in str(error)
        interrupted(router.remove, choose.randrange(1, totals[1]))
        router.remove()
        assert_dense(untrained, before)


def test_a_deep_copy_of_a_thin_model_has_memory_of_its_own(untrained: ModelAdapter, stages: Stages) -> None:
    bank = small_bank(untrained, "magnitude", stages, [1], "equal")
    dense, before = call(untrained), state(untrained)
    n_bytes = sum(parameter.nbytes for parameter in untrained.denoiser.parameters())
    router = Router(untrained, bank, resident="stream")
    router.install(thin(stages, 2))
    expected = call(untrained)
    copied = copy.deepcopy(router)
    used = [{p.untyped_storage().data_ptr() for p in r.adapter.denoiser.parameters()} for r in (router, copied)]
    assert used[0].isdisjoint(used[1])
    router.install(thin(stages, 3))
    call(untrained)
    torch.testing.assert_close(
        call(copied.adapter), expected
    )  # memory is aligned otherwise, which is rounded otherwise
    assert device_bytes(copied.adapter, copied) < n_bytes
    router.remove()
    torch.testing.assert_close(call(copied.adapter), expected)
    copied.remove()
    for adapter in (untrained, copied.adapter):
        assert_dense(adapter, before)
        torch.testing.assert_close(call(adapter), dense)


def test_a_state_dict_stays_as_it_was_given(untrained: ModelAdapter, stages: Stages) -> None:
    before = {name: tensor.clone() for name, tensor in untrained.denoiser.state_dict().items()}
    router = Router(untrained, small_bank(untrained, "magnitude", stages, [1], "equal"), resident="stream")
    with router.routed(thin(stages, 2)):
        expected = call(untrained)
        found = untrained.denoiser.state_dict()
        assert torch.equal(call(untrained), expected)
        assert found.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
        kept = untrained.denoiser.state_dict(keep_vars=True)
        assert all(kept[name] is parameter for name, parameter in untrained.denoiser.named_parameters())
    layer = producers(untrained)[0]
    assert layer.state_dict()["weight"].data_ptr() == layer.weight.data_ptr()


def test_what_was_written_to_thin_rows_is_said_to_be_in_the_dense_ones(untrained: ModelAdapter, stages: Stages) -> None:
    router = Router(untrained, small_bank(untrained, "magnitude", stages, [1], "equal"), resident="stream")
    before = state(untrained)

    def write(layer: Any, told: str) -> None:
        router.install(thin(stages, 2))
        call(untrained)
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(DiffesError, match="were changed while a run was applied"):
            call(untrained)
        with pytest.warns(UserWarning, match=told):
            router.remove()

    part = parts_of(router)[0]
    write(part.consumers[0].layer, "is lost: write again")
    assert_dense(untrained, before)
    layer = producers(untrained)[0]
    dense = layer.weight.detach().clone()
    write(layer, "in rows of the dense ones.*load the model again")
    rows = (layer.weight != dense).any(1)
    assert rows.any() and not rows.all()


def tied(attention: Any) -> None:
    attention.to_k.weight = attention.to_q.weight


def in_one_piece(attention: Any) -> None:
    both = torch.cat([attention.to_q.weight.data, attention.to_k.weight.data])
    attention.to_q.weight.data, attention.to_k.weight.data = both.chunk(2)


def output_in_one_piece(attention: Any) -> None:
    attention.to_out[0].weight.data = torch.stack([attention.to_out[0].weight.data] * 2)[1]


def shared(attention: Any) -> None:
    attention.to_q.weight.data.share_memory_()


def transposed(attention: Any) -> None:
    attention.to_q.weight.data = attention.to_q.weight.data.T.contiguous().T


def of_inference(attention: Any) -> None:
    with torch.inference_mode():
        weight = attention.to_q.weight.data.clone()
    attention.to_q.weight.data = weight


def twice(attention: Any) -> None:
    attention.again = attention.to_q


@pytest.mark.parametrize("change", [tied, in_one_piece, output_in_one_piece, shared, transposed, of_inference, twice])
def test_memory_that_others_read_is_not_written_to(
    tiny: ModelAdapter, stages: Stages, change: Callable[[Any], None]
) -> None:
    bank = small_bank(tiny, "magnitude", stages, [1], "equal")
    attention = tiny.denoiser.transformer_blocks[0].attn1
    change(attention)
    before = state(tiny)
    routers = [Router(tiny, bank, resident=mode) for mode in ("all", "stream")]
    assert [part.in_place is not None for part in parts_of(routers[1])] == [False, True, True, True]
    found = []
    for router in routers:
        with router.routed(thin(stages, 2)):
            found.append(call(tiny))
            query = attention.to_q.weight.data_ptr()
    assert torch.equal(*found)
    assert query != attention.to_q.weight.data_ptr()
    assert_dense(tiny, before)


def test_the_weights_of_a_plain_model_are_its_own(untrained: ModelAdapter) -> None:
    alone = unshared(untrained.denoiser)
    assert {parameter.data_ptr() for parameter in untrained.denoiser.parameters()} <= alone


@pytest.mark.parametrize("level", [2, 4])
@pytest.mark.parametrize("mode", ["all", "stream"])
def test_one_router_at_a_time(tiny: ModelAdapter, stages: Stages, mode: str, level: int) -> None:
    bank = small_bank(tiny, "magnitude", stages, [1], "equal")
    first, second = Router(tiny, bank, resident="stream"), Router(tiny, bank, resident=mode)
    first.install(thin(stages, 1))
    call(tiny)
    first.install(thin(stages, level))
    expected = call(tiny)
    with pytest.raises(DiffesError, match="remove that one first"):
        second.install(thin(stages, 3))
    assert torch.equal(call(tiny), expected)
    first.remove()
    with second.routed(thin(stages, level)):
        assert torch.equal(call(tiny), expected)
