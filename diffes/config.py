"""All settings of a run: the options of `diffes search` and the content of a run's `config.json`."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffes.errors import DiffesError, at_least, unknown_name

LARGEST = 10**9
MOST_CALLS = 1000
HELDOUT_SEED = 1_000_000_007  # of the held-out probes: the same for every run, so that runs can be compared
Allocation = Literal["sensitivity", "equal", "damage"]  # how a level is shared out; "damage" is its older name
Guidance = float | tuple[float, float]  # one scale, or the two ends of a range
# settings that older versions did not have, with the values that they used
LATER: dict[str, Any] = {
    "time_limit": None, "threads": None, "asynchronous": False, "study": None,
    "genes": "levels", "calls": None, "solver": None, "nodes": None, "fit_probes": None, "reference_steps": None,
    "call": None,
}  # fmt: skip
KINDS = {"levels": "levels", "steps": "plans", "joint": "plans"}  # kinds of what is searched
OF_PROBLEMS = {
    "budget": "levels", "calls": "plans", "solver": "plans", "nodes": "plans", "fit_probes": "plans",
    "reference_steps": "plans",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {"budget": 0.5, "calls": 6.0, "solver": "fitted", "nodes": 64, "fit_probes": 48}
LARGE = 300_000_000  # parameters of a denoiser from which on a pipeline object gets the settings below
OF_LARGE = {"probes": 8, "fit_probes": 16, "heldout": 16, "reference_steps": 50, "max_evals": 60}
AUTO = {  # what "auto" stands for
    "levels": {"cost": "level", "metric": "ssim", "strategy": "evolution"},
    "plans": {"cost": "macs", "metric": "latent_mse", "strategy": "evopress"},
}


@dataclass(frozen=True)
class ModelSettings:
    """Settings of the model: all that its dense images depend on, besides their noise and conditions."""

    model: str = "fashion-dit"
    """A shipped pipeline by name, a local folder in diffusers' format, or a hub id OWNER/NAME."""
    prompts: str | None = None
    """JSON file of a text-to-image model with lists of prompts `search`, `heldout` and `calibration`, none in two of
    them. Left out: prompts.json in the model's folder if it has one, else 64 of each that come with diffes."""
    call: str | None = None
    """JSON file with further arguments of the pipeline's call, for instance {"height": 512, "prompt": ["a fox", "a
    hen"]}. Every second prompt is held out. Left out: call.json in the model's folder if it has one."""
    guidance: float | tuple[float, float] = 2.0
    """Classifier-free guidance scale; 1 and less switch it off. Plans also take two, the ends of a range: --guidance
    1.5 4 gives each probe a scale of its own, calibrates and samples at the middle, and reports both ends."""
    steps: int = 20
    """Sampling steps with the pipeline's own scheduler: of schedules of levels, of the samples that calibrate, and of
    the kind `levels` beside plans."""
    device: str = "auto"
    """Device of the model: cpu, cuda or cuda:1. auto takes cuda if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type of the model's computations."""

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1, LARGEST)
        object.__setattr__(self, "guidance", checked_guidance(self.guidance))

    @property
    def scale(self) -> float:
        """Guidance scale of calibration, timing and samples: the given scale, or the middle of a range."""
        return middle(self.guidance)


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of the pruned weights. Beside them, weights depend on the model's, and on the seed of a run."""

    method: str = "obs"
    """Pruning method. It removes heads and channels (magnitude, activation, wanda; obs also corrects the weights that
    stay), or whole blocks (layer_drop), or it reuses outputs of an earlier call (deep_reuse for U-Nets, block_reuse).
    A sum has the levels of all: obs+deep_reuse. Options follow a colon: obs:damping=0.01,weighting=log."""
    allocation: Allocation = "sensitivity"
    """Split of a level over the layers. sensitivity: each stage removes what its prediction is least sensitive
    to, for at most the multiply-accumulates that equal shares leave. equal: the same fraction of every layer, as in
    the paper. layer_drop takes equal only."""
    stages: int = 10
    """Number of equal stages that the training timesteps are divided into. Each stage has its own pruned weights."""
    calibration_samples: int = 256
    """Clean latents for each stage, from which calibration takes its statistics."""
    calibration_data: str | None = None
    """NPZ file of images (n, channels, h, w) uint8, and labels (n,) or prompts (n,). Left out: calibration.npz in the
    model's folder if it has one, else samples of the dense model."""

    def __post_init__(self) -> None:
        at_least("stages", self.stages, 1, LARGEST)
        if self.allocation == "damage":
            object.__setattr__(self, "allocation", "sensitivity")
        at_least("calibration_samples", self.calibration_samples, 1, LARGEST)


