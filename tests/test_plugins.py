"""Plug-ins of somebody else: one in a package that is found and run, and many that fail and are named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import open_adapter, options_of, small_config

import diffes
from diffes.adapters import ModelAdapter
from diffes.adapters.dit import DiTAdapter
from diffes.adapters.loading import ADAPTERS, adapter_for
from diffes.cli import main
from diffes.errors import DiffesError, PluginError
from diffes.measure.currencies import CURRENCIES, Macs
from diffes.measure.metrics import METRICS, Metric, make_metric
from diffes.problems.checks import try_adapter
from diffes.problems.workbench import Workbench
from diffes.pruning import METHODS, DepthMethod, ReuseMethod, Sum, WidthMethod
from diffes.pruning.base import GroupWeights
from diffes.pruning.build import build_bank
from diffes.pruning.calibration import load_calibration
from diffes.registry import Registry
from diffes.results.folder import JOURNAL
from diffes.spaces.genome import Genome
from diffes.spaces.operators import MUTATIONS, BoundOperator
from diffes.spaces.schedule import Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import STRATEGIES, Strategy
from diffes.testing import evaluate

MUTATION = '''
"""A mutation that knows nothing of diffes but its convention."""


def borrow(genome, *, space, rng, most=2):
    """One stage takes up to `most` levels from the stage sampled before it."""
    stages = space.visited
    if len(stages) > 1:
        i = int(rng.integers(len(stages) - 1))
        taker, giver = stages[i], stages[i + 1]
        amount = min(int(rng.integers(1, most + 1)), genome[giver], space.max_level - genome[taker])
        genome[giver] -= amount
        genome[taker] += amount
        if int(rng.integers(2)):
            genome[taker], genome[giver] = genome[giver], genome[taker]
    return ([int(level) for level in space.repair(genome, rng)],)
'''
CONFORMANCE = """
from diffes.testing import MutationConformance


