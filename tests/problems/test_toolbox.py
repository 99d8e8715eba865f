"""DEAP's own algorithms on a calibrated model: nothing is paid twice, and a checkpoint goes on as if undisturbed."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deap import algorithms, base, tools

from diffes.errors import DiffesError
from diffes.problems.workbench import Workbench
from diffes.spaces.genome import Genome
from diffes.spaces.schedule import Schedule
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import Evaluation

VARIATION = {"cxpb": 0.4, "mutpb": 0.6}


@dataclass
class Recorder:
    """The workbench's own evaluator, with a list of what it was asked."""

    bench: Workbench
    batches: list[list[Schedule]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._evaluator = self.bench.evaluator(self.bench.config.probes, self.bench.config.seed)

    def __call__(self, schedules: Sequence[Schedule], fidelity: float = 1.0) -> Iterator[Evaluation]:
        self.batches.append(list(schedules))
        return self._evaluator(schedules, fidelity)

    @property
    def asked(self) -> Counter[Schedule]:
        return Counter(schedule for batch in self.batches for schedule in batch)


@pytest.fixture
def recorder(bench: Workbench) -> Recorder:
    return Recorder(bench)


@pytest.fixture
def recorded(bench: Workbench, recorder: Recorder) -> Workbench:
    """The workbench, with everything that its searches measure on record."""
    return replace(bench, make_evaluator=lambda _: recorder)


@pytest.fixture(autouse=True)
def global_random() -> Iterator[None]:
    """DEAP's algorithms draw from it; other tests should not see that."""
    before = random.getstate()
    random.seed(0)
    yield
    random.setstate(before)


def statistics() -> tools.Statistics:
    stats = tools.Statistics(lambda genome: genome.fitness.values)
    stats.register("mean", np.mean)
    stats.register("max", np.max)
    return stats


def evolved(
    toolbox: base.Toolbox, population: list[Genome], n: int, fame: tools.HallOfFame
) -> tuple[list[Genome], tools.Logbook]:
    """`n` generations of DEAP's (mu + lambda)."""
    found: tuple[list[Genome], tools.Logbook] = algorithms.eaMuPlusLambda(
        population, toolbox, mu=3, lambda_=5, ngen=n, stats=statistics(), halloffame=fame, verbose=False, **VARIATION
    )
    return found


def values(population: Sequence[Any]) -> list[tuple[list[int], float]]:
    return [(list(genome), genome.fitness.values[0]) for genome in population]


def measured(toolbox: base.Toolbox) -> set[Schedule]:
    """Everything that was evaluated."""
    return {evaluation.schedule for evaluation in toolbox.result().evaluations}


def test_mu_plus_lambda_searches_the_model(recorded: Workbench, recorder: Recorder) -> None:
    toolbox, fame = recorded.toolbox(seed=0), tools.HallOfFame(2)
    population, logbook = evolved(toolbox, toolbox.population(n=8), 4, fame)
    result = toolbox.result()
    assert logbook.select("gen") == [0, 1, 2, 3, 4]
    assert logbook[-1]["max"] >= logbook[0]["max"]
    assert values(fame)[0] == (list(result.best.schedule.levels), result.best.fitness)
    assert result.best.fitness == max(fitness for _, fitness in values(population))
    assert all(recorded.space.is_feasible(genome) for genome in population)
    assert set(recorder.asked.values()) == {1}
    assert {e.schedule for e in result.evaluations} == set(recorder.asked)


def test_fitness_is_that_of_the_workbench(recorded: Workbench, bench: Workbench) -> None:
    genome = recorded.toolbox().individual()
    (expected,) = bench.search_evaluator()([bench.space.schedule(genome)])
    assert recorded.toolbox().evaluate(genome) == (expected.fitness,)


def test_a_generation_is_one_batch(recorded: Workbench, recorder: Recorder) -> None:
    toolbox = recorded.toolbox(seed=0)
    population = toolbox.population(n=6)
    fitness = toolbox.map(toolbox.evaluate, [*population, population[0]])
    assert [len(batch) for batch in recorder.batches] == [6]
    assert len(fitness) == 7 and fitness[6] == fitness[0]
    assert toolbox.map(len, population) == [4] * 6
    assert [line["evaluations"] for line in toolbox.result().logbook] == [6]


def test_every_evaluation_is_stored_and_a_second_run_pays_nothing(
    recorded: Workbench, recorder: Recorder, tmp_path: Path
) -> None:
    def run(space: Any) -> tuple[list[tuple[list[int], float]], Any]:
        random.seed(3)
        toolbox = recorded.toolbox(seed=1, store=EvaluationStore(tmp_path / "study.journal", space))
        population, _ = evolved(toolbox, toolbox.population(n=6), 3, tools.HallOfFame(1))
        return values(population), toolbox.result()

    first, result = run(recorded.space)
    stored = EvaluationStore(tmp_path / "study.journal", recorded.space)
    assert set(stored.evaluations()) == set(result.evaluations)
    assert set(recorder.asked.values()) == {1}
    recorder.batches.clear()
    again, repeated = run(recorded.space)
    assert again == first and recorder.batches == []
    assert (repeated.best, repeated.denoiser_calls) == (result.best, result.denoiser_calls)


def test_a_checkpoint_goes_on_as_if_undisturbed(bench: Workbench, tmp_path: Path) -> None:
    """As DEAP's documentation has it, and with the operators, whose generator is their own."""
    toolbox, whole_fame = bench.toolbox(seed=2), tools.HallOfFame(2)
    whole, log = evolved(toolbox, toolbox.population(n=6), 6, whole_fame)
    undisturbed = measured(toolbox)

    random.seed(0)
    toolbox, fame = bench.toolbox(seed=2), tools.HallOfFame(2)
    population, before = evolved(toolbox, toolbox.population(n=6), 3, fame)
    first_half = measured(toolbox)
    checkpoint = {
        "population": population, "logbook": before, "halloffame": fame, "rndstate": random.getstate(),
        "operators": (toolbox.mutate, toolbox.mate),
    }  # fmt: skip
    (tmp_path / "checkpoint.pkl").write_bytes(pickle.dumps(checkpoint))

    random.seed(12345)
    kept: dict[str, Any] = pickle.loads((tmp_path / "checkpoint.pkl").read_bytes())
    random.setstate(kept["rndstate"])
    toolbox = bench.toolbox(seed=99)
    toolbox.mutate, toolbox.mate = kept["operators"]
    population, after = evolved(toolbox, kept["population"], 3, kept["halloffame"])
    assert first_half < undisturbed and first_half | measured(toolbox) == undisturbed
    assert values(population) == values(whole)
    assert values(kept["halloffame"]) == values(whole_fame)
    assert kept["logbook"].select("max") + after.select("max")[1:] == log.select("max")
    assert kept["logbook"].select("nevals") + after.select("nevals")[1:] == log.select("nevals")


def test_an_individual_off_the_budget_is_refused(recorded: Workbench, recorder: Recorder) -> None:
    toolbox = recorded.toolbox()
    for evaluate in (toolbox.evaluate, lambda genome: toolbox.map(toolbox.evaluate, [genome])):
        with pytest.raises(DiffesError, match=r"levels \[0, 0, 0, 0\] cost 16 and do not meet the budget of 8"):
            evaluate(Genome([0, 0, 0, 0]))
    assert recorder.batches == []


def test_other_selections_and_algorithms_of_deap_run(recorded: Workbench, recorder: Recorder) -> None:
    toolbox = recorded.toolbox(seed=0, mutation="deap.mutShuffleIndexes:indpb=0.5", crossover="deap.cxTwoPoint")
    toolbox.register("select", tools.selTournament, tournsize=2)
    population, logbook = algorithms.eaSimple(
        toolbox.population(n=6), toolbox, cxpb=0.5, mutpb=0.5, ngen=3, stats=statistics(), verbose=False
    )
    assert len(population) == 6 and len(logbook) == 4
    assert set(recorder.asked.values()) == {1} and len(recorder.asked) > 6


@pytest.mark.parametrize("name", ["mutation", "crossover"])
def test_operators_are_those_of_the_workbench_unless_named(recorded: Workbench, name: str) -> None:
    def specs(toolbox: base.Toolbox) -> dict[str, str]:
        found: dict[str, Callable[..., Any]] = {"mutation": toolbox.mutate.func, "crossover": toolbox.mate.func}
        return {key: str(getattr(operator, "spec", "")) for key, operator in found.items()}

    spec = {"mutation": "level_step", "crossover": "deap.cxUniform:indpb=0.5"}[name]
    plain = {"mutation": "level_switch", "crossover": "level_exchange"}
    changes: dict[str, Any] = {name: spec}
    configured = replace(recorded, config=replace(recorded.config, **changes))
    assert specs(recorded.toolbox()) == plain
    assert specs(configured.toolbox()) == specs(recorded.toolbox(**changes)) == {**plain, name: spec}
    with pytest.raises(DiffesError, match=f"unknown {name} 'nothing'"):
        recorded.toolbox(**{name: "nothing"})  # type: ignore[arg-type]


def test_the_seed_decides_what_operators_draw(recorded: Workbench) -> None:
    def drawn(**options: Any) -> list[list[int]]:
        toolbox = recorded.toolbox(**options)
        return [list(toolbox.individual()) for _ in range(8)]

    assert drawn() == drawn(seed=recorded.config.seed) != drawn(seed=1)


@pytest.mark.parametrize("genome", [[1.5, 0, 0, 0], ["1", "0", "0", "0"]])
def test_a_genome_of_something_else_than_whole_numbers_is_refused(recorded: Workbench, genome: list[Any]) -> None:
    with pytest.raises(DiffesError, match="a genome is a sequence of whole numbers, got"):
        recorded.toolbox(seed=0).evaluate(genome)