@dataclass(frozen=True)
class ProblemSettings:
    """Settings of what is searched, under which budget, and how it is measured."""

    genes: str = "joint"
    """Problem to search. joint: plans, which timesteps call the denoiser and how much is pruned at each. steps: plans
    of dense calls, which timesteps only. levels: the paper's schedules, a level for each stage at the pipeline's own
    steps. Or a problem of your own by entry point."""
    calls: float | None = None
    """Budget of plans: the most that one may cost, in dense denoiser calls, by --cost. Left out: 6."""
    budget: float | None = None
    """Budget of schedules (--genes levels), in [0, 1]. With --cost level: the mean sparsity over the steps that every
    schedule has to reach, the fraction of prunable parameters removed. With macs or latency: the most that a schedule
    may cost, as a fraction of the dense model. Left out: 0.5."""
    cost: str = "auto"
    """Currency of the budget: macs, multiply-accumulates of the whole denoiser; latency, milliseconds measured on
    this device when the run begins; level, the mean level as in the paper (schedules only); or one of your own by
    entry point. auto: macs for plans, level for schedules."""
    metric: str = "auto"
    """Fitness: latent_mse, latent_cosine, or any pyiqa metric by its name there. auto: latent_mse for plans, ssim for
    schedules."""
    solver: str | None = None
    """Solver of plans: fitted (coefficients by least squares to the reference, found with the timesteps), dpmsolver++
    (second order), dpmsolver++3m, unipc, ddim (first order, no noise) or one of your own by entry point. Options
    follow a colon: fitted:memory=2. Left out: fitted."""
    nodes: int | None = None
    """Candidate timesteps of plans. Left out: 64."""
    probes: int = 16
    """Images of an evaluation, from fixed noise and classes or prompts."""
    fit_probes: int | None = None
    """Images on which the best few plans of a search are fitted and compared again, unseen by it. Left out: 48."""
    heldout: int = 64
    """Images of the final comparison, from noise that no search sees."""
    reference_steps: int | None = None
    """Steps of the dense model that plans are compared with and fitted to, by DPM-Solver++ 2M. Left out: 200."""

    def __post_init__(self) -> None:
        for name, smallest in {"probes": 1, "heldout": 2, "nodes": 2, "fit_probes": 1, "reference_steps": 1}.items():
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), smallest, LARGEST)
        for name in ("budget", "calls"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                raise DiffesError(f"{name} must be a number, got {value!r}")
        if self.calls is not None and not 1 <= self.calls <= MOST_CALLS:
            raise DiffesError(
                f"calls must be at least 1, which is what a dense call costs, and at most {MOST_CALLS}, got "
                f"{self.calls:g}"
            )
        kind = KINDS.get(self.genes)
        for name, of in OF_PROBLEMS.items() if kind else ():
            if getattr(self, name) is not None and of != kind:
                raise DiffesError(_refused(name, getattr(self, name), self.genes))
        if kind == "plans" and self.cost == "level":
            raise DiffesError(
                "--cost level is for --genes levels. A plan needs a cost of single calls: take macs or latency"
            )


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search. The seed also draws the probes of the search and the noise that calibrates."""

    strategy: str = "auto"
    """Search strategy, or one of your own by entry point. Searches: evolution (the paper's), evopress, surrogate,
    tpe, cmaes, optuna:sampler=NAME, nsga2 (the whole front), exhaustive (small spaces). Baselines: uniform, random,
    mosaic. Options follow a colon: evolution:mu=4,lam=16. auto: evopress for plans, evolution for schedules."""
    mutation: str | None = None
    """Mutation operator of evolution, evopress and nsga2. Of plans: plan_move, move_call, add_call, ... Of schedules:
    level_switch, level_step, swap_stages, shift_window, segment_transfer. Also DEAP's (deap.mutUniformInt:indpb=0.2)
    and your own. Options follow a colon. Left out: the default of the strategy."""
    crossover: str | None = None
    """Crossover operator of evolution and nsga2: node_exchange of plans, level_exchange of schedules, one of DEAP's
    (deap.cxTwoPoint, deap.cxUniform:indpb=0.5) or your own. Left out: the default of the strategy."""
    max_evals: int = 120
    """Plans or schedules to evaluate; one on a fraction of the probes counts as that fraction."""
    max_calls: int | None = None
    """Denoiser calls to spend, in rows. Left out: only max_evals ends the search."""
    time_limit: float | None = None
    """Seconds of evaluation to spend, those of earlier commands on the same folder included. Left out: no limit. Each
    of the three limits may be raised on a finished or interrupted run, which then continues."""
    asynchronous: bool = False
    """Ask for the next genome as soon as a worker is free, not in generations (evolution, surrogate; with several
    workers or a shared study). This is faster where many would wait for a few. The result then depends on which is
    faster."""
    study: str | None = None
    """Name of a study in the storage that several processes search together, on any machines. Each needs the same
    settings, a run folder of its own, and asynchronous. Left out: the run folder's own study."""
    seed: int = 0
    """Seed of the strategy, of the search probes and of the calibration noise."""

    def __post_init__(self) -> None:
        at_least("max_evals", self.max_evals, 1, LARGEST)
        at_least("seed", self.seed, 0, 10**18)
        if self.max_calls is not None:
            at_least("max_calls", self.max_calls, 1, 10**18)
        limit = self.time_limit
        if isinstance(limit, bool) or not (limit is None or isinstance(limit, int | float)):
            raise DiffesError(f"time_limit must be a number, got {limit!r}")
        if limit is not None and not limit > 0:
            raise DiffesError(f"time_limit must be above 0 seconds, got {limit}")
        if self.seed >= LARGEST:
            raise DiffesError(f"seed must be below 10^9, got {self.seed}: held-out probes are drawn from one above")


@dataclass(frozen=True)
class ResourceSettings:
    """Settings of the machine. Only the last digits of results depend on them."""

    bank_memory: float = 4.0
    """GB of host memory for the weights that OBS makes during a search, and for its statistics. What does not fit
    goes to the run folder, or to a temporary file (in the folder that TMPDIR names). The device may keep as much
    again. Results do not depend on it."""
    storage: str | None = None
    """URL of a database for the evaluations of schedules, for instance postgresql://HOST/NAME. Left out:
    study.journal in the run folder. optuna-dashboard opens both."""
    threads: int | None = None
    """Threads of torch in each process; the last digits of scores depend on it. Left out: chosen once from the cores
    that are free, kept for the run, and used again when it continues."""

    def __post_init__(self) -> None:
        if self.threads is not None:
            at_least("threads", self.threads, 1)
        memory = self.bank_memory
        if isinstance(memory, bool) or not isinstance(memory, int | float):
            raise DiffesError(f"bank_memory must be a number, got {memory!r}")
        if not math.isfinite(memory) or memory <= 0:
            raise DiffesError(f"bank_memory must be a finite number of GB above 0, got {memory}")

    @property
    def bank_bytes(self) -> int:
        """`bank_memory` in bytes."""
        return int(self.bank_memory * 1e9)


# names are of one part only, so that a flat `--option` and a flat `config.json` name each setting
PARTS = (ModelSettings, CalibrationSettings, ProblemSettings, SearchSettings, ResourceSettings)


@dataclass(frozen=True)
class RunConfig(ResourceSettings, SearchSettings, ProblemSettings, CalibrationSettings, ModelSettings):
    """Settings of a run, in five parts. The defaults finish in minutes on two CPU cores.

    What depends on which part: dense references on `ModelSettings`; the bank on that and `CalibrationSettings`, and on
    `seed`; costs of calls on these and on `cost`, a timed cost on `probes` too; a cell of a comparison on all but
    `ResourceSettings`.

    Example:
        >>> config = RunConfig(genes="levels", budget=0.3).resolved()
        >>> config.metric, config.strategy, config.cost
        ('ssim', 'evolution', 'level')
    """

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            _check_type(name, getattr(self, name), hint)
        for part in PARTS:
            part.__post_init__(self)
        if self.study is not None and (not self.study or self.storage is None or not self.asynchronous):
            raise DiffesError(
                f"study {self.study!r} is of processes that search together: it needs a name, a storage that all of "
                "them reach, and asynchronous"
            )

    @property
    def kind(self) -> str:
        """Kind of what is searched: "levels", or "plans", which also sets the defaults for problems of one's own."""
        return KINDS.get(self.genes, "plans")

    def resolved(self) -> RunConfig:
        """Return the settings with a value for everything that depends on what is searched and was left out.

        Settings that do not apply stay None.
        """
        kind = self.kind
        automatic: dict[str, Any] = {name: value for name, value in AUTO[kind].items() if getattr(self, name) == "auto"}
        left_out = {
            name: value for name, value in DEFAULTS.items() if OF_PROBLEMS[name] == kind and getattr(self, name) is None
        }
        return dataclasses.replace(self, **automatic, **left_out)

    def to_json(self) -> dict[str, Any]:
        """Return plain values by field name."""
        plain = dataclasses.asdict(self)
        return plain | {"guidance": list(self.guidance)} if isinstance(self.guidance, tuple) else plain


@functools.cache
def _hints() -> dict[str, Any]:
    """Return the types of all settings, by name."""
    return get_type_hints(RunConfig)


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Check a setting that is a text, or one of a few; numbers are checked by their part."""
    if get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise DiffesError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
    elif hint in (str, str | None) and not isinstance(value, str) and not (value is None and hint == str | None):
        raise DiffesError(f"{name} must be a text, got {value!r}")


def settings_of(settings: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of some settings by name.

    Raises:
        DiffesError: there is no such setting, or a value is out of its range.

    Example:
        >>> settings_of({"genes": "steps", "calls": 4}).calls
        4
    """
    known = {field.name for field in dataclasses.fields(RunConfig)}
    if unknown := sorted(set(settings) - known):
        raise unknown_name("setting", unknown[0], known)
    return RunConfig(**settings)


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """Return settings with other values. If another kind of thing is searched then, its own settings are left out.

    Resolved settings do not tell which of cost, metric and strategy were given, so these follow the kind. Of others,
    those that were given stay.

    Example:
        >>> changed(RunConfig(genes="levels", budget=0.3).resolved(), genes="steps").budget is None
        True
    """
    genes = changes.get("genes", config.genes)
    if KINDS.get(genes, "plans") != config.kind:
        unset: dict[str, Any] = dict.fromkeys(OF_PROBLEMS)
        if config == config.resolved():
            unset |= dict.fromkeys(AUTO["plans"], "auto")
        changes = unset | changes
    return dataclasses.replace(config, **changes)


def names_of(*parts: type) -> set[str]:
    """Return the names of the settings of some parts.

    Example:
        >>> sorted(names_of(ResourceSettings))
        ['bank_memory', 'storage', 'threads']
    """
    return {field.name for part in parts for field in dataclasses.fields(part)}


def _refused(name: str, value: object, genes: str) -> str:
    """Return the message for a setting that does not apply to what is searched."""
    option = f"--{name.replace('_', '-')}"
    if name in ("calls", "budget"):
        what, other = ("plans", "budget") if name == "calls" else ("schedules", "calls")
        return f"{option} {value:g} sets the budget of {what}. With --genes {genes}, use --{other} instead"
    return f"{option} {value} is for plans. With --genes {genes}, leave it out"


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


def parse_variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse the settings that `diffes ablate` varies.

    Args:
        texts: `option=value,value,...`; an option may come again. A value with a colon has options of its own and is
            not split at commas: `method=obs:damping=0.1,weighting=log`.

    Returns:
        Values by the name of the setting, in the order given.

    Raises:
        DiffesError: there is no such setting, or a value is not of its type.

    Example:
        >>> parse_variations(["calls=4,6", "solver=fitted:memory=2"])
        {'calls': [4.0, 6.0], 'solver': ['fitted:memory=2']}
    """
    hints = _hints()
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not values:
            raise DiffesError(f"{text!r} varies nothing; write option=value,value, for instance stages=2,5,10")
        if name not in hints or name == "seed":
            raise unknown_name("option to vary", name, set(hints) - {"seed"})
        parts = [values] if ":" in values else values.split(",")
        found.setdefault(name, []).extend(_converted(name, part, hints[name]) for part in parts)
    if not found:
        raise DiffesError(
            "nothing to vary: write option=value,value, for instance stages=2,5,10 metric=ssim,latent_mse"
        )
    return found


def _converted(name: str, text: str, hint: Any) -> Any:
    types = [t for t in get_args(hint) if t is not type(None)] if isinstance(hint, UnionType) else [hint]
    choices = get_args(types[0])
    if choices and text not in choices:
        raise DiffesError(f"{name} must be one of {', '.join(map(str, choices))}, got {text!r}")
    if types[0] is bool:
        choices = ("true", "false")
        if text.lower() not in choices:
            raise DiffesError(f"{name} must be one of {', '.join(choices)}, got {text!r}")
        return text.lower() == "true"
    try:
        return text if choices else types[0](text)
    except ValueError as error:
        raise DiffesError(f"{name} must be a {types[0].__name__}, got {text!r}") from error


@dataclass(frozen=True)
class WorkerOptions:
    """Worker settings: how many processes measure, and where. Results do not depend on them."""

    workers: int = 1
    """Processes that measure in parallel on Ray (pip install "diffes[ray]"), each with the model and the bank. 1 is
    this process alone. In compare and ablate each runs a cell at a time, if all are on this machine. The result and
    the counted denoiser calls are the same for any number."""
    ray_address: str | None = None
    """Address of a running Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Left out: one is started on this machine
    and ends with the command."""
    gpus_per_worker: float | None = None
    """Share of a GPU that each worker takes, for instance 0.5. Left out: 1 if the device is cuda."""
    evaluation_timeout: float | None = None
    """Seconds until a worker that has not finished an evaluation is ended; another then repeats the evaluation.
    Workers then share the evaluations of a cell. Left out: no limit."""

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
FRONT = RunConfig(max_evals=80, probes=32)  # of a front: fewer evaluations a budget, each on more probes
COMPARED = {  # strategies that `compare` takes when none are named
    "plans": ["evopress", "evolution", "surrogate", "tpe", "random"],
    "levels": ["evolution", "evopress", "surrogate", "tpe", "random", "uniform"],
}
