"""Every paid evaluation, kept in one Optuna journal: the memory that makes resuming a search a replay of it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from diffes.errors import DiffesError
from diffes.schedule import Schedule, StagePlan
from diffes.strategy import Evaluation

STUDY_NAME = "diffes"
LOCK_GRACE_SECONDS = 3  # a write takes milliseconds; a lock older than this was left by a process that was killed
LINE_START = b'{"op_code":'


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna's log to warnings for as long as the block runs."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class EvaluationStore:
    """Evaluations of one set of stages, on disk as an Optuna journal with one study.

    `optuna-dashboard` and `optuna.visualization` open the file: a trial has a parameter `level_00..` per stage, the
    fitness as its value, and `denoiser_calls` and `seconds` as user attributes. A failed evaluation (-inf) is a trial
    in state FAIL with the user attribute `failed`. The store knows schedules and nothing else: what they were measured
    with (model, probes, metric) has to be the same for all evaluations of a file.

    Args:
        path: the journal; made, with its folder, when there is none.
        plan: the stages of every schedule in it.
        max_level: H of every schedule in it.

    Raises:
        DiffesError: the file is no journal of this library, or one of other stages or of another max_level.
    """

    def __init__(self, path: str | os.PathLike[str], plan: StagePlan, max_level: int) -> None:
        self.path = Path(path)
        self.plan = plan
        self.max_level = max_level
        self._distributions: dict[str, BaseDistribution] = {
            f"level_{s:02d}": IntDistribution(0, max_level) for s in range(len(plan))
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(self.path), grace_period=LOCK_GRACE_SECONDS)
        _mend(self.path, lock)
        try:
            with quiet_optuna():
                storage = JournalStorage(JournalFileBackend(str(self.path), lock_obj=lock))
                self._study = optuna.create_study(
                    storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DiffesError(f"{self.path} is no journal of evaluations: {type(error).__name__} {error}") from error
        self._check_kind()
        self._memo: dict[Schedule, Evaluation] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if "denoiser_calls" in trial.user_attrs:
                try:
                    evaluation = self._to_evaluation(trial)
                except (KeyError, TypeError, ValueError) as error:
                    raise DiffesError(f"{self.path} is damaged: a trial lacks {error}; choose another file") from error
                self._memo.setdefault(evaluation.schedule, evaluation)

    def __len__(self) -> int:
        return len(self._memo)

    def get(self, schedule: Schedule) -> Evaluation | None:
        """What was measured for a schedule, None when it never was."""
        return self._memo.get(schedule)

    def evaluations(self) -> list[Evaluation]:
        """All evaluations in the order in which they were added."""
        return list(self._memo.values())

    def add(self, evaluation: Evaluation) -> None:
        """Writes an evaluation through to the disk; one of a schedule that is known already changes nothing.

        Raises:
            DiffesError: the schedule has other stages or another max_level than the store, or its fitness is NaN.
        """
        schedule = evaluation.schedule
        if (schedule.plan, schedule.max_level) != (self.plan, self.max_level):
            raise DiffesError(
                f"{self.path} holds schedules of {len(self.plan)} stages and max_level {self.max_level}, got one of "
                f"{len(schedule.plan)} stages (edges {list(schedule.plan.stages)}) and max_level {schedule.max_level}"
            )
        if math.isnan(evaluation.fitness):
            raise DiffesError(f"fitness must not be NaN, got NaN for levels {list(schedule.levels)}")
        if schedule in self._memo:
            return
        self._study.add_trial(self._to_trial(evaluation))
        self._memo[schedule] = evaluation

    def _check_kind(self) -> None:
        """Marks a new study with its stages and max_level; compares those of an old one."""
        ours = {"stages": [list(stage) for stage in self.plan.stages], "max_level": self.max_level}
        theirs = {key: self._study.user_attrs.get(key) for key in ours}
        for key, value in ours.items():
            if theirs[key] is None and not self._study.get_trials(deepcopy=False):
                self._study.set_user_attr(key, value)
            elif theirs[key] != value:
                raise DiffesError(
                    f"{self.path} holds evaluations of {key} {theirs[key]}, this search has {value}; "
                    "choose another file or the settings of the first run"
                )

    def _to_trial(self, evaluation: Evaluation) -> FrozenTrial:
        failed = evaluation.fitness == -math.inf
        attributes = {"denoiser_calls": int(evaluation.denoiser_calls), "seconds": float(evaluation.seconds)}
        return create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            value=None if failed else float(evaluation.fitness),
            params=dict(zip(self._distributions, evaluation.schedule.levels, strict=True)),
            distributions=self._distributions,
            user_attrs=attributes | ({"failed": True} if failed else {}),
        )

    def _to_evaluation(self, trial: FrozenTrial) -> Evaluation:
        levels = tuple(int(trial.params[name]) for name in self._distributions)
        return Evaluation(
            schedule=Schedule(self.plan, levels, self.max_level),
            fitness=-math.inf if trial.value is None else trial.value,
            denoiser_calls=trial.user_attrs["denoiser_calls"],
            seconds=trial.user_attrs["seconds"],
        )


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Cuts off the unfinished line that a process killed while writing left behind; a foreign file is left alone.

    Optuna skips such a line when it reads, but then appends to it, and from there on the file cannot be read at all.
    """
    if not path.exists():
        return
    lock.acquire()
    try:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        unfinished = content[end:]
        if not all(LINE_START.startswith(part[: len(LINE_START)]) for part in (content, unfinished)):
            raise DiffesError(f"{path} is no journal of evaluations; choose another file")
        if unfinished:
            os.truncate(path, end)
    finally:
        lock.release()
