"""The command line: `diffes search`, `front`, `fit`, `sample`, `export`, `compare`, `ablate`, and what they take."""

from __future__ import annotations

import errno
import re
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diffes.config import COMPARED, FRONT, Guidance, RunConfig, WorkerOptions, parse_variations
from diffes.errors import DiffesError, PluginError
from diffes.registry import GROUPS, check_names

app = tyro.extras.SubcommandApp()


class _Settings(RunConfig):
    """Settings as typed, not checked yet: tyro would frame an error of its own around what a check says."""

    def __post_init__(self) -> None: ...


class _Workers(WorkerOptions):
    """Worker settings as typed, not checked yet."""

    def __post_init__(self) -> None: ...


_DEFAULT, _FRONT, _ALONE = _Settings(), _Settings(**vars(FRONT)), _Workers()
WRITE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EFBIG,
    errno.EIO,
}


@app.command
def search(
    config: Annotated[_Settings, tyro.conf.OmitArgPrefixes] = _DEFAULT,
    workers: Annotated[_Workers, tyro.conf.OmitArgPrefixes] = _ALONE,
    out: Path | None = None,
    overwrite: bool = False,
    log_file: Path | None = None,
) -> None:
    """Find how to sample faster, compare it on held-out probes with what else the same cost buys, write a run folder.

    With no options it searches a plan for the shipped `fashion-dit` in a few minutes on two CPU cores. The same command
    run again on an unfinished folder goes on where it stopped.

    Args:
        config: settings of the run.
        workers: worker settings.
        out: run folder. Left out: runs/ and a name of the model, method, what is searched and the seed.
        overwrite: replace a run that is already there.
        log_file: a text file that takes a line for each evaluation and part, and warnings; it is added to.
    """
    settings, processes = _made(config, workers)
    settings = _checked(settings)
    if settings.genes == "levels":
        out = out or _named(f"{settings.method}-{settings.strategy}-{settings.budget:g}", settings)
        with _terminal(log_file) as terminal:
            terminal.search(settings, out, overwrite, processes)
        return
    out = out or _named(f"{settings.method}-{settings.genes}-{settings.calls:g}-{settings.cost}", settings)
    with _terminal(log_file) as terminal:
        terminal.front(settings, [settings.calls], out, overwrite, workers=processes)


@app.command
def front(
    budgets: list[float] = [3, 4, 5, 6, 8, 10],  # noqa: B006
    config: Annotated[_Settings, tyro.conf.OmitArgPrefixes] = _FRONT,
    workers: Annotated[_Workers, tyro.conf.OmitArgPrefixes] = _ALONE,
    out: Path | None = None,
    overwrite: bool = False,
    log_file: Path | None = None,
) -> None:
    """Find plans, which timesteps to call, at which level each, and how to step between them, at several budgets.

    One calibration serves all budgets. For each, dense calls are evenly spaced, by DPM-Solver++ 2M and by the best of
    diffusers' solvers; their timesteps are searched for 2M; searched with the coefficients fitted inside; and searched
    together with levels. The best few plans of each search are fitted and compared on further probes. All are measured
    on held-out probes, against the dense model at 200 steps of 2M. The same command run again on an unfinished folder
    goes on where it stopped.

    Args:
        budgets: what a plan may cost, in dense denoiser calls, by --cost.
        config: settings; --max-evals is of each search.
        workers: worker settings.
        out: folder. Left out: runs/MODEL-METHOD-front-COST-SEED.
        overwrite: replace a front that is already there.
        log_file: a text file that takes a line for each evaluation and part, and warnings; it is added to.
    """
    settings, processes = _made(config, workers)
    if settings.genes == "levels":
        raise DiffesError("a front is of plans. With --genes levels, run diffes search --strategy nsga2 instead")
    if settings.calls is not None:
        raise DiffesError(f"--calls {settings.calls:g} is one budget. In a front, use --budgets instead")
    settings = _checked(settings)
    out = out or _named(f"{settings.method}-front-{settings.cost}", settings)
    with _terminal(log_file) as terminal:
        terminal.front(settings, budgets, out, overwrite, workers=processes)


def _made(config: _Settings, workers: _Workers) -> tuple[RunConfig, WorkerOptions]:
    """Return the settings that were typed, each part checked by itself."""
    return RunConfig(**vars(config)), WorkerOptions(**vars(workers))


def _checked(config: RunConfig) -> RunConfig:
    """Return the settings, resolved. Refuse unknown names before torch is imported."""
    config = config.resolved()
    check_names(**{name: getattr(config, name) for name in GROUPS})
    return config


def _named(name: str, config: RunConfig, seed: bool = True) -> Path:
    """Where results go that were given no folder."""
    model = config.model.rstrip("/").rsplit("/", 1)[-1]
    whole = f"{model}-{name}" + (f"-s{config.seed}" if seed else "")
    return Path("runs") / re.sub(r"[^A-Za-z0-9_.-]+", "-", whole)


