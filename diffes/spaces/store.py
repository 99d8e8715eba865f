"""Store of every paid evaluation in one Optuna journal or database. Resuming a search replays it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from diffes.errors import DiffesError
from diffes.forms import Paid, checked
from diffes.spaces.database import OWNER, check_owner, claimed_study, open_database, quiet_optuna
from diffes.spaces.genome import Origin
from diffes.spaces.schedule import Schedule
from diffes.spaces.space import SearchSpace
from diffes.spaces.strategy import Evaluation, Measured

STUDY_NAME = "diffes"
GENERATION = "generation_"
LOCK_GRACE_SECONDS = 3  # a write takes milliseconds; a lock older than this was left by a process that was killed
LINE_START = b'{"op_code":'
DIGEST = "digest"  # user attribute of a trial


class EvaluationStore:
    """Evaluations of one set of stages, kept on disk as one Optuna study in a journal or a database.

    `optuna-dashboard` and `optuna.visualization` open it. Each evaluation is a trial:

    - It has a parameter `level_00..` per stage, and the fitness as its value.
    - User attributes are `denoiser_calls` and `seconds`; `coefficients`, a list per call, where a solver was fitted;
      the `digest` of all these; `operator` and `parents` (numbers of trials) where the strategy tells; `worker`,
      `waited` (seconds) and `paid_calls` where several workers measure.
    - A failed evaluation (-inf) is in state FAIL, with the user attribute `failed`.
    - One on a fraction of the probes is PRUNED, with the user attribute `fidelity`; its fitness is an intermediate
      value at the percentage of the probes.
    - One beyond the budget is marked as infeasible.

    User attributes `generation_00000..` of the study hold the statistics of each generation. The store knows schedules
    and nothing else: model, probes and metric have to be the same for all evaluations of a study.

    Args:
        path: path of the journal, which is made, with its folder, when there is none; or URL of a database, in
            SQLAlchemy's form.
        space: the stages and max_level of every schedule in it, and the budget.
        study: name of the study; a journal holds one, a database may hold many.
        owner: owner that the study must have, where others may have one of that name.
        shared: whether other processes add to the study meanwhile.

    Raises:
        DiffesError: the file is no journal of this library, or it holds other stages or another max_level, or a value
            in it has a wrong type, is out of its range, or was changed after it was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        space: SearchSpace,
        study: str = STUDY_NAME,
        owner: str | None = None,
        shared: bool = False,
    ) -> None:
        self.path = path if isinstance(path, str) and "://" in path else Path(path)
        self.space = space
        self.stages = space.stages
        self.max_level = space.max_level
        self._distributions: dict[str, BaseDistribution] = {
            f"level_{s:02d}": IntDistribution(0, self.max_level) for s in range(len(self.stages))
        }
        storage = open_database(self.path) if isinstance(self.path, str) else _open_journal(self.path)
        try:
            with quiet_optuna():
                if isinstance(storage, RDBStorage) and owner is not None:
                    self._study = claimed_study(storage, study, owner)
                else:
                    self._study = optuna.create_study(
                        storage=storage, study_name=study, direction="maximize", load_if_exists=True
                    )
        except Exception as error:  # Optuna trusts a journal, so a damaged one fails in any way
            raise _no_journal(self.path, error) from error
        self._check_kind(owner)
        self._storage, self._study_id = storage, storage.get_study_id_from_name(study)
        self._memo: dict[tuple[Schedule, float], Evaluation] = {}
        self._places: dict[tuple[Schedule, float], int] = {}  # in the order in which they were added
        self._numbers: dict[tuple[int, ...], int] = {}
        self._logged = {k: v for k, v in self._study.user_attrs.items() if k.startswith(GENERATION)}
        self.shared = shared
        self._read: set[int] = set()  # numbers of trials
        self._sealed = False
        self.refresh()

    def __len__(self) -> int:
        return len(self._memo)

    @staticmethod
    def forget(url: str, study: str, owner: str) -> None:
        """Delete a study from a database, if there is one of that name.

        Raises:
            DiffesError: the database cannot be opened, or the study belongs to another owner.
        """
        check_owner(url, study, owner, fresh=False)
        with contextlib.suppress(KeyError), quiet_optuna():
            optuna.delete_study(study_name=study, storage=open_database(url))

    def refresh(self) -> list[Evaluation]:
        """Read what others have added since; return the evaluations that were not known.

        Raises:
            DiffesError: as in the constructor.
        """
        new = []
        for trial in self._study.get_trials(deepcopy=False):
            written = trial.state.is_finished() and {"denoiser_calls", DIGEST} & trial.user_attrs.keys()
            if trial.number in self._read or not written:
                continue
            self._read.add(trial.number)
            evaluation = self._to_evaluation(trial)
            found = trial.user_attrs.get(DIGEST)
            if found != digest(evaluation) and (self._sealed or found is not None):
                raise DiffesError(
                    f"{self.path} was changed after it was written: the digest of trial {trial.number} differs. "
                    "Restore the file, or choose another."
                )
            self._sealed = found is not None  # older versions wrote none
            if (evaluation.schedule, evaluation.fidelity) not in self._memo:
                new.append(evaluation)
            self._remember(evaluation, trial.number)
        return new

    def get(self, schedule: Schedule, fidelity: float = 1.0) -> Evaluation | None:
        """Return the evaluation of a schedule, None if it was never measured."""
        return self._memo.get((schedule, fidelity))

    def known(self, schedules: Iterable[Schedule], fidelity: float = 1.0) -> list[Evaluation]:
        """Return the evaluations of these schedules that are known, in the order in which they were added."""
        keys = {(schedule, fidelity) for schedule in schedules} & self._memo.keys()
        return [self._memo[key] for key in sorted(keys, key=self._places.__getitem__)]

    def evaluations(self) -> list[Evaluation]:
        """Return all evaluations in the order in which they were added."""
        return list(self._memo.values())

    def add(self, evaluation: Evaluation, origin: Origin | None = None) -> None:
        """Write an evaluation to disk at once; one that is known already changes nothing.

        Raises:
            DiffesError: the schedule has other stages or another max_level than the store, or its fitness is NaN.
        """
        schedule = evaluation.schedule
        if (schedule.stages, schedule.max_level) != (self.stages, self.max_level):
            raise DiffesError(
                f"{self.path} holds schedules with {len(self.stages)} stages and max_level {self.max_level}. Got one "
                f"with {len(schedule.stages)} stages ({list(schedule.stages.ranges)}) and max_level "
                f"{schedule.max_level}."
            )
        if not evaluation.fitness < math.inf:
            raise DiffesError(f"fitness must not be NaN or inf, got {evaluation.fitness} for {list(schedule.levels)}")
        if (schedule, evaluation.fidelity) in self._memo:
            return
        trial = self._storage.create_new_trial(self._study_id, template_trial=self._to_trial(evaluation, origin))
        number = self._storage.get_trial_number_from_id(trial)
        self._read.add(number)
        self._remember(evaluation, number)

    def log(self, record: Mapping[str, Any]) -> None:
        """Keep the statistics of a generation as a user attribute of the study; nothing is written twice.

        A shared study keeps none: every process has its own.
        """
        if self.shared:
            return
        name = f"{GENERATION}{record['generation']:05d}"
        if self._logged.get(name) != record:  # a generation cut by a limit is completed when the search goes on
            self._study.set_user_attr(name, dict(record))
            self._logged[name] = dict(record)

    def logbook(self) -> list[dict[str, Any]]:
        """Return the statistics of all generations, in order."""
        return [self._logged[name] for name in sorted(self._logged)]

    def _remember(self, evaluation: Evaluation, number: int) -> None:
        key = evaluation.schedule, evaluation.fidelity
        self._memo.setdefault(key, evaluation)
        self._places.setdefault(key, len(self._places))
        self._numbers.setdefault(evaluation.schedule.levels, number)

    def _check_kind(self, owner: str | None) -> None:
        """Mark a new study with its stages, max_level and owner; compare those of an old one."""
        ours = {"stages": [list(stage) for stage in self.stages.ranges], "max_level": self.max_level}
        ours |= {OWNER: owner} if owner is not None else {}
        theirs = {key: self._study.user_attrs.get(key) for key in ours}
        for key, value in ours.items():
            if theirs[key] is None and not self._study.get_trials(deepcopy=False):
                self._study.set_user_attr(key, value)
            elif theirs[key] != value:
                raise DiffesError(
                    f"{self.path} holds evaluations with {key} {theirs[key]}, and this search has {value}. Choose "
                    "another file, or use the settings of the first run."
                )

    def _to_trial(self, evaluation: Evaluation, origin: Origin | None) -> FrozenTrial:
        levels, fitness, fidelity = evaluation.schedule.levels, evaluation.fitness, evaluation.fidelity
        attributes: dict[str, Any] = {
            "denoiser_calls": int(evaluation.denoiser_calls),
            "seconds": float(evaluation.seconds),
            DIGEST: digest(evaluation),
        }
        if fidelity < 1:
            attributes["fidelity"] = fidelity
        if evaluation.coefficients is not None:
            attributes["coefficients"] = [list(row) for row in evaluation.coefficients]
        if evaluation.measured is not None:
            attributes |= asdict(evaluation.measured)
        if origin is not None:
            attributes["operator"] = origin.operator
            attributes["parents"] = [self._numbers[parent] for parent in origin.parents if parent in self._numbers]
        excess = self.space.cost(levels) - self.space.budget if self.space.budget is not None else 0
        state = TrialState.COMPLETE if fidelity == 1 else TrialState.PRUNED
        if fitness == -math.inf:
            attributes["failed"] = True
            state = TrialState.FAIL
        trial = create_trial(
            state=state,
            value=float(fitness) if state == TrialState.COMPLETE else None,
            params=dict(zip(self._distributions, levels, strict=True)),
            distributions=self._distributions,
            user_attrs=attributes,
            constraints={"budget": float(excess)},
            intermediate_values={round(100 * fidelity): float(fitness)} if state == TrialState.PRUNED else None,
        )
        now = datetime.datetime.now()  # Optuna's own are local times without a zone
        trial.datetime_start, trial.datetime_complete = now - datetime.timedelta(seconds=evaluation.seconds), now
        return trial

    def _to_evaluation(self, trial: FrozenTrial) -> Evaluation:
        """Return the evaluation of a trial, with types and ranges checked."""
        place = f"trial {trial.number} of {self.path}"
        paid = checked(Paid, trial.user_attrs, place, "restore it, or choose another file")
        try:
            (fitness,) = trial.intermediate_values.values() if trial.intermediate_values else (trial.value,)
            fitness = -math.inf if fitness is None else float(fitness)
            if not fitness < math.inf:
                raise ValueError(f"its fitness is {fitness}")
            levels = tuple(operator.index(trial.params[name]) for name in self._distributions)
            schedule = Schedule(self.stages, levels, self.max_level)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DiffesError(
                f"{place} is damaged ({type(error).__name__}: {error}). Restore the file, or choose another."
            ) from error
        measured = None if paid.worker is None else Measured(paid.worker, paid.waited, paid.paid_calls)
        coefficients = None if paid.coefficients is None else tuple(tuple(row) for row in paid.coefficients)
        return Evaluation(schedule, fitness, paid.denoiser_calls, paid.seconds, paid.fidelity, coefficients, measured)


