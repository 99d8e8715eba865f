"""A fit without a search: of timesteps typed by hand, of a front, for another guidance, prompts and model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Counting, images, open_pipe, plan_config, small_config
from diffusers import DDIMScheduler, DiTPipeline, UniPCMultistepScheduler

import diffes
from diffes.adapters import adapter_for, load_pipeline
from diffes.cli import main
from diffes.errors import DiffesError
from diffes.figures.tables import verdicts
from diffes.results.artifact import chosen, read_front
from diffes.solvers import SOLVERS, Solver
from diffes.solvers.offtheshelf import spaced
from diffes.spaces.schedule import Plan
from diffes.study.export import export
from diffes.study.front import complete_front
from diffes.study.grid import run_experiment
from diffes.study.run import complete_run

SMALL: dict[str, Any] = {"probes": 3, "heldout": 3, "reference_steps": 20}


@pytest.fixture(scope="module")
def front(tiny_sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the untrained SDXL, at a budget that levels can be paid from."""
    out = tmp_path_factory.mktemp("fronts") / "sdxl"
    config = plan_config(tiny_sdxl_folder, method="obs", fit_probes=2, probes=2, heldout=2, max_evals=4)
    complete_front(config, [3.0], out, Counting())
    return out


def test_timesteps_typed_by_hand_are_fitted_and_run(tiny_folder: Path) -> None:
    pipe = open_pipe(tiny_folder)
    own, dense = pipe.scheduler, images(pipe, steps=3)
    found = diffes.fit(pipe, [999, 620, 180], guidance=2.0, **SMALL, progress=Counting())
    assert (found.after.latent_mse or 1) < (found.before.latent_mse or 0)
    assert found.plan.timesteps == (999, 620, 180) and found.plan.coefficients is not None
    assert found.after.coefficients == [list(row) for row in found.plan.coefficients]
    assert pipe.scheduler is own
    again = diffes.fit(pipe, [999, 620, 180], guidance=2.0, **SMALL, progress=Counting())
    assert again.plan == found.plan
    diffes.apply(pipe, found.plan)
    made = images(pipe, steps=3)
    assert not np.array_equal(made, dense)
    diffes.remove(pipe)
    assert np.array_equal(images(pipe, steps=3), dense)