@app.command
def sample(
    run: tyro.conf.Positional[Path],
    classes: list[int] | None = None,
    prompts: list[str] | None = None,
    out: Path = Path("grid.png"),
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    calls: float | None = None,
    device: str = "auto",
    resident: Literal["auto", "all", "stream"] = "auto",
    overwrite: bool = False,
) -> None:
    """Make images with the pruned pipeline of a run.

    Args:
        run: folder that `diffes search`, `diffes front` or `diffes export` wrote.
        classes: class ids, one image each, for class-conditional models. Left out: the model's first eight.
        prompts: texts, one image each, for text-to-image models. Left out: eight that no search saw.
        out: the PNG to write.
        seed: seed of the noise.
        steps: sampling steps; left out, as in the search. Of a schedule any number will do, of a plan only its own.
        guidance: guidance scale; left out, as in the search.
        calls: of a front, what the plan may cost, in dense calls; the best within is taken. Left out: the best of all.
        device: cpu, cuda or cuda:1; auto takes cuda where there is one.
        resident: which pruned layers stay ready on the device: all of them, which is fastest, or none but those in use,
            in the memory of the dense weights (stream); auto keeps what goes into half of the memory that is free.
        overwrite: replace the PNG if it is there.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise DiffesError(f"--out {out} is no file in an existing folder; name a PNG to write")
    if out.exists() and not overwrite:
        raise DiffesError(f"--out {out} exists; pass --overwrite to replace it, or name another file")
    if classes is not None and prompts is not None:
        raise DiffesError("pass --classes or --prompts, whichever the model takes, not both")
    conditions = classes if prompts is None else prompts
    if conditions == [] or not 0 <= seed < 2**32:
        raise DiffesError(f"sample needs at least one condition and a seed in [0, 2^32), got {conditions} and {seed}")
    with _terminal() as terminal:
        terminal.sample(
            run, conditions, out, seed=seed, steps=steps, guidance=guidance, device=device, calls=calls,
            resident=resident,
        )  # fmt: skip


@app.command
def fit(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    calls: float | None = None,
    guidance: Guidance | None = None,
    prompts: Path | None = None,
    model: str | None = None,
    solver: str = "fitted",
    probes: int = 64,
    heldout: int = 64,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Fit the coefficients of a plan again, without a search: for another guidance, your own prompts, another model.

    It takes the timesteps and levels of a plan, samples the dense model at 200 steps on as many images, fits, and
    writes a folder that `sample`, `export` and `diffes.apply` take, with the error before and after on held-out images.

    Args:
        run: folder that `diffes search`, `diffes front`, `diffes export` or `diffes fit` wrote.
        out: folder to write.
        calls: what the plan may cost, in dense calls; the best within is taken. Left out: the best of all.
        guidance: classifier-free guidance scale, or two, the ends of a range: 1.5 4. Left out: as in the run.
        prompts: text-to-image models: a JSON file with lists of prompts `search` and `heldout`. Left out: the model's.
        model: another pipeline of the same kind, by name, folder or hub id. Left out: the run's own. Plans with pruned
            calls need the model that they were found on.
        solver: whose coefficients are fitted, with options after a colon.
        probes: images that are fitted on.
        heldout: images of the report.
        seed: of the noise.
        device: cpu, cuda or cuda:1; auto takes cuda where there is one.
    """
    with _terminal() as terminal:
        terminal.fit(
            run, out, calls=calls, guidance=guidance, prompts=prompts, model=model, solver=solver, probes=probes,
            heldout=heldout, seed=seed, device=device,
        )  # fmt: skip