def _open_journal(path: Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path), grace_period=LOCK_GRACE_SECONDS)
    _mend(path, lock)
    try:
        with quiet_optuna():
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except Exception as error:  # as above
        raise _no_journal(path, error) from error


def _no_journal(path: object, error: Exception) -> DiffesError:
    reason = " ".join(str(error).split())[:200]
    return DiffesError(f"{path} is damaged, or is not a journal of evaluations ({type(error).__name__}: {reason})")


def digest(evaluation: Evaluation) -> str:
    """Return a hex digest of all that was measured; it reveals a value that was changed since."""
    schedule = evaluation.schedule
    content: list[Any] = [
        schedule.stages.ranges, schedule.max_level, schedule.levels, float(evaluation.fitness),
        float(evaluation.fidelity), int(evaluation.denoiser_calls), float(evaluation.seconds),
    ]  # fmt: skip
    if evaluation.coefficients is not None:  # older journals hold none, and their digests stay what they were
        content.append(evaluation.coefficients)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Cut off the unfinished line that a process killed while writing left behind; leave a foreign file alone.

    Optuna skips such a line when it reads, but then appends to it, and the file cannot be read from there on.

    Raises:
        DiffesError: the file is no journal.
    """
    if not path.exists():
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        unfinished = content[end:]
        if not all(LINE_START.startswith(part[: len(LINE_START)]) for part in (content, unfinished)):
            raise DiffesError(f"{path} is not a journal of evaluations. Choose another file.")
        if unfinished:
            os.truncate(path, end)
    finally:
        lock.release()
