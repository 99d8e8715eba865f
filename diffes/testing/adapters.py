"""Conformance suite for adapters of model families."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffes.adapters import BlockSet, GroupSet, ModelAdapter
from diffes.adapters.convolutions import as_weight
from diffes.adapters.macs import macs_by_module, macs_per_group
from diffes.measure.currencies import macs_at
from diffes.pruning import make_method
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import CalibrationSet, StagePass, input_moments
from diffes.runtime.router import Router
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.schedule import Schedule, Stages

STAGES = Stages.equal(4)
STAGE = 1  # the one in which layers are pruned
TOLERANCE = 1e-4  # of outputs of pruned and of masked layers


class AdapterConformance:
    """Checks of an adapter: runs equal the pipeline's own call, and what is removed is removed exactly.

    Subclass it in a test file and write `make`. Take a pipeline with small random weights, built in code, in fp32.

    Attributes:
        guidance: guidance scale at which the branches of calls are checked, too.

    Example:
        >>> from diffes.adapters import adapter_for, load_pipeline
        >>> class TestMine(AdapterConformance):
        ...     def make(self):
        ...         return adapter_for(load_pipeline("fashion-dit"))
        >>> TestMine().test_a_run_goes_on_in_the_middle()
    """

    guidance = 3.0

    def make(self) -> ModelAdapter:
        """Return a fresh adapter of a fresh pipeline."""
        raise NotImplementedError

    def test_runs_equal_the_pipelines_own_call(self) -> None:
        adapter = self.make()
        probes = adapter.make_probes(2, 3, "heldout")
        options = {"num_inference_steps": 4, "output_type": "np"}
        for guidance in (adapter.unguided, self.guidance):
            for part in [probes] if adapter.batched else [probes[:1], probes[1:]]:
                call = adapter.call_of(part, guidance) | {k: v for k, v in options.items() if k in adapter.takes}
                (ours,), own = adapter.render(adapter.sample(part, 4, guidance)), adapter.pipe(**call)
                assert np.array_equal(ours[0], own[0])

    def test_a_run_goes_on_in_the_middle(self) -> None:
        """A new call of the pipeline begins with the latents of another one, at its scheduler's state."""
        adapter = self.make()
        probes = adapter.make_probes(2, 3)
        whole = PlanScheduler.of(adapter.own_scheduler, [900, 600, 300, 100], "dpmsolver++", adapter.device)
        expected = adapter.sample(probes, whole, self.guidance)
        with torch.no_grad():
            at = adapter.start(probes, whole, self.guidance)
            for i in range(4):
                at = adapter.step(replace(at, drive=None) if i == 2 else at, probes, self.guidance)
        assert torch.equal(adapter.finish(at), expected)

    def test_denoiser_calls_are_counted_in_rows(self) -> None:
        adapter = self.make()
        for guidance in (adapter.unguided, self.guidance):
            probes, rows = adapter.make_probes(2, 3), list[int]()
            seen = adapter.denoiser.register_forward_pre_hook(
                lambda _module, args, kwargs, rows=rows: rows.append(len(args[0] if args else kwargs["hidden_states"])),
                with_kwargs=True,
            )
            with torch.no_grad():
                adapter.step(adapter.start(probes, 2, guidance), probes, guidance)
            seen.remove()
            assert sum(rows) == 2 * adapter.rows_per_image(guidance)

    def test_a_bare_call_is_told_what_the_pipeline_tells(self) -> None:
        """Calibration calls the denoiser itself; timestep and conditions have to be those of a run."""
        adapter = self.make()
        probes = adapter.make_probes(2, 3)
        steps = PlanScheduler.of(adapter.own_scheduler, [500], "ddim", adapter.device)
        with torch.no_grad():
            call = adapter.called(adapter.start(probes, steps, adapter.unguided), probes, adapter.unguided)
            found = adapter.denoise_once(call.latents, torch.tensor([500, 500]), probes.conditions)
        torch.testing.assert_close(found[:, : call.output.shape[1]], call.output, rtol=TOLERANCE, atol=TOLERANCE)

    def test_level_0_is_the_dense_model(self) -> None:
        adapter = self.make()
        probes = adapter.make_probes(2, 3)
        steps = PlanScheduler.of(adapter.own_scheduler, [900, 600, 400, 100], "ddim", adapter.device)
        dense = adapter.sample(probes, steps, self.guidance)
        bank = self.bank(adapter, "magnitude")
        router = Router(adapter, bank)
        with router.routed(Schedule(STAGES, (0,) * 4, bank.max_level)):
            assert torch.equal(adapter.sample(probes, steps, self.guidance), dense)
        with router.routed(Schedule(STAGES, (0, 1, 0, 0), bank.max_level)):
            assert not torch.equal(adapter.sample(probes, steps, self.guidance), dense)
        assert torch.equal(adapter.sample(probes, steps, self.guidance), dense)

    def test_what_is_removed_is_removed_exactly(self) -> None:
        """Pruned layers against full ones with zero columns, skipped blocks against blocks whose output is not used."""
        adapter = self.make()
        timesteps = torch.tensor([300, 300])
        for method in ("obs", "layer_drop"):
            bank, (latents, conditions) = self.bank(adapter, method), self.inputs(adapter, 2)
            router = Router(adapter, bank)
            for level in range(1, bank.max_level + 1):
                levels = tuple(level if stage == STAGE else 0 for stage in range(len(STAGES)))
                with torch.no_grad(), router.routed(Schedule(STAGES, levels, bank.max_level)):
                    pruned = adapter.denoise_once(latents, timesteps, conditions)
                with torch.no_grad(), ExitStack() as stack:
                    masked(adapter, bank, level, stack)
                    expected = adapter.denoise_once(latents, timesteps, conditions)
                torch.testing.assert_close(pruned, expected, rtol=TOLERANCE, atol=TOLERANCE)

    def test_multiply_accumulates_of_a_pruned_call_are_counted_exactly(self) -> None:
        """Compare the count of the dense model minus that of the missing groups with a call that is counted."""
        adapter = self.make()
        bank = self.bank(adapter, "magnitude")
        router, sets = Router(adapter, bank), adapter.group_sets()
        by_module = macs_by_module(adapter)
        by_group = macs_per_group(adapter, by_module)
        level = bank.max_level // 2
        off = sum(
            by_group[groups.name] * (groups.n_groups - kept)
            for groups, kept in zip(sets, bank.kept((STAGE, level), sets), strict=True)
        )
        assert abs(by_module[""] - off - macs_at(router, STAGES, STAGE, level)) < 1e-6 * by_module[""]

    def test_every_consumer_is_calibrated(self) -> None:
        adapter = self.make()
        latents, conditions = self.inputs(adapter, 4)
        data = CalibrationSet(latents, conditions, "noise")
        run = StagePass(adapter, STAGES.ranges[STAGE], data, guided=adapter.merges, seed=0)
        found = input_moments(run, adapter.group_sets(), full=False)
        for groups in adapter.group_sets():
            assert len(found[groups.name]) == len(groups.consumers)
            assert all(bool((each > 0).any()) for each in found[groups.name])

    def inputs(self, adapter: ModelAdapter, n: int) -> tuple[Tensor, tuple[Any, ...]]:
        """Return latents (n, ...) and n conditions."""
        probes = adapter.make_probes(n, 0)
        return adapter.noise(probes), probes.conditions

    def bank(self, adapter: ModelAdapter, method: str) -> WeightBank:
        """Return a bank of one stage, calibrated on noise."""
        data = CalibrationSet(*self.inputs(adapter, 8), "noise")
        return build_bank(
            adapter, make_method(method), STAGES, data, guidance=self.guidance, seed=0, only=[STAGE],
            allocation="equal",
        )  # fmt: skip