@app.command
def export(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    calls: float | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a finished run, or a plan of a front, as a folder that stands alone.

    It holds the base model (a local one as a copy, a shipped or hub one by name), the schedule or plan, the bank and a
    card with the measured table; the card of a plan of dense calls also says how diffusers alone runs it.
    `diffes.load(OUT)` opens it in one line on another machine; it can be pushed to a hub.

    Args:
        run: folder that `diffes search` or `diffes front` wrote.
        out: folder to write.
        calls: of a front, what the plan may cost, in dense calls; the best within is taken. Left out: the best of all.
        dtype: of the compensated weights in the bank. Left out: as in the run.
        overwrite: replace an earlier export.
    """
    with _terminal() as terminal:
        terminal.export(run, out, calls=calls, dtype=dtype, overwrite=overwrite)


@app.command
def compare(
    strategies: list[str] | None = None,
    seeds: int = 5,
    config: Annotated[_Settings, tyro.conf.OmitArgPrefixes] = _DEFAULT,
    workers: Annotated[_Workers, tyro.conf.OmitArgPrefixes] = _ALONE,
    out: Path | None = None,
    log_file: Path | None = None,
) -> None:
    """Compare strategies at an equal number of denoiser calls, over several seeds, on held-out probes.

    Writes a table with a paired test, CSV, JSON, best-so-far curves with quartile bands. The same command run again
    goes on where it stopped; with more seeds or strategies it adds them.

    Args:
        strategies: names, with options after a colon; the first is what the others are tested against. Left out:
            evopress, evolution, surrogate, tpe and random; for schedules (--genes levels) evolution first, and uniform.
        seeds: searches of each, from --seed on; each draws its own probes.
        config: settings of all runs. All spend --max-calls denoiser calls, or if that is left out what --max-evals
            whole evaluations cost.
        workers: worker settings.
        out: folder of the results. Left out: runs/MODEL-METHOD-compare-BUDGET.
        log_file: a text file that takes a line for each evaluation and part, and warnings; it is added to.
    """
    settings, processes = _made(config, workers)
    if settings.strategy != "auto":
        raise DiffesError(f"--strategy {settings.strategy} is one strategy. In a comparison, use --strategies instead")
    _checked(settings)
    names = COMPARED[settings.kind] if strategies is None else strategies
    for name in names:
        check_names(strategy=name)
    out = out or _named(f"{settings.method}-compare-{_budget(settings)}", settings, seed=False)
    with _terminal(log_file) as terminal:
        terminal.experiment(settings, {"strategy": names}, seeds, out, processes)


def _budget(config: RunConfig) -> str:
    """Return the budget for the name of a folder."""
    config = config.resolved()
    return f"{config.budget:g}" if config.genes == "levels" else f"{config.genes}-{config.calls or 0:g}"


@app.command
def ablate(
    vary: tyro.conf.Positional[list[str]],
    seeds: int = 3,
    config: Annotated[_Settings, tyro.conf.OmitArgPrefixes] = _DEFAULT,
    workers: Annotated[_Workers, tyro.conf.OmitArgPrefixes] = _ALONE,
    out: Path | None = None,
    log_file: Path | None = None,
) -> None:
    """Vary any settings and measure every combination over several seeds, on held-out probes.

    For instance: diffes ablate calls=4,6,8 solver=fitted,dpmsolver++
    Or: diffes ablate stages=2,5,10,20 metric=ssim,latent_mse --genes levels --budget 0.6

    With --genes levels the budget counts MACs here unless --cost says otherwise. Where combinations find schedules that
    differ by more than 0.5 % in cost, because levels cannot express the budget in all of them, each is searched again
    at a higher budget, and compared at the budget itself by interpolation. The table says so. A cell that fails does
    not stop the others.

    Args:
        vary: option=value,value,... for any option of `diffes search`. A value with a colon is taken whole; repeat the
            option for more.
        seeds: searches of each combination, from --seed on; each draws its own probes.
        config: all other settings. Each search spends --max-calls denoiser calls, or if that is left out what
            --max-evals whole evaluations cost with these settings.
        workers: worker settings.
        out: folder of the results. Left out: runs/MODEL-ablate-OPTIONS.
        log_file: a text file that takes a line for each evaluation and part, and warnings; it is added to.
    """
    settings, processes = _made(config, workers)
    if settings.genes == "levels" and settings.cost == "auto":  # levels cost something else with another method
        settings = replace(settings, cost="macs", budget=0.7 if settings.budget is None else settings.budget)
    _checked(settings)
    varied = parse_variations(vary)
    for name, values in varied.items():  # unknown names, before torch is imported
        for value in values if name in GROUPS else ():
            check_names(**{name: value})
    with _terminal(log_file) as terminal:
        out = out or _named(f"ablate-{'-'.join(varied)}", settings, seed=False)
        terminal.experiment(settings, varied, seeds, out, processes)


def _terminal(log_file: Path | None = None) -> AbstractContextManager[Any]:
    """What runs and shows commands, imported late: torch takes seconds, and `--help` needs none of it."""
    from diffes import terminal

    return terminal.session(log_file)


def main(args: list[str] | None = None) -> None:
    """Entry point of the `diffes` command. Exit status: 0 done, 2 bad input, 130 interrupted."""
    try:
        app.cli(
            prog="diffes",
            description="Faster diffusion models without retraining: search, then sample.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except PluginError as error:
        _fail(f"{error}; what is finished is kept: mend it and run the same command again\n\n{error.trace}".rstrip())
    except DiffesError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"a path is too long ({error}); name a shorter one")
        if error.errno is not None and error.errno not in WRITE_ERRORS:
            raise
        _fail(
            f"cannot write ({error}); what is finished is kept: run the same command again once there is room or access"
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"diffes: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
