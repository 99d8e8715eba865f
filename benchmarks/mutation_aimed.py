"""Aimed mutants of `mutation_testing.py`: faults that a random operator would not make, each with the tests it is for.

A line of the table is `Aimed(file, old, new, tests)`:

- `file`: the module, relative to the repository.
- `old`: text of the module, with its line breaks and indentation where it spans lines. It must be there exactly once;
  anything else stops the script before the first mutant, so that the table follows the code.
- `new`: what takes its place.
- `tests`: files, folders or test ids (`tests/spaces/test_loop.py::test_name`) that are run, in this order. None at all
  stands for the tests that belong to the module, as for a sampled mutant.
"""

from __future__ import annotations

from typing import NamedTuple


class Aimed(NamedTuple):
    """One fault; see the top of the file."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


AIMED = (
    # levels are shared out as if every layer saved the same
    Aimed(
        "diffes/pruning/allocation.py",
        "np.floor(rungs.saved / unit + 1e-6)",
        "np.floor(rungs.saved / rungs.macs / unit + 1e-6)",
        ("tests/pruning/test_allocation.py",),
    ),
    # a split may save less than the level asks for
    Aimed(
        "diffes/pruning/allocation.py",
        "enough = int(np.ceil(wanted / unit - 1e-6))",
        "enough = int(np.floor(wanted / unit * 0.95))",
        ("tests/pruning/test_allocation.py",),
    ),
    # the two branches of guidance are added up, not mixed
    Aimed(
        "diffes/pruning/sensitivity.py",
        "guided.scale * conditional + (1 - guided.scale) * null",
        "guided.scale * conditional + null",
        ("tests/pruning/test_sensitivity.py",),
    ),
    # a timestep on the edge of two stages goes to the lower one
    Aimed(
        "diffes/spaces/schedule.py",
        "bisect.bisect_right(uppers, timestep)",
        "bisect.bisect_left(uppers, timestep)",
        ("tests/spaces/test_schedule.py",),
    ),
    # the weights are scored and no longer compensated
    Aimed(
        "diffes/pruning/factors.py",
        "_columns(left, block, start, stop), block[:, stop - start :], alpha=-1",
        "_columns(left, block, start, stop), block[:, stop - start :], alpha=0",
        ("tests/pruning",),
    ),
    # a level that is ready is handed out for every other one
    Aimed(
        "diffes/pruning/factors.py",
        "key = (factor, n_kept)",
        "key = (factor, 0)",
        ("tests/pruning/test_factors.py",),
    ),
    # of groups of equal importance not the first ones stay
    Aimed(
        "diffes/pruning/base.py",
        "importance.argsort(descending=True, stable=True)",
        "importance.flip(0).argsort(descending=True, stable=True).sub(len(importance) - 1).neg()",
        ("tests/pruning/test_methods.py",),
    ),
    # statistics that overflowed are taken as they are
    Aimed(
        "diffes/pruning/build.py",
        "    if run is not None and not all(bool(torch.isfinite(each).all()) for each in values):",
        "    if False:",
        ("tests/pruning/test_bank.py",),
    ),
    # a quarter of the calibration rows is without condition, not half
    Aimed(
        "diffes/pruning/calibration.py",
        "torch.rand(len(latents), generator=generator) < 0.5",
        "torch.rand(len(latents), generator=generator) < 0.25",
        ("tests/pruning/test_calibration.py",),
    ),
    # the report is on the probes of searches
    Aimed(
        "diffes/problems/heldout.py",
        'HELDOUT_SEED, "heldout")',
        'HELDOUT_SEED, "search")',
        ("tests/problems/test_heldout.py",),
    ),
    # the report is on the noise of the search
    Aimed(
        "diffes/problems/heldout.py",
        'bench.config.heldout, HELDOUT_SEED, "heldout"',
        'bench.config.heldout, bench.config.seed, "heldout"',
        ("tests/problems/test_heldout.py",),
    ),
    # the pictures are of the prompts of searches
    Aimed(
        "diffes/study/run.py",
        'bench.evaluator(IMAGES, HELDOUT_SEED, "heldout")',
        "bench.evaluator(IMAGES, HELDOUT_SEED)",
        ("tests/study/test_run.py",),
    ),
    # the velocity has the wrong sign
    Aimed(
        "diffes/adapters/base.py",
        "return alphas * noise - sigmas * latents",
        "return alphas * noise + sigmas * latents",
        ("tests/adapters/test_adapters.py",),
    ),
    # noise and image change places in the target
    Aimed(
        "diffes/adapters/base.py",
        '{"epsilon": noise, "sample": latents,',
        '{"epsilon": latents, "sample": noise,',
        ("tests/adapters/test_adapters.py",),
    ),
    # a run that goes on in the middle answers one step less than is done
    Aimed(
        "diffes/adapters/drive.py",
        "strength if prepared else None, to_answer=index,",
        "strength if prepared else None, to_answer=max(index - 1, 0),",
        ("tests/adapters/test_families.py",),
    ),
    # the text's output projection of joint attention keeps the columns of heads that are gone
    Aimed(
        "diffes/adapters/groups.py",
        'getattr(attention, "to_add_out", None) is not None',
        'getattr(attention, "to_add_out", None) is None',
        ("tests/adapters/test_families.py",),
    ),
    # a network of flow matching is told the timestep before
    Aimed(
        "diffes/solvers/process.py",
        "return timesteps + 1.0 if self.flows else timesteps",
        "return timesteps + 0.0 if self.flows else timesteps",
        ("tests/adapters/test_families.py", "tests/solvers/test_process.py"),
    ),
    # a pipeline's class is known by its own name alone
    Aimed(
        "diffes/adapters/loading.py",
        "for cls in type(pipe).__mro__:",
        "for cls in type(pipe).__mro__[:1]:",
        ("tests/adapters/test_loading.py",),
    ),
    # the router does not ask the adapter what stands in for a block
    Aimed(
        "diffes/runtime/parts.py",
        "forward if i in kept else self._adapter.skipped(block)",
        "forward if i in kept else lambda hidden_states, *_args, **_kwargs: hidden_states",
        ("tests/runtime/test_router.py",),
    ),
    # the tables of the sampler are not counted in a cached state
    Aimed(
        "diffes/measure/evaluator.py",
        "self._fixed_bytes + math.ceil(",
        "math.ceil(",
        ("tests/measure/test_evaluator.py",),
    ),
    # the memory of a multi-step sampler is not counted in a cached state
    Aimed(
        "diffes/measure/evaluator.py",
        "per_row = (size_of(replace(state, drive=None)) - self._fixed_bytes) / len(part)",
        "per_row = call.latents.nbytes / len(part)",
        ("tests/measure/test_evaluator.py",),
    ),
    # a profile of one end of the stage
    Aimed(
        "diffes/measure/profile.py",
        "torch.linspace(lo, hi - 1, len(data))",
        "torch.linspace(lo, lo, len(data))",
        ("tests/measure/test_profile.py",),
    ),
    # damage counted as gain
    Aimed(
        "diffes/measure/profile.py",
        "dense - fitness[single[s, k]]",
        "fitness[single[s, k]] - dense",
        ("tests/measure/test_profile.py",),
    ),
    # a factory of evaluators is left aside
    Aimed(
        "diffes/problems/workbench.py",
        "        if self.make_evaluator is not None:",
        "        if False:",
        ("tests/problems/test_workbench.py",),
    ),
    # DEAP's generations are not measured together
    Aimed(
        "diffes/problems/toolbox.py",
        'return self.batch(*many) if getattr(function, "func", None) is self else list(map(function, *many))',
        "return list(map(function, *many))",
        ("tests/problems/test_toolbox.py",),
    ),
    # the toolbox takes schedules of any cost
    Aimed(
        "diffes/problems/toolbox.py",
        "Proposal(space.schedule(_whole(g)),",
        "Proposal(space.any_schedule(_whole(g)),",
        ("tests/problems/test_toolbox.py",),
    ),
    # a parent is crossed with itself
    Aimed(
        "diffes/spaces/variation.py",
        "others = [genome for genome in parents if genome is not parent]",
        "others = list(parents)",
        ("tests/spaces/test_variation.py",),
    ),
    # a limit in calls may end within a batch that is measured in the evaluator's order
    Aimed(
        "diffes/spaces/loop.py",
        "                return 1\n        return len(proposals)",
        "                return len(proposals)\n        return len(proposals)",
        ("tests/spaces/test_loop.py",),
    ),
    # parents are drawn, not the winners of a tournament
    Aimed(
        "search_strategies/nsga2.py",
        "tools.selTournamentDCD(parents, len(parents) // 4 * 4)",
        "tools.selRandom(parents, len(parents) // 4 * 4)",
        ("tests/search_strategies/test_nsga2.py",),
    ),
    # cost is something to be large
    Aimed(
        "search_strategies/nsga2.py",
        "weights = (1.0, -1.0)",
        "weights = (1.0, 1.0)",
        ("tests/search_strategies/test_nsga2.py",),
    ),
    # fitness is something to be small
    Aimed(
        "search_strategies/nsga2.py",
        "weights = (1.0, -1.0)",
        "weights = (-1.0, -1.0)",
        ("tests/search_strategies/test_nsga2.py",),
    ),
    # the batch shuns what it knows little of
    Aimed(
        "search_strategies/surrogate.py",
        "self._thrifty(unseen, mean + curiosity * deviation)",
        "self._thrifty(unseen, mean - curiosity * deviation)",
        ("tests/search_strategies/test_surrogate.py",),
    ),
    # the batch is chosen against what is believed
    Aimed(
        "search_strategies/surrogate.py",
        "self._thrifty(unseen, mean + curiosity * deviation)",
        "self._thrifty(unseen, -mean + curiosity * deviation)",
        ("tests/search_strategies/test_surrogate.py",),
    ),
    # the batch prefers what costs more calls
    Aimed(
        "search_strategies/surrogate.py",
        "left = [worth[i] - THRIFT",
        "left = [worth[i] + THRIFT",
        ("tests/search_strategies/test_surrogate.py",),
    ),
    # the climb shuns what it knows little of
    Aimed(
        "search_strategies/surrogate.py",
        "height.update(zip(new, mean + curiosity * deviation, strict=True))",
        "height.update(zip(new, mean - curiosity * deviation, strict=True))",
        ("tests/search_strategies/test_surrogate.py",),
    ),
    # the climb goes down
    Aimed(
        "search_strategies/surrogate.py",
        "height.update(zip(new, mean + curiosity * deviation, strict=True))",
        "height.update(zip(new, -mean + curiosity * deviation, strict=True))",
        ("tests/search_strategies/test_surrogate.py",),
    ),
    # the most important segment is pruned twice as much
    Aimed(
        "search_strategies/mosaic.py",
        "LEAST = 0.25",
        "LEAST = 0.5",
        ("tests/search_strategies/test_mosaic.py",),
    ),
    # the loss does not count
    Aimed(
        "search_strategies/mosaic.py",
        "slope = np.abs(np.gradient(loss)) if len(loss) > 1 else np.zeros(1)",
        "slope = np.zeros(len(loss))",
        ("tests/search_strategies/test_mosaic.py",),
    ),
    # clean stages count less instead of more
    Aimed(
        "search_strategies/mosaic.py",
        "_unit(slope) + self.weight * _unit(log_snr)",
        "_unit(slope) - self.weight * _unit(log_snr)",
        ("tests/search_strategies/test_mosaic.py",),
    ),
    # the middle segment is one like the others
    Aimed(
        "search_strategies/mosaic.py",
        "    means[1] = means.max()\n",
        "",
        ("tests/search_strategies/test_mosaic.py",),
    ),
    # an offspring as good as its parent does not take its place
    Aimed(
        "search_strategies/evopress.py",
        "ranked[0].fitness >= self._parent.fitness",
        "ranked[0].fitness > self._parent.fitness",
        ("tests/search_strategies/test_evopress.py",),
    ),
    # the worst offspring go on
    Aimed(
        "search_strategies/evopress.py",
        "key=lambda pair: pair[0].fitness, reverse=True)",
        "key=lambda pair: pair[0].fitness)",
        ("tests/search_strategies/test_evopress.py",),
    ),
)