def masked(adapter: ModelAdapter, bank: WeightBank, level: int, stack: ExitStack, stage: int = STAGE) -> None:
    """Make what a level of a stage drops ineffective in the dense model, at full width and depth, until the stack
    closes."""
    for prunable in adapter.prunable(bank.kind):
        left = bank[stage, level].get(prunable.name)
        if left is None:  # dense at this level
            continue
        if isinstance(prunable, GroupSet):
            columns = prunable.features(left.kept.long()) + (prunable.first or 0)
            for i, path in enumerate(prunable.consumers):
                layer = adapter.denoiser.get_submodule(path)
                dense, full = layer.weight.data, layer.weight.data.clone()
                prunable.own(full, 1).zero_()
                kept = as_weight(left.consumers[i], dense) if left.consumers else dense[:, columns]
                full[:, columns] = kept
                layer.weight.data = full
                stack.callback(setattr, layer.weight, "data", dense)
        elif isinstance(prunable, BlockSet):
            for i, path in enumerate(prunable.blocks):
                if i not in left.kept:
                    block = adapter.denoiser.get_submodule(path)
                    stack.callback(block.register_forward_hook(_handed_on, with_kwargs=True).remove)


def _handed_on(_block: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return what goes into a block, in the form of what comes out: joint blocks return states of the text, too, which
    are of another shape."""
    given = [*args, *kwargs.values()]
    states = [each for each in given if isinstance(each, Tensor) and each.dim() == 3]
    if not isinstance(output, tuple):
        return next(each for each in states if each.shape == output.shape)
    return tuple(None if made is None else next(each for each in states if each.shape == made.shape) for made in output)
