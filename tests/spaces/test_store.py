"""EvaluationStore: nothing that was paid for is lost, and nothing foreign is taken."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from diffes.errors import DiffesError
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import SearchSpace
from diffes.spaces.store import EvaluationStore, digest
from diffes.spaces.strategy import Evaluation

STAGES = Stages.equal(3)
SPACE = SearchSpace.mean_sparsity(STAGES, 8, 0.5)


def evaluation(*levels: int, fitness: float = 0.1 + 0.2) -> Evaluation:
    return Evaluation(Schedule(STAGES, levels, 8), fitness, denoiser_calls=320, seconds=1.25)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "evaluations.journal"


def reopen(path: Path) -> EvaluationStore:
    return EvaluationStore(path, SPACE)


def test_round_trip_in_order_and_exact(path: Path) -> None:
    kept = [evaluation(8, 0, 4), evaluation(0, 0, 0, fitness=-1e-17), evaluation(1, 2, 3, fitness=-math.inf)]
    store = reopen(path)
    assert len(store) == 0
    for each in kept:
        store.add(each)
    for opened in (store, reopen(path)):
        assert opened.evaluations() == kept
        assert len(opened) == 3
        assert [opened.get(each.schedule) for each in kept] == kept
        assert opened.get(evaluation(8, 8, 8).schedule) is None


def test_a_known_schedule_is_not_written_again(path: Path) -> None:
    store = reopen(path)
    store.add(evaluation(1, 1, 1))
    size = path.stat().st_size
    store.add(evaluation(1, 1, 1, fitness=9.0))
    assert path.stat().st_size == size
    assert reopen(path).evaluations() == [evaluation(1, 1, 1)]


def test_optuna_opens_the_file(path: Path) -> None:
    store = reopen(path)
    store.add(evaluation(4, 0, 8, fitness=0.5))
    store.add(evaluation(4, 5, 6, fitness=-math.inf))
    store.add(evaluation(1, 2, 3, fitness=0.9))
    store.add(replace(evaluation(2, 2, 8, fitness=0.7), fidelity=0.25), Origin("swap", ((4, 0, 8), (8, 8, 8))))
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))
    good, failed, too_dear, partial = study.trials
    assert good.params == {"level_00": 4, "level_01": 0, "level_02": 8}
    assert good.value == 0.5
    assert good.user_attrs == {"denoiser_calls": 320, "seconds": 1.25, "digest": digest(store.evaluations()[0])}
    assert failed.state == optuna.trial.TrialState.FAIL
    assert failed.user_attrs["failed"] is True
    assert too_dear.constraints["budget"] > 0 >= good.constraints["budget"]
    assert study.best_trial.number == good.number
    assert partial.state == optuna.trial.TrialState.PRUNED
    assert partial.intermediate_values == {25: 0.7}
    assert partial.user_attrs["operator"] == "swap" and partial.user_attrs["parents"] == [good.number]


@pytest.mark.parametrize(
    ("written", "changed"),
    [
        ('"value":0.5', '"value":0.75'), ('"denoiser_calls":320', '"denoiser_calls":32'),
        ('"seconds":1.25', '"seconds":9'),
        ('"level_00":4', '"level_00":5'), ('"digest":"', '"other":"'), ('"value":0.5', '"value":Infinity'),
        ('"value":0.5', '"value":"a"'), ('"denoiser_calls":320', '"denoiser_calls":true'),
        ('"seconds":1.25', '"seconds":NaN'), ('"level_00":4', '"level_00":1e999'), ('"level_00":4', '"level_00":[]'),
        ('"user_attrs":{', '"user_attrs":' + "[" * 9999),
    ],
)  # fmt: skip
def test_a_value_that_was_changed_or_is_none_is_found(path: Path, written: str, changed: str) -> None:
    store = reopen(path)
    store.add(evaluation(1, 2, 3, fitness=0.9))
    store.add(evaluation(4, 0, 8, fitness=0.5))
    content = path.read_text().replace(" ", "")
    at = content.rindex(written)
    path.write_text(content[:at] + changed + content[at + len(written) :])
    with pytest.raises(DiffesError, match=r"was changed after it was written|damaged"):
        reopen(path)


def test_a_journal_of_before_there_were_digests_is_read_and_gone_on_with(path: Path) -> None:
    kept = [evaluation(1, 2, 3), evaluation(4, 0, 8), evaluation(0, 1, 2)]
    for each in kept[:2]:
        reopen(path).add(each)
    path.write_text(re.sub(r',"digest":"\w+"', "", path.read_text()))
    store = reopen(path)
    assert store.evaluations() == kept[:2]
    store.add(kept[2])
    assert reopen(path).evaluations() == kept


ROWS = ((0.96, 0.1 + 0.2), (-1e-17, 1.5, 2.0))


def test_coefficients_are_kept_exactly(path: Path) -> None:
    kept = [replace(evaluation(1, 2, 3), coefficients=ROWS), evaluation(4, 0, 8)]
    store = reopen(path)
    for each in kept:
        store.add(each)
    for opened in (store, reopen(path)):
        assert opened.evaluations() == kept
        assert [each.coefficients for each in opened.evaluations()] == [ROWS, None]
    first, second = reopen(path)._study.trials
    assert first.user_attrs["coefficients"] == [list(row) for row in ROWS]
    assert "coefficients" not in second.user_attrs


@pytest.mark.parametrize(
    ("written", "changed"),
    [
        ("0.96", "0.97"), ("1.5,2.0", "1.5"), ("-1e-17", "0.0"), ('"coefficients"', '"something"'),
        ("[0.96", "[NaN"), ("[0.96", '["a"'), ("[[0.96", "[[],[0.96"),
    ],
)  # fmt: skip
def test_coefficients_that_were_changed_are_found(path: Path, written: str, changed: str) -> None:
    reopen(path).add(replace(evaluation(1, 2, 3), coefficients=ROWS))
    content = path.read_text().replace(" ", "")
    at = content.rindex(written)
    path.write_text(content[:at] + changed + content[at + len(written) :])
    with pytest.raises(DiffesError, match=r"was changed after it was written|damaged"):
        reopen(path)


def test_a_trial_without_coefficients_keeps_the_digest_that_it_had() -> None:
    """A trial without coefficients keeps the digest that older versions wrote; one with coefficients has another."""
    plain = evaluation(1, 2, 3)
    assert digest(plain) == "bc61c7fc1e7b8040eb05f8d17d8250241d3e13f8d985db6d62861f81f55d76de"
    assert len({digest(replace(plain, coefficients=rows)) for rows in (None, ROWS, ROWS[:1], ROWS[::-1])}) == 4


@pytest.mark.parametrize("fitness", [math.nan, math.inf])
def test_what_is_no_score_is_not_stored(path: Path, fitness: float) -> None:
    with pytest.raises(DiffesError, match="must not be NaN or inf"):
        reopen(path).add(evaluation(1, 2, 3, fitness=fitness))


def test_the_same_schedule_at_two_fidelities(path: Path) -> None:
    kept = [replace(evaluation(1, 2, 3, fitness=0.5), fidelity=0.25), evaluation(1, 2, 3, fitness=0.4)]
    kept.append(replace(evaluation(4, 2, 3, fitness=-math.inf), fidelity=0.25))
    store = reopen(path)
    for each in kept:
        store.add(each)
    for opened in (store, reopen(path)):
        assert opened.evaluations() == kept
        assert opened.get(kept[0].schedule, 0.25) == kept[0] and opened.get(kept[0].schedule) == kept[1]
        assert opened.known([kept[2].schedule, kept[0].schedule], 0.25) == [kept[0], kept[2]]


@pytest.mark.slow
def test_a_database_holds_many_studies(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    EvaluationStore(url, SPACE, "one").add(evaluation(1, 2, 3))
    assert len(EvaluationStore(url, SPACE, "two")) == 0
    assert EvaluationStore(url, SPACE, "one").evaluations() == [evaluation(1, 2, 3)]
    with pytest.raises(DiffesError, match="cannot be opened"):
        EvaluationStore("nosuchdb://nowhere", SPACE)


@pytest.mark.parametrize("cut", [1, 2, 40, "all but one"])
def test_a_line_cut_off_by_a_kill_is_dropped_and_the_journal_goes_on(path: Path, cut: int | str) -> None:
    store = reopen(path)
    store.add(evaluation(1, 1, 1))
    size = path.stat().st_size
    store.add(evaluation(2, 2, 2))
    content = path.read_bytes()
    path.write_bytes(content[: size + 1] if isinstance(cut, str) else content[:-cut])
    store = reopen(path)
    assert store.evaluations() == [evaluation(1, 1, 1)]
    store.add(evaluation(3, 3, 3))
    assert reopen(path).evaluations() == [evaluation(1, 1, 1), evaluation(3, 3, 3)]


def test_a_run_killed_before_its_first_evaluation_can_be_opened(path: Path) -> None:
    reopen(path)
    first_line = path.read_bytes().split(b"\n")[0] + b"\n"
    path.write_bytes(first_line)
    reopen(path).add(evaluation(1, 1, 1))
    assert reopen(path).evaluations() == [evaluation(1, 1, 1)]
    with pytest.raises(DiffesError, match="max_level"):
        EvaluationStore(path, SearchSpace.mean_sparsity(STAGES, 4, 0.5))


@pytest.mark.parametrize(("stages", "max_level"), [(Stages.equal(4), 8), (Stages.equal(3, 999), 8), (STAGES, 4)])
def test_a_journal_of_another_kind_is_refused(path: Path, stages: Stages, max_level: int) -> None:
    reopen(path)
    with pytest.raises(DiffesError, match=r"holds evaluations with (stages|max_level)"):
        EvaluationStore(path, SearchSpace.mean_sparsity(stages, max_level, 0.5))


def test_a_schedule_of_another_kind_is_refused(path: Path) -> None:
    store = reopen(path)
    with pytest.raises(DiffesError, match=r"max_level 8\. Got one with 4 stages"):
        store.add(Evaluation(Schedule(Stages.equal(4), (1, 1, 1, 1), 8), 0.0))
    with pytest.raises(DiffesError, match="NaN"):
        store.add(evaluation(1, 1, 1, fitness=math.nan))
    assert len(reopen(path)) == 0


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"hello\nyou", b'{"a": 1}\n', b"[]\n", b"\xff\xfe\n\n\n"])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DiffesError, match="not a journal"):
        reopen(path)
    assert path.read_bytes() == content


def test_optuna_is_quiet_and_its_verbosity_stays(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        reopen(path).add(evaluation(1, 1, 1))
        reopen(path)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


def test_a_study_of_another_run_is_neither_joined_nor_deleted(tmp_path: Path) -> None:
    url, space = f"sqlite:///{tmp_path / 'studies.db'}", SearchSpace.mean_sparsity(Stages.equal(3), 4, 0.5)
    store = EvaluationStore(url, space, "run", "/a/run")
    store.add(Evaluation(space.schedule(space.uniform()), 1.0, 1, 1.0))
    with pytest.raises(DiffesError, match="/a/run"):
        EvaluationStore(url, space, "run", "/b/run")
    with pytest.raises(DiffesError, match="/a/run"):
        EvaluationStore.forget(url, "run", "/b/run")
    assert len(EvaluationStore(url, space, "run", "/a/run")) == 1
    EvaluationStore.forget(url, "run", "/a/run")
    EvaluationStore.forget(url, "run", "/a/run")
    assert len(EvaluationStore(url, space, "run", "/b/run")) == 0


def line(generation: int, **more: object) -> dict[str, object]:
    return {"generation": generation, "evaluations": 4 * generation, "best": 0.5, "mean": None} | more


def test_the_logbook_is_kept_in_the_order_of_generations(path: Path) -> None:
    store = reopen(path)
    assert store.logbook() == []
    lines = [line(generation) for generation in range(12)]
    for each in lines[::-1]:
        store.log(each)
    for opened in (store, reopen(path)):
        assert opened.logbook() == lines
        assert opened.evaluations() == []


def test_a_generation_is_noted_once(path: Path) -> None:
    store = reopen(path)
    for each in (line(0), line(1)):
        store.log(each)
    again = reopen(path)
    size = path.stat().st_size
    again.log(line(0))
    assert path.stat().st_size == size
    assert again.logbook() == [line(0), line(1)]
    again.log(line(1, evaluations=5))  # what a limit had cut went on
    again.log(line(2))
    assert reopen(path).logbook() == [line(0), line(1, evaluations=5), line(2)]


def test_origins_name_the_trials_of_measured_parents(path: Path) -> None:
    store = reopen(path)
    store.add(evaluation(4, 4, 4), None)
    store.add(evaluation(8, 0, 4), Origin("swap", ((4, 4, 4),)))
    store = reopen(path)
    store.add(evaluation(0, 8, 4), Origin("level_exchange + swap", ((8, 0, 4), (1, 2, 3), (4, 4, 4))))
    first, second, third = store._study.trials
    assert "operator" not in first.user_attrs and "parents" not in first.user_attrs
    assert (second.user_attrs["operator"], second.user_attrs["parents"]) == ("swap", [0])
    assert (third.user_attrs["operator"], third.user_attrs["parents"]) == ("level_exchange + swap", [1, 0])