@pytest.mark.slow
def test_a_plan_of_a_front_is_fitted_for_another_guidance_and_prompts(
    front: Path, tiny_sdxl_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "mine.json"
    prompts.write_text(json.dumps({"search": ["a b", "c"], "heldout": ["d e"]}))
    out = tmp_path / "fitted"
    arguments = ["--guidance=5", f"--prompts={prompts}", "--probes=3", "--heldout=3"]
    main(["fit", str(front), str(out), *arguments])
    before, after = read_front(out).points
    assert before.kind == "as given" and (after.fit_mean or -1) >= (before.fit_mean or 0)
    assert read_front(out).guidance == 5.0
    old, _ = chosen(front, None)
    new, _ = chosen(out, None)
    assert isinstance(old, Plan) and isinstance(new, Plan)
    assert (new.timesteps, new.levels) == (old.timesteps, old.levels) and new.coefficients != old.coefficients
    pipe = diffes.apply(load_pipeline(str(tiny_sdxl_folder)), out)
    assert np.isfinite(images(pipe, steps=len(new.calls), guidance=5.0)).all()
    main(["export", str(out), str(tmp_path / "exported")])


@pytest.mark.slow
def test_guidance_far_from_what_a_plan_was_made_for_is_said_once(front: Path, tiny_sdxl_folder: Path) -> None:
    pipe = diffes.apply(load_pipeline(str(tiny_sdxl_folder)), front)  # made at 2
    n = len(pipe.scheduler.plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images(pipe, steps=n, guidance=2.0)
        images(pipe, steps=n, guidance=3.5)
    with pytest.warns(UserWarning, match=r"made for guidance 2, and the pipeline is called with 7.*--guidance 7"):
        images(pipe, steps=n, guidance=7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images(pipe, steps=n, guidance=7.0)


def test_another_model_is_fitted_to_where_all_calls_are_dense(tiny_folder: Path, tmp_path: Path) -> None:
    """As a fine-tuned checkpoint is: what was made for the first is refused until it is fitted to the second."""
    first, second = open_pipe(tiny_folder), open_pipe(tiny_folder)
    with torch.no_grad():
        for parameter in second.transformer.parameters():
            parameter.mul_(1.1)
    diffes.fit(first, [999, 500], guidance=2.0, **SMALL, out=tmp_path / "one", progress=Counting())
    with pytest.raises(DiffesError, match=r"made for another model.*diffes fit"):
        diffes.apply(second, tmp_path / "one")
    found = diffes.fit(second, tmp_path / "one", **SMALL, out=tmp_path / "two", progress=Counting())
    assert (found.after.fit_mean or -1) > (found.before.fit_mean or 0)
    diffes.apply(second, tmp_path / "two")
    assert np.isfinite(images(second, steps=2)).all()


def test_bad_input_is_refused_before_anything_is_computed(
    front: Path, run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    pipe = open_pipe(tiny_folder)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("ten years")
    plan = Plan(*[getattr(chosen(front, None)[0], name) for name in ("stages", "calls", "max_level", "solver")])
    pruned = Plan(plan.stages, ((999, 1),), plan.max_level, "fitted")
    for given, options, said in (
        ([999, 500], {"solver": "ddim"}, "'ddim' has no coefficients to fit"),
        ([999, 500], {"solver": "heun"}, "unknown solver of plans 'heun'"),
        ([999, 500], {"probes": 0}, "probes must be at least 1, got 0"),
        ([999, 500], {"guidance": float("nan")}, "guidance must be a finite number"),
        ([999, 500], {"out": full}, "is not an empty folder"),
        ([500, 999], {}, "each timestep of a plan must be below"),
        ([], {}, "needs one or more timesteps"),
        ([1000], {}, "needs one or more timesteps"),
        ([999.9, 500.2], {}, "must be whole numbers"),
        (["a"], {}, "must be whole numbers"),
        (None, {}, "a plan is a folder, a Plan, or the timesteps"),
        ([999, 500], {"calls": 2.0}, "calls=2.0 chooses a plan of a folder"),
        ([999, 500], {"reference_steps": 0}, "reference_steps must be at least 1"),
        ([999, 500], {"out": full / "thesis.txt"}, "cannot write to"),
        ([999, 500], {"out": "/proc/x/y"}, "cannot write to"),
        (pruned, {}, "pruned calls needs its bank"),
        (run, {}, "holds a schedule of levels"),
    ):
        with pytest.raises(DiffesError, match=said):
            diffes.fit(pipe, given, progress=Failing(), **options)  # type: ignore[arg-type]
    with pytest.raises(DiffesError, match="needs pruned weights"):
        diffes.apply(pipe, pruned)
    with pytest.raises(DiffesError, match=r"no coefficients, .* Fit them with `diffes fit"):
        diffes.apply(pipe, Plan(pruned.stages, ((999, 0),), 4, "fitted"))
    with pytest.raises(DiffesError, match="Leave calls out"):
        diffes.apply(pipe, Plan(pruned.stages, ((999, 0),), 4, "ddim"), calls=3)


class Failing(Counting):
    """Progress that no task should begin."""

    def task(self, title: str, total: int) -> Any:
        raise AssertionError(f"{title} began")


@pytest.mark.slow
def test_a_range_of_guidance_is_fitted_over(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    """Each probe is sampled at a scale of its own, in the reference too; both ends are reported; the middle is the
    plan's own; within the range nothing is warned of."""
    out = tmp_path / "ranged"
    config = plan_config(
        tiny_sdxl_folder, genes="steps", nodes=6, fit_probes=3, probes=2, heldout=2, max_evals=3, guidance=(1.5, 6.0)
    )
    data = complete_front(config, [2.0], out, Counting())
    assert data.guidance == 3.75 and data.guidance_range == [1.5, 6.0]
    by_kind = {point.kind: point for point in data.points}
    low, high = by_kind["dense-fitted"].ends
    assert (low.guidance, high.guidance) == (1.5, 6.0) and low.latent_mse != high.latent_mse
    assert any("at guidance 6 dense-fitted has" in line for line in verdicts(data))
    export(out, tmp_path / "export")
    card = " ".join((tmp_path / "export" / "README.md").read_text().split())
    assert "each probe at a guidance of its own from 1.5 to 6; this plan's latent MSE is" in card
    again = diffes.fit(open_pipe(tiny_sdxl_folder), out, **SMALL, progress=Counting())
    assert [end.guidance for end in again.after.ends] == [1.5, 6.0]
    pipe = diffes.load(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for guidance in (1.5, 6.0, 10.0):
            images(pipe, steps=2, guidance=guidance)
    with pytest.warns(UserWarning, match=r"made for guidance 1\.5 to 6"):
        images(pipe, steps=2, guidance=20.0)


def test_probes_at_scales_of_their_own_are_those_of_runs_at_each(tiny_sdxl_folder: Path, tiny_folder: Path) -> None:
    for folder in (tiny_sdxl_folder, tiny_folder):
        adapter = adapter_for(open_pipe(folder))
        probes = adapter.make_probes(3, 0).over(1.5, 4.0)
        together = adapter.sample(probes, 3, 2.75)
        assert probes.guidance is not None and len(set(probes.guidance)) == 3
        for i, guidance in enumerate(probes.guidance):
            alone = adapter.sample(replace(probes, guidance=None)[i : i + 1], 3, guidance)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((4.0, 1.5), "two ends, both above 1"),
        ((1.0, 4.0), "two ends, both above 1"),
        ((2.0, 3.0, 4.0), "two ends"),
        ((2.0, float("inf")), "finite"),
        ((True, 3.0), "must be a number, or two"),
        ("2", "must be a number, or two"),
    ],
)
def test_ranges_of_guidance_are_checked(given: Any, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffesError, match=message):
        small_config(tiny_folder, guidance=given)
    with pytest.raises(DiffesError, match=message):
        diffes.fit(open_pipe(tiny_folder), [900, 500], guidance=given, **SMALL)


def test_schedules_of_levels_take_one_scale(tiny_folder: Path, tmp_path: Path) -> None:
    config = small_config(tiny_folder, guidance=(1.5, 4.0))
    for refused in (
        lambda: complete_run(config, tmp_path / "run", Counting()),
        lambda: run_experiment(config, {"strategy": ["random"]}, 1, tmp_path / "grid", Counting()),
    ):
        with pytest.raises(DiffesError, match=r"1\.5 to 4 is a range"):
            refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_fit_names_the_model_that_it_was_made_on(front: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Of another model, and of an export, whose own copy of the base model stays where it is."""
    config = plan_config(tiny_folder, genes="steps", nodes=6, fit_probes=2, probes=2, heldout=2, max_evals=3)
    complete_front(config, [2.0], tmp_path / "front", Counting())
    other = tmp_path / "other"
    pipe = open_pipe(tiny_folder)
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.mul_(1.1)
    pipe.save_pretrained(other)
    options = ["--probes=2", "--heldout=2"]
    main(["fit", str(tmp_path / "front"), str(tmp_path / "fit"), "--model", str(other), *options])
    main(["export", str(tmp_path / "front"), str(tmp_path / "export")])
    main(["fit", str(tmp_path / "export"), str(tmp_path / "again"), *options])
    for made, base in (("fit", other), ("again", tmp_path / "export" / "base")):
        assert Path(read_front(tmp_path / made).model) == base.resolve()
        loaded = diffes.load(tmp_path / made)
        assert images(loaded, steps=2).shape[0] == 2
        main(["export", str(tmp_path / made), str(tmp_path / f"export-{made}")])
        assert np.array_equal(images(diffes.load(tmp_path / f"export-{made}"), steps=2), images(loaded, steps=2))


def test_a_pipeline_with_a_run_applied_is_not_fitted(front: Path, tiny_sdxl_folder: Path) -> None:
    pipe = diffes.apply(load_pipeline(str(tiny_sdxl_folder)), front)
    with pytest.raises(DiffesError, match=r"a fit needs the dense one: diffes\.remove\(pipe\) first"):
        diffes.fit(pipe, front, **SMALL)
    diffes.remove(pipe)


@pytest.mark.parametrize("settings", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
def test_processes_of_flow_matching_are_fitted_like_others(settings: dict[str, Any], tiny_folder: Path) -> None:
    pipe = open_pipe(tiny_folder)
    pipe.scheduler = UniPCMultistepScheduler(**settings)
    found = diffes.fit(pipe, [999, 500], **SMALL)
    assert found.after.latent_mse is not None and found.before.latent_mse is not None
    assert found.after.latent_mse < found.before.latent_mse and found.after.sigmas[1] == pytest.approx(0.501 / 0.499)


def test_models_of_few_timesteps_offsets_and_zero_predictions(tiny_folder: Path) -> None:
    """The reference takes all timesteps where there are fewer than its steps; evenly spaced calls stay within the
    timesteps; a term that is always zero leaves the polish something to solve."""
    pipe = open_pipe(tiny_folder)
    pipe.scheduler = DDIMScheduler(num_train_timesteps=12, clip_sample=False)
    found = diffes.fit(pipe, [11, 5], probes=2, heldout=2, progress=Counting())
    assert found.after.latent_mse is not None
    assert spaced(DDIMScheduler(steps_offset=50), 30, "leading")[0] == 999
    with torch.no_grad():
        for parameter in (pipe.transformer.proj_out_2.weight, pipe.transformer.proj_out_2.bias):
            parameter.zero_()
    pipe.scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    found = diffes.fit(pipe, [999, 500, 100], **SMALL, progress=Counting())
    assert found.after.latent_mse == pytest.approx(0, abs=1e-6)


def test_clipping_that_plans_do_not_do_is_said(tiny_folder: Path) -> None:
    pipe = open_pipe(tiny_folder)
    pipe.scheduler = DDIMScheduler(clip_sample=True)
    with pytest.warns(UserWarning, match="has clip_sample, which no step of a plan"):
        diffes.fit(pipe, [999, 500], **SMALL, progress=Counting())


class _Odd(Solver):
    memory = 2
    fits = True
    made: Any = None

    def row(self, noises: Any, i: int) -> Any:
        return self.made["row"](noises, i) if "row" in self.made else (0.5, 0.5)

    def fit(self, prior: Any, products: Any) -> Any:
        return self.made["fit"](prior) if "fit" in self.made else prior


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"fit": lambda prior: None}, "solver _Odd failed .*finite coefficients from fit"),
        ({"fit": lambda prior: prior[:1]}, "solver _Odd must return 2 finite coefficients from fit"),
        ({"fit": lambda prior: [float("nan")] * len(prior)}, "solver _Odd must return 2 finite coefficients"),
        ({"fit": lambda prior: 1 / 0}, "solver _Odd failed .ZeroDivisionError"),
        ({"row": lambda noises, i: None}, "solver _Odd failed .TypeError"),
        ({"row": lambda noises, i: (1.0,) * 5}, "of 1 to 1 predictions from row 0, got"),
        ({"row": lambda noises, i: (float("inf"), 1.0)}, "solver _Odd must return finite coefficients"),
        ({"row": lambda noises, i: noises[99]}, "solver _Odd failed .IndexError"),
    ],
)
def test_solvers_that_misbehave_are_named(made: dict[str, Any], said: str, tiny_folder: Path) -> None:
    SOLVERS.register("odd")(type("_Odd", (_Odd,), {"made": made, "__module__": "somebody"}))
    try:
        with pytest.raises(DiffesError, match=said):
            diffes.fit(open_pipe(tiny_folder), [999, 500], solver="odd", **SMALL, progress=Counting())
    finally:
        SOLVERS.unregister("odd")


def test_solvers_of_wild_coefficients_end_without_a_crash(tiny_folder: Path) -> None:
    for wild in (0.0, 1e38):
        made = {"fit": lambda prior, wild=wild: [wild] * len(prior)}
        SOLVERS.register("odd")(type("_Odd", (_Odd,), {"made": made, "__module__": "somebody"}))
        try:
            if wild:
                with pytest.raises(DiffesError, match="fitted by solver 'odd' fails: its latents are not finite"):
                    diffes.fit(open_pipe(tiny_folder), [999, 500], solver="odd", **SMALL, progress=Counting())
            else:
                found = diffes.fit(open_pipe(tiny_folder), [999, 500], solver="odd", **SMALL, progress=Counting())
                assert (found.after.coefficients or [])[0] == [0.0, 0.0]
        finally:
            SOLVERS.unregister("odd")


def test_a_pipeline_from_nowhere_is_fitted_into_no_folder(tiny_folder: Path, tmp_path: Path) -> None:
    pipe = DiTPipeline(**open_pipe(tiny_folder).components)
    with pytest.raises(DiffesError, match="was not loaded from a folder or a hub"):
        diffes.fit(pipe, [999, 500], out=tmp_path / "out", **SMALL)
    given: Any = torch.tensor([999, 500])
    assert diffes.fit(pipe, given, **SMALL, progress=Counting()).plan.timesteps == (999, 500)


@pytest.mark.slow
def test_the_command_prints_warnings_of_ours(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    pipe = open_pipe(tiny_folder)
    pipe.scheduler = DDIMScheduler(clip_sample=False, thresholding=True)
    pipe.save_pretrained(tmp_path / "model")
    config = plan_config(tmp_path / "model", genes="steps", nodes=6, fit_probes=2, probes=2, heldout=2, max_evals=3)
    with pytest.warns(UserWarning, match="has thresholding"):
        complete_front(config, [2.0], tmp_path / "front", Counting())
    main(["fit", str(tmp_path / "front"), str(tmp_path / "fit"), "--probes=2", "--heldout=2"])
    assert "warning: the pipeline's scheduler has thresholding" in " ".join(capsys.readouterr().out.split())
