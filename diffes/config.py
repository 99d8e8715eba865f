"""All settings of a run: the options of `diffes search` and the content of a run's `config.json`."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

from diffes.errors import DiffesError, at_least

LARGEST = 10**9
HELDOUT_SEED = 1_000_000_007  # of the held-out probes: the same for every run, so that runs can be compared
Allocation = Literal["damage", "equal"]  # how a level is shared out over the layers
Guidance = float | tuple[float, float]  # one scale, or the two ends of a range
# settings that older versions did not have, with the values that they used
LATER = {"time_limit": None, "threads": None, "asynchronous": False, "study": None}


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run: model, pruning, search and limits. The defaults finish in minutes on two CPU cores."""

    model: str = "fashion-dit"
    """A shipped pipeline by name, a local folder in diffusers' format, or a hub id OWNER/NAME."""
    method: str = "obs"
    """Pruning method. Of heads and channels: magnitude, activation, wanda, obs (makes up for what it removes). Of whole
    blocks: layer_drop. Of an earlier call, whose outputs are taken in place of computing them: deep_reuse (U-Nets),
    block_reuse. Several give the levels of all: obs+deep_reuse. Options follow a colon: obs:damping=0.01,weighting=log
    or layer_drop:importance=mse."""
    allocation: Allocation = "damage"
    """How a level is shared out over the layers. damage: least harm to the prediction in each stage, at no more
    multiply-accumulates than the same fraction of every layer would leave; equal: that same fraction, as in the paper.
    Whole blocks (layer_drop) know the second only."""
    stages: int = 10
    """Number of equal stages that the training timesteps are divided into; each has a level of its own."""
    steps: int = 20
    """Sampling steps with the pipeline's own scheduler."""
    guidance: float | tuple[float, float] = 2.0
    """Classifier-free guidance scale; 1 and less switch it off. Of plans also two, the ends of a range (--guidance 1.5
    4): each probe then has a scale of its own, calibration and samples have the middle, both ends are reported."""
    budget: float = 0.5
    """What every schedule has to meet, in [0, 1]. Of level: the mean sparsity over the steps, the fraction of prunable
    parameters removed. Of macs or latency: the most that it may cost, as a fraction of the dense model."""
    cost: str = "level"
    """What the budget counts: level, as in the paper; macs, multiply-accumulates of the whole denoiser; latency,
    milliseconds measured on this device when the run begins; or one of your own by entry point."""
    metric: str = "ssim"
    """Fitness: latent_mse, latent_cosine, or any pyiqa metric by its name there."""
    strategy: str = "evolution"
    """Search strategy, or one of your own by entry point. Searches: evolution (the paper's), evopress, surrogate, tpe,
    cmaes, optuna:sampler=NAME, nsga2 (the whole front), exhaustive (small spaces). Baselines: uniform, random, mosaic.
    Options follow a colon: evolution:mu=4,lam=16."""
    mutation: str | None = None
    """Mutation operator of evolution, evopress and nsga2: level_switch, level_switch_small, level_step, swap_stages,
    shift_window, segment_transfer, one of DEAP's (deap.mutUniformInt:indpb=0.2, deap.mutShuffleIndexes:indpb=0.2, ...)
    or one of your own. Options follow a colon. Left out: the strategy's own."""
    crossover: str | None = None
    """Crossover operator of evolution and nsga2: level_exchange, one of DEAP's (deap.cxTwoPoint,
    deap.cxUniform:indpb=0.5, ...) or one of your own. Left out: the strategy's own."""
    max_evals: int = 120
    """Schedules to evaluate; one on a fraction of the probes counts as that fraction."""
    max_calls: int | None = None
    """Denoiser calls to spend, in rows. Left out: only max_evals ends the search."""
    time_limit: float | None = None
    """Seconds of evaluation to spend on a search, those of earlier commands on the same folder included. Left out: no
    limit. Any of the three limits may be raised on a finished or interrupted run, which then goes on."""
    probes: int = 16
    """Images per evaluation, from fixed noise and classes or prompts."""
    heldout: int = 64
    """Images of the final comparison, from noise that no search sees."""
    calibration_samples: int = 256
    """Clean latents per stage that calibration draws its statistics from."""
    calibration_data: str | None = None
    """An .npz of images (n, channels, h, w) uint8 and labels (n,) or prompts (n,). Left out: calibration.npz in the
    model's folder if it has one, else samples of the dense model."""
    bank_memory: float = 4.0
    """GB of host memory for the weights that OBS makes as a search asks for them, and for its statistics. What it makes
    them from lies in the run folder until the run is done; without one, what does not fit goes to a temporary file (in
    the folder that TMPDIR names). As much again may stay ready on the device. Results do not depend on it."""
    prompts: str | None = None
    """Text-to-image models: a JSON file with lists of prompts `search`, `heldout` and `calibration`, none in two of
    them. Left out: prompts.json in the model's folder if it has one, else 64 of each that come with diffes."""
    storage: str | None = None
    """URL of a database for the evaluations, for instance postgresql://HOST/NAME. Left out: study.journal in the run
    folder. Both are opened by optuna-dashboard."""
    seed: int = 0
    """Seed of the strategy, of the search probes and of the calibration noise."""
    device: str = "auto"
    """Where the model runs: cpu, cuda or cuda:1; auto takes cuda where there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the model computes in."""
    asynchronous: bool = False
    """With several workers, or a shared study: ask for a schedule as soon as one is free, not in generations
    (evolution, surrogate). Faster where many would wait for a few; what is found then depends on which is faster."""
    study: str | None = None
    """Name of a study in the storage that several processes, on any machines, search together: each with the same
    settings, a run folder of its own, and asynchronous. Left out: the run folder's own, which nobody else may use."""
    threads: int | None = None
    """Threads of torch in each process, on which the last digits of scores depend. Left out: as torch has it here."""

    def __post_init__(self) -> None:
        smallest_of = {
            "stages": 1, "steps": 1, "max_evals": 1, "probes": 1, "heldout": 2, "calibration_samples": 1, "seed": 0,
        }  # fmt: skip
        for name, smallest in smallest_of.items():
            at_least(name, getattr(self, name), smallest, 10**18 if name == "seed" else LARGEST)
        if self.max_calls is not None:
            at_least("max_calls", self.max_calls, 1, 10**18)
        if self.threads is not None:
            at_least("threads", self.threads, 1)
        if self.study is not None and (not self.study or self.storage is None or not self.asynchronous):
            raise DiffesError(
                f"study {self.study!r} is of processes that search together: it needs a name, a storage that all of "
                "them reach, and asynchronous"
            )
        object.__setattr__(self, "guidance", checked_guidance(self.guidance))
        for name in ("budget", "bank_memory", "time_limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int | float) or (value, name) == (None, "time_limit")):
                raise DiffesError(f"{name} must be a number, got {value!r}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise DiffesError(f"time_limit must be above 0 seconds, got {self.time_limit}")
        if self.seed >= LARGEST:
            raise DiffesError(f"seed must be below 10^9, got {self.seed}: held-out probes are drawn from one above")
        if not math.isfinite(self.bank_memory) or self.bank_memory <= 0:
            raise DiffesError(f"bank_memory must be a finite number of GB above 0, got {self.bank_memory}")

    @property
    def scale(self) -> float:
        """Guidance scale of calibration, timing and samples: the given scale, or the middle of a range."""
        return middle(self.guidance)

    @property
    def bank_bytes(self) -> int:
        """`bank_memory` in bytes."""
        return int(self.bank_memory * 1e9)

    def to_json(self) -> dict[str, Any]:
        """Return plain values by field name."""
        plain = dataclasses.asdict(self)
        return plain | {"guidance": list(self.guidance)} if isinstance(self.guidance, tuple) else plain


def checked_guidance(given: Any) -> Guidance:
    """Return a guidance scale, or a range of them as a tuple.

    Raises:
        DiffesError: a scale is not a finite number of at least 0, or a range does not have two rising ends above 1.

    Example:
        >>> checked_guidance([1.5, 4])
        (1.5, 4.0)
    """
    ends = tuple(given) if isinstance(given, list | tuple) else (given,)
    for value in ends:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise DiffesError(f"guidance must be a number, or two, got {given!r}")
        if not math.isfinite(value) or value < 0:
            raise DiffesError(f"guidance must be a finite number of at least 0, got {value}")
    if not isinstance(given, list | tuple):
        return given if isinstance(given, int | float) else float(given)
    if len(ends) != 2 or not 1 < ends[0] < ends[1]:
        raise DiffesError(
            f"a range of guidance has two ends, both above 1 (1 and less switch it off), the lower one first, got "
            f"{' '.join(map(str, ends))}"
        )
    return float(ends[0]), float(ends[1])


def check_one_scale(config: RunConfig) -> None:
    """Raise if schedules of levels are given a range of guidance, over which only plans are fitted."""
    if isinstance(config.guidance, tuple):
        raise DiffesError(
            f"guidance {in_words(config.guidance)} is a range, which plans are fitted over; schedules of levels take "
            "one scale"
        )


def middle(guidance: Guidance) -> float:
    """Return a guidance scale, or the middle of a range."""
    return (guidance[0] + guidance[1]) / 2 if isinstance(guidance, tuple) else guidance


def in_words(guidance: Guidance) -> str:
    """Return a guidance scale, or a range, in words.

    Example:
        >>> in_words((1.5, 4.0))
        '1.5 to 4'
    """
    return f"{guidance[0]:g} to {guidance[1]:g}" if isinstance(guidance, tuple) else f"{guidance:g}"


@dataclass(frozen=True)
class WorkerOptions:
    """Worker settings: how many processes measure, and where. Results do not depend on them."""

    workers: int = 1
    """Processes that measure side by side, on Ray (pip install "diffes[ray]"), each with the model and the bank; 1 is
    this process alone. Of compare and ablate each runs a cell at a time, where they are on this machine. What is found
    and the denoiser calls counted are the same for any number."""
    ray_address: str | None = None
    """Of a Ray cluster that is running: auto, HOST:PORT or ray://HOST:PORT. Left out: one is started on this machine
    and ends with the command."""
    gpus_per_worker: float | None = None
    """Share of a GPU that each worker takes, for instance 0.5. Left out: 1 where the device is cuda."""
    evaluation_timeout: float | None = None
    """Seconds after which a worker that has not finished an evaluation is ended, and the evaluation repeated on
    another; workers then share the evaluations of a cell. Left out: no limit."""

    def __post_init__(self) -> None:
        at_least("workers", self.workers, 1)
        for name, most in (("gpus_per_worker", 64), ("evaluation_timeout", 1e9)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise DiffesError(f"{name} must be above 0 and at most {most:g}, got {value}")
        gpus = self.gpus_per_worker
        if gpus is not None and (gpus < 1e-4 or (gpus > 1 and gpus != int(gpus))):
            raise DiffesError(f"gpus_per_worker must be a share of at least 0.0001, or a whole number, got {gpus}")
        of_many = [name for name in ("ray_address", "gpus_per_worker", "evaluation_timeout") if getattr(self, name)]
        if self.workers == 1 and of_many:
            raise DiffesError(f"{of_many[0]} is of several workers, and workers is 1: raise it, or leave this out")


ALONE = WorkerOptions()