class TestBorrow(MutationConformance):
    name = "borrow:most=3"
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What `pip install` leaves of a package with one module and one entry point."""
    site = tmp_path / "site"
    info = site / "borrow-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "borrow_package.py").write_text(MUTATION)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: borrow\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[diffes.mutations]\nborrow = borrow_package:borrow\n")
    (tmp_path / "test_borrow.py").write_text(CONFORMANCE)
    return site


@pytest.mark.slow
def test_a_mutation_of_another_package(package: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert len(MUTATION.strip().splitlines()) <= 25
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(Path(__file__).parents[1])])}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "6 passed" in run("pytest", "-q", "-p", "no:cacheprovider", "test_borrow.py")
    run(
        "diffes.cli", "compare", "--genes", "levels", "--seeds", "2", "--model", str(tiny_folder),
        "--method", "magnitude", "--stages", "4", "--steps", "4", "--metric", "latent_mse", "--max-evals", "20",
        "--probes", "2", "--heldout", "2", "--out", "compared", "--strategies", "evolution:mutation=borrow", "random",
    )  # fmt: skip
    cells = [json.loads(line) for line in (tmp_path / "compared" / "cells.jsonl").read_text().splitlines()]
    assert [cell["settings"]["strategy"] for cell in cells] == ["evolution:mutation=borrow", "random"] * 2
    journals = b"".join(path.read_bytes() for path in (tmp_path / "compared" / "journals").glob("*.journal"))
    assert b'"borrow"' in journals  # the operator, beside the evaluations that it led to


SPACE = SearchSpace.mean_sparsity(Stages.equal(4), 4, 0.5)
DENSE = [0, 0, 0, 0]


def raises(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("of theirs")


def leaves(*_: Any, **__: Any) -> Any:
    sys.exit(0)


def returns(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def refused(action: Callable[[], Any], *words: str) -> None:
    """Named in one line; what was raised is shown from the first line of the plug-in on."""
    with pytest.raises(DiffesError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    if isinstance(caught.value, PluginError):
        assert "test_plugins.py" in next(line for line in caught.value.trace.splitlines() if "File" in line)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (raises, "failed (ZeroDivisionError: of theirs); it must return a tuple of 1 genomes"),
        (leaves, "failed (SystemExit: 0)"),
        (returns(None), "must return a tuple of 1 genomes, got None"),
        (returns([DENSE]), "must return a tuple of 1 genomes, got [[0, 0, 0, 0]]"),
        (returns((None,)), "must return genomes of 4 whole levels, got None"),
        (returns(([2, 2],)), "must return genomes of 4 whole levels, got [2, 2]"),
        (returns(([math.nan] * 4,)), "must return genomes of 4 whole levels"),
        (returns(([2.5] * 4,)), "must return genomes of 4 whole levels"),
        (returns((DENSE,)), "must return genomes that meet the budget"),
        (returns(([9, 9, 9, 9],)), "must return genomes that meet the budget"),
    ],
)
def test_operators_that_fail(made: Callable[..., Any], words: str) -> None:
    MUTATIONS.register("bad")(lambda genome, *, space, rng: made())
    try:
        operator = BoundOperator(MUTATIONS, "bad", SPACE, np.random.default_rng(0))
        refused(lambda: operator(Genome(SPACE.uniform())), "operator 'bad'", words)
    finally:
        MUTATIONS.unregister("bad")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (raises, "failed (ZeroDivisionError: of theirs); it must return a list of what self.propose(levels) gives"),
        (leaves, "failed (SystemExit: 0)"),
        (returns(None), "must return a list of what self.propose(levels) gives from _ask, got None"),
        (returns([[2, 2, 2, 2]]), "must return a list of what self.propose(levels) gives from _ask"),
        (lambda self: [self.propose(DENSE)], "do not meet the budget of"),
        (lambda self: [self.propose([math.nan] * 4)], "failed (ValueError"),
        (lambda self: [self.propose([2])], "one level per stage"),
    ],
)
def test_strategies_that_fail(made: Callable[..., Any], words: str) -> None:
    class Bad(Strategy):
        _ask = made

        def _tell(self, evaluations: Any) -> None:
            raises()

    refused(Bad(SPACE, seed=0).ask, "strategy Bad", words)


def test_strategies_that_fail_when_they_are_made_or_told() -> None:
    class Bad(Strategy):
        def __init__(self, space: SearchSpace, *, seed: int, size: int = 1) -> None:
            if size:
                super().__init__(space, seed=1 // (size - 1))

        def _ask(self) -> Any:
            return [self.propose(self.space.uniform())]

        def _tell(self, evaluations: Any) -> None:
            raises()

    STRATEGIES.register("bad")(Bad)
    try:
        refused(lambda: STRATEGIES.make("bad", SPACE, seed=0), "strategy 'bad' failed (ZeroDivisionError")
        refused(lambda: STRATEGIES.make("bad:size=0", SPACE, seed=0).ask(), "must call super().__init__")
        good = STRATEGIES.make("bad:size=2", SPACE, seed=0)
        told = evaluate([proposal.schedule for proposal in good.ask()])
        refused(lambda: good.tell(told), "strategy Bad failed (ZeroDivisionError", "_tell")
        STRATEGIES.register("bad")(raises)  # type: ignore[arg-type]
        refused(lambda: STRATEGIES.get("bad"), "strategy 'bad' must be a subclass of Strategy")
    finally:
        STRATEGIES.unregister("bad")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raises, "failed (ZeroDivisionError: of theirs); it must return a tensor of 2 scores"),
        (leaves, "failed (SystemExit: 0)"), (returns(None), "must return a tensor of 2 scores, one a probe, got None"),
        (returns([1.0, 2.0]), "must return a tensor of 2 scores"), (returns(torch.zeros(3)), "gave 3 scores for 2"),
        (returns(torch.zeros(2, dtype=torch.complex64)), "must return a tensor of 2 scores"),
    ],
)  # fmt: skip
def test_metrics_that_fail(function: Callable[..., Any], words: str) -> None:
    metric = Metric("bad", "latent", True, function)
    refused(lambda: metric(torch.zeros(2, 4), torch.zeros(2, 4)), "metric 'bad'", words)


def test_metrics_that_are_declared_wrongly() -> None:
    def declare(**options: Any) -> Callable[[], Any]:
        return lambda: diffes.metric("bad", **options)(torch.dist)

    refused(declare(space="pixels"), "space of metric 'bad' must be 'latent' or 'image', got 'pixels'")
    refused(declare(space=["image"]), "space of metric 'bad' must be 'latent' or 'image', got ['image']")
    refused(declare(higher_is_better=0), "higher_is_better of metric 'bad' must be True or False, got 0")
    assert "bad" not in METRICS.names()


def test_a_metric_that_reads_conditions_it_does_not_like() -> None:
    def by_prompt(outputs: torch.Tensor, references: torch.Tensor, conditions: Any) -> Any:
        return torch.tensor([len(prompt) for prompt in conditions])

    metric, ones = Metric("bad", "image", True, by_prompt), torch.ones(2, 4)
    assert metric(ones, ones, ("a cat", "an owl")).tolist() == [5, 6]
    refused(lambda: metric(ones, ones, (1, 2)), "metric 'bad' failed (TypeError: object of type 'int' has no len())")


METRIC = """
import diffes


