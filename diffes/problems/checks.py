"""Checks of the settings before the long part: names, options, and whether a metric can score the model's images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffes.adapters import ModelAdapter
from diffes.config import RunConfig
from diffes.errors import DiffesError, PluginError
from diffes.measure.currencies import CURRENCIES
from diffes.measure.metrics import METRICS, Metric, check_metric
from diffes.plugins import guarded, is_ours, unexpected
from diffes.problems.base import PROBLEMS
from diffes.pruning import METHODS, parts_of
from diffes.registry import Registry
from diffes.solvers import SOLVERS
from diffes.spaces.genome import Genome
from diffes.spaces.operators import CROSSOVERS, MUTATIONS, BoundOperator, OperatorRegistry
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import STRATEGIES, StageProfile

OPERATORS: dict[str, OperatorRegistry] = {"mutation": MUTATIONS, "crossover": CROSSOVERS}
EXAMPLES: dict[str, Any] = {"profile": StageProfile((1.0,) * 4, (0.0,) * 4)}  # facts about a model of four stages


def check_settings(config: RunConfig, space: SearchSpace | None = None) -> None:
    """Check the strategy, its operators, the metric and the cost of a search.

    Args:
        config: the settings.
        space: a small space of the kind that is searched; the example of its problem when left out.

    Raises:
        DiffesError: there is no such strategy, operator, metric or cost, it takes no such options, the strategy needs a
            fact that no run provides, or the settings do not go together.
    """
    config = config.resolved()
    problem, _ = PROBLEMS.parse(config.genes)
    problem.check(config)
    check_metric(config.metric)
    space = problem.example if space is None else space
    if CURRENCIES.get(config.cost).timed and config.study is not None:
        raise DiffesError(
            f"a study is searched under one budget, and {config.cost} differs by process: set cost to macs or level"
        )
    strategy, _ = STRATEGIES.parse(config.strategy)
    if missing := sorted(set(strategy.needs) - set(EXAMPLES)):
        raise DiffesError(
            f"strategy {config.strategy!r} needs {', '.join(missing)}, which no run provides; known: "
            f"{', '.join(EXAMPLES)}"
        )
    facts = {name: EXAMPLES[name] for name in strategy.needs}
    given = operators_of(config)
    STRATEGIES.make(config.strategy, space, seed=0, **given, **facts)
    if config.asynchronous and not strategy.asynchronous:
        able = [name for name in STRATEGIES.names() if STRATEGIES.get(name).asynchronous]
        raise DiffesError(
            f"strategy {config.strategy!r} wants whole generations; asynchronous ones: {', '.join(able)}. Take one of "
            "them, or leave asynchronous out"
        )
    for name, spec in (STRATEGIES.parse(config.strategy)[1] | given).items():
        if name in strategy.operators:
            _try_operator(OPERATORS[name], spec, space)


def are_known_elsewhere(config: RunConfig) -> bool:
    """Check whether another process finds all that the settings name, by their names."""
    options = STRATEGIES.parse(config.strategy)[1] | operators_of(config)
    named: list[tuple[Registry[Any], str]] = [
        (STRATEGIES, config.strategy), (METRICS, config.metric), (CURRENCIES, config.cost), (PROBLEMS, config.genes),
        *((METHODS, part) for part in parts_of(config.method)), *([(SOLVERS, config.solver)] if config.solver else []),
        *((registry, str(options.get(name, ""))) for name, registry in OPERATORS.items()),
    ]  # fmt: skip
    return all(registry.is_known_elsewhere(spec) for registry, spec in named)


def check_visited(space: SearchSpace, config: RunConfig) -> None:
    """Check that every stage is calibrated, because plans may call any timestep.

    Raises:
        DiffesError: a stage has no step and was, or would be, left out.
    """
    if missing := [s for s in range(space.n_stages) if s not in space.visited]:
        raise DiffesError(
            f"plans may call any timestep, and stages {missing} are not calibrated because no step of the workbench is "
            f"in them: raise steps above {config.steps} or lower stages"
        )


def operators_of(config: RunConfig) -> dict[str, str]:
    """Return the operators that the settings give to the strategy, by the name of its parameter.

    Raises:
        DiffesError: the strategy takes none.
    """
    strategy, _ = STRATEGIES.parse(config.strategy)
    given = {name: spec for name in OPERATORS if (spec := getattr(config, name)) is not None}
    for name, spec in given.items():
        if name not in strategy.operators:
            raise DiffesError(f"strategy {config.strategy!r} takes no {name}; leave --{name} {spec} out")
    return given


def _try_operator(registry: OperatorRegistry, spec: str, space: SearchSpace) -> None:
    """Apply an operator once, so that an operator for other genomes raises before the long part."""
    rng = np.random.default_rng(0)
    BoundOperator(registry, spec, space, rng)(*(Genome(space.sample(rng)) for _ in range(registry.n_parents)))


def try_adapter(adapter: ModelAdapter, n_steps: int, guidance: float) -> None:
    """Check an adapter that does not come with diffes, and make one sampling step with it, before the long part.

    Raises:
        DiffesError: the adapter raises, or returns something else than it must.
    """
    if is_ours(adapter):
        return
    name = f"adapter {type(adapter).__qualname__}"

    def expect(right: bool, wanted: str, found: object) -> None:
        if not right:
            raise unexpected(name, wanted, found)

    with guarded(adapter, name, "do what diffes.adapters.ModelAdapter says of each of its methods"):
        modules, blocks = dict(adapter.denoiser.named_modules()), adapter.blocks()
        expect(isinstance(blocks, list) and set(blocks) <= set(modules), "return paths of modules from blocks", blocks)
        choices = adapter.choices("search")
        expect(isinstance(choices, Sequence) and len(choices) > 0, "return conditions from choices", choices)
        label = adapter.label(choices[0])
        expect(isinstance(label, str), "return a text from label", label)
        probes = adapter.make_probes(2, 0)
        after = adapter.step(adapter.start(probes, n_steps, guidance), probes, guidance)
        final = adapter.finish(after)
        expect(bool(final.isfinite().all()), "sample finite latents", "NaN or inf")
        bare = adapter.denoise_once(final, torch.full((2,), 1), probes.conditions)
        expect(isinstance(bare, Tensor) and len(bare) == 2, "return predictions (n, C, h, w) from denoise_once", bare)


def try_metric(metric: Metric, adapter: ModelAdapter) -> None:
    """Score two images once, so that a metric that does not work here raises before the long part.

    Raises:
        DiffesError: the metric does not score single images of this size.
    """
    probes = adapter.make_probes(2, 0)
    latents = adapter.noise(probes)
    images = latents if metric.space == "latent" else adapter.decode(latents)
    try:
        metric(images, images, probes.conditions)
    except PluginError:
        raise
    except Exception as error:  # each metric fails in its own way
        reason = " ".join(str(error).split())[:300]
        raise DiffesError(
            f"metric {metric.name!r} cannot score images of shape {tuple(images.shape[1:])} one by one "
            f"({type(error).__name__}: {reason}); choose another, for instance ssim, psnr or latent_mse"
        ) from error
