from __future__ import annotations

import time

import pytest
import torch
from conftest import build_bank

from diffes.adapters import ModelAdapter
from diffes.cost import interleaved_ms, macs_fraction, macs_per_call
from diffes.routing import Router
from diffes.schedule import Schedule, StagePlan


def prunable_macs(adapter: ModelAdapter) -> int:
    """By hand: linear layers of attention and FFN at every token, and the two products of attention."""
    config = adapter.denoiser.config
    tokens = (config.sample_size // config.patch_size) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    return config.num_layers * (tokens * 12 * width**2 + 2 * tokens**2 * width)


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_macs_fall_by_what_is_removed(adapter: ModelAdapter, plan: StagePlan, method: str) -> None:
    router = Router(adapter, build_bank(adapter, method, plan))
    dense, prunable = macs_per_call(adapter), prunable_macs(adapter)
    assert prunable < dense
    levels = (0, 1, adapter.max_level // 2, adapter.max_level)
    steps = (1, 2, 3, 4)
    schedule = Schedule(plan, levels, adapter.max_level)
    expected = 1 - schedule.nominal_sparsity(steps) * prunable / dense
    assert macs_fraction(router, schedule, steps) == pytest.approx(expected, abs=1e-3)
    assert macs_per_call(adapter) == dense


def test_interleaved_times_are_medians_in_milliseconds() -> None:
    fast, slow = interleaved_ms([lambda: time.sleep(0.002), lambda: time.sleep(0.02)], 3, torch.device("cpu"))
    assert 2 <= fast < slow < 200 and slow >= 20