@diffes.metric("darkest", space="image", higher_is_better=False)
def darkest(outputs, references):
    return outputs.flatten(1).amin(1)
"""


def test_a_decorated_metric_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "darkest-0.1.dist-info"
    info.mkdir()
    (tmp_path / "darkest_package.py").write_text(METRIC)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: darkest\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[diffes.metrics]\ndarkest = darkest_package:darkest\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        metric = make_metric("darkest", torch.device("cpu"))
        assert (metric.name, metric.space, metric.higher_is_better) == ("darkest", "image", False)
        assert metric(torch.ones(2, 4), torch.ones(2, 4)).tolist() == [-1, -1]
        assert METRICS.is_known_elsewhere("darkest")
    finally:
        METRICS.unregister("darkest")


def test_a_method_and_a_cost_by_decorator() -> None:
    method, cost = type("Mine", (DepthMethod,), {}), type("Own", (Macs,), {})
    try:
        assert diffes.pruning_method("mine")(method) is METHODS.get("mine") is method
        assert diffes.cost("own")(cost) is CURRENCIES.get("own") is cost
        assert not CURRENCIES.is_known_elsewhere("own")
    finally:
        METHODS.unregister("mine")
        CURRENCIES.unregister("own")


def test_a_score_that_is_no_number_never_wins(bench: Workbench) -> None:
    odd = iter([math.inf, math.nan, -math.inf])
    METRICS.register("odd")(lambda outputs, _: torch.full((len(outputs),), next(odd, float(outputs.sum()))))
    try:
        scores = METRICS.get("odd")
        assert Metric("odd", "latent", True, scores)(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [-math.inf] * 2
        found = bench.search("random", metric="latent_mse", max_evals=2)
        assert math.isfinite(found.best.fitness)
        odd = iter([0.0, math.inf, math.nan])  # the first is to see whether it works
        with pytest.raises(DiffesError, match="all 2 evaluations failed"):
            bench.search("random", metric="odd", max_evals=2)
    finally:
        METRICS.unregister("odd")


INDICES = torch.arange(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (raises, "failed (ZeroDivisionError: of theirs); it must return GroupWeights"), (leaves, "failed (SystemExit"),
        (returns(None), "must return GroupWeights for each of the 4 numbers"), (returns((1,)), "got (1,)"),
        (lambda *_: [GroupWeights(INDICES)] * 4, "3 groups of transformer_blocks.0.attn1 must be kept, got 4"),
        (lambda *_: [GroupWeights(INDICES[:n].flip(0)) for n in (3, 2, 1, 0)], "must rise within [0, 3]"),
        (lambda *_: [GroupWeights(INDICES[:n] + 9) for n in (3, 2, 1, 0)], "must rise within [0, 3]"),
        (lambda *_: [GroupWeights(INDICES[:n].double()) for n in (3, 2, 1, 0)], "must be whole numbers"),
        (lambda *_: [GroupWeights(INDICES[:n], (torch.zeros(2, 2),)) for n in (3, 2, 1, 0)], "of shape (32, 24)"),
        (lambda *_: [GroupWeights(INDICES[:n], (torch.zeros(32, 8 * n) / 0,)) for n in (3, 2, 1, 0)], "not finite"),
    ],
)  # fmt: skip
def test_width_methods_that_fail(tiny: ModelAdapter, made: Callable[..., Any], words: str) -> None:
    class Bad(WidthMethod):
        needs = "nothing"

        def prune(self, groups: Any, weights: Any, inputs: Any, n_kept: Any) -> Any:
            return made()

    build = {"guidance": 1.0, "seed": 0, "only": [0]}
    refused(lambda: build_bank(tiny, Bad(), Stages.equal(4), None, **build), "pruning method Bad", words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (raises, "failed (ZeroDivisionError"), (returns(None), "must return a tensor of 2 importances, got None"),
        (returns([1.0, 2.0]), "must return a tensor of 2 importances"), (returns(torch.zeros(3)), "of 2 importances"),
        (returns(torch.full((2,), math.nan)), "not all values are finite"),
    ],
)  # fmt: skip
def test_depth_methods_that_fail(tiny: ModelAdapter, tiny_folder: Path, made: Callable[..., Any], words: str) -> None:
    class Bad(DepthMethod):
        def importance(self, changes: Any) -> Any:
            return made()

    data = load_calibration(tiny, tiny_folder / "calibration.npz", 4)
    refused(lambda: build_bank(tiny, Bad(), Stages.equal(4), data, guidance=1.0, seed=0, only=[0]), words)


@pytest.mark.parametrize("made", [raises, returns(None), returns([INDICES]), returns([INDICES + 9] * 4)])
def test_reuse_methods_that_fail(tiny: ModelAdapter, made: Callable[..., Any]) -> None:
    class Bad(ReuseMethod):
        needs = "nothing"

        def groups(self, adapter: ModelAdapter) -> Any:
            return adapter.branches()

        def kept(self, groups: Any, max_level: int, sensitivity: Any) -> Any:
            return made()

    build = {"guidance": 1.0, "seed": 0, "only": [0]}
    refused(lambda: build_bank(tiny, Bad(), Stages.equal(4), None, **build), "pruning method Bad", "4 levels")  # type: ignore[arg-type]
    Bad.max_level = returns(0)  # type: ignore[method-assign]
    refused(lambda: Sum((Bad(),)).max_level(tiny), "max_level of pruning method Bad must be at least 1, got 0")


@pytest.mark.parametrize(
    ("method", "made", "words"),
    [
        ("blocks", raises, "failed (ZeroDivisionError: of theirs)"), ("blocks", leaves, "failed (SystemExit: 0)"),
        ("blocks", returns(None), "must return paths of modules from blocks, got None"),
        ("blocks", returns(["nowhere"]), "must return paths of modules from blocks"),
        ("choices", returns([]), "must return conditions from choices"), ("label", returns(1), "a text from label"),
        ("call_of", raises, "failed (ZeroDivisionError: of theirs)"),
        ("denoise_once", raises, "failed (ZeroDivisionError: of theirs)"),
        ("denoise_once", returns(None), "from denoise_once, got None"),
    ],
)  # fmt: skip
def test_adapters_that_fail(tiny_folder: Path, method: str, made: Callable[..., Any], words: str) -> None:
    pipe = open_adapter(str(tiny_folder)).pipe
    bad = type("Bad", (DiTAdapter,), {"__module__": __name__, method: made})(pipe)
    refused(lambda: try_adapter(bad, 4, 1.0), "adapter Bad", words)


def test_an_adapter_that_does_not_take_the_pipeline(tiny: ModelAdapter) -> None:
    class Bad(DiTAdapter):
        def __init__(self, pipe: Any) -> None:
            raises()

    ADAPTERS.register("DiTPipeline")(Bad)
    try:
        refused(lambda: adapter_for(tiny.pipe), "adapter", "Bad failed (ZeroDivisionError: of theirs)")
    finally:
        ADAPTERS.unregister("DiTPipeline")


def test_one_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken-0.1.dist-info"
    info.mkdir()
    (tmp_path / "broken_package.py").write_text("import sys\nsys.exit(0)\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[diffes.tests]\nbroken = broken_package:thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"thing 'broken' of broken_package:thing failed \(SystemExit: 0\)"):
        Registry[Any]("thing", "diffes.tests").get("broken")


@pytest.fixture
def failing() -> Iterator[list[int]]:
    """A metric that fails, by leaving, once it was called so many times."""
    left = [4]

    def metric(outputs: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        return -(outputs - references).square().flatten(1).mean(1) if left[0] > 0 else leaves()

    METRICS.register("leaving")(metric)
    yield left
    METRICS.unregister("leaving")


def test_what_was_paid_before_a_plug_in_failed_is_kept(
    tiny_folder: Path, tmp_path: Path, failing: list[int], capsys: pytest.CaptureFixture[str], bench: Workbench
) -> None:
    config = small_config(tiny_folder, metric="leaving")
    command = ["search", "--genes", "levels", *options_of(config), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("diffes: metric 'leaving' failed (SystemExit: 0); it must return a tensor of 4 scores")
    assert "in leaves" in said and "diffes/measure" not in said
    assert len(EvaluationStore(tmp_path / "run" / JOURNAL, bench.space)) == 2
    failing[0] = 10**6
    main(command)
    assert len(EvaluationStore(tmp_path / "run" / JOURNAL, bench.space)) == 6
