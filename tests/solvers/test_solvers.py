"""Solvers as rows of coefficients, against diffusers and against what any solver has to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from diffes.errors import DiffesError
from diffes.solvers import SOLVERS, Noise, NoiseProcess, Row, Solver, coefficients, solver
from diffes.solvers.offtheshelf import SPACINGS, spaced
from diffes.solvers.scheduler import PlanScheduler

NAMES = ["ddim", "dpmsolver++", "dpmsolver++3m", "fitted", "fitted:memory=1", "unipc", "unipc:order=1", "unipc:order=3"]
UNEVEN = [999, 980, 700, 410, 400, 90, 3]
OWN = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)


def test_the_solvers_that_ship_are_known_with_what_they_remember() -> None:
    assert {"ddim", "dpmsolver++", "dpmsolver++3m", "fitted", "unipc"} <= set(SOLVERS.names())
    assert [SOLVERS.make(name).memory for name in NAMES] == [1, 2, 3, 3, 1, 3, 2, 4]


@pytest.mark.parametrize("n", [1, 2, 4, len(UNEVEN)])
@pytest.mark.parametrize("name", NAMES)
def test_a_constant_prediction_is_followed_exactly(name: str, n: int) -> None:
    """Latents `a D + s N` become `a' D + s' N`, whatever the solver's order: N is scaled by the first coefficient, and
    D is what that leaves of it and all other coefficients together."""
    noises = NoiseProcess.of(OWN).along(UNEVEN[:n])
    rows = coefficients(name, noises)
    memory = SOLVERS.make(name).memory
    assert len(rows) == n and rows[-1][0] == pytest.approx(0, abs=1e-12)
    for i, (kept, *new) in enumerate(rows):
        now, after = noises[i], noises[i + 1]
        assert kept * now.sigma == pytest.approx(after.sigma, rel=1e-6, abs=1e-9)
        assert kept * now.alpha + sum(new) == pytest.approx(after.alpha, rel=1e-6)
        assert 1 <= len(new) <= min(memory, i + 1)


MULTISTEP: list[tuple[str, Any, dict[str, Any]]] = [
    ("ddim", DPMSolverMultistepScheduler, {"solver_order": 1}),
    ("dpmsolver++", DPMSolverMultistepScheduler, {"solver_order": 2}),
    ("dpmsolver++3m", DPMSolverMultistepScheduler, {"solver_order": 3}),
    ("unipc:order=1", UniPCMultistepScheduler, {"solver_order": 1}),
    ("unipc:order=2", UniPCMultistepScheduler, {"solver_order": 2}),
    ("unipc:order=3", UniPCMultistepScheduler, {"solver_order": 3}),
]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 18])
@pytest.mark.parametrize(("name", "kind", "settings"), MULTISTEP)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_rows_step_as_diffusers_does_at_its_own_timesteps(
    name: str, kind: Any, settings: dict[str, Any], n: int, prediction: str
) -> None:
    theirs = kind.from_config(
        OWN.config, timestep_spacing="trailing", final_sigmas_type="zero", prediction_type=prediction, **settings
    )
    theirs.set_timesteps(n)
    ours = PlanScheduler.of(theirs, [int(t) for t in theirs.timesteps], name)
    draw = torch.Generator().manual_seed(n)
    latents = expected = torch.randn(2, 4, 8, 8, generator=draw)
    for t in ours.timesteps:
        output = torch.randn(latents.shape, generator=draw)
        latents = ours.step(output, t, latents, return_dict=False)[0]
        expected = theirs.step(output, t, expected, return_dict=False)[0]
        assert (latents - expected).norm() < 1e-5 * expected.norm()


def test_a_solver_is_asked_for_two_runs_in_turn() -> None:
    """What it keeps of one run is not taken for another's."""
    process = NoiseProcess.of(OWN)
    long, short = process.along(UNEVEN), process.along(UNEVEN[:4])
    made: Solver = SOLVERS.make("unipc:order=3")
    turns = [[made.row(run, i) for run in (long, short)] for i in range(4)]
    assert tuple(row for row, _ in turns) == coefficients("unipc:order=3", long)[:4]
    assert tuple(row for _, row in turns) == coefficients("unipc:order=3", short)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("unipc:order=4", "order must be 1, 2 or 3, got 4"),
        ("dpmsolver++3m:order=0", "order must be 1, 2 or 3, got 0"),
        ("fitted:memory=0", "memory must be at least 1, got 0"),
        ("fitted:memory=2.5", "memory must be a whole number, got 2.5"),
        ("fitted:scaled=maybe", "scaled must be true or false, got 'maybe'"),
        ("fitted:ridge=0", "ridge must be a finite number above 0, got 0"),
        ("fitted:ridge=-1e-3", "ridge must be a finite number above 0"),
        ("ddim:order=2", "Its options: none"),
        ("dpmsolver", r"unknown solver of plans 'dpmsolver'.*Did you mean 'dpmsolver\+\+'"),
    ],
)
def test_unknown_solvers_and_bad_options_are_refused(spec: str, said: str) -> None:
    with pytest.raises(DiffesError, match=said):
        PlanScheduler.of(OWN, UNEVEN, spec)


@pytest.fixture
def halfway() -> Iterator[str]:
    """A solver as a user would write it: the mean of the last two clean predictions, noised again."""

    @solver("halfway")
    class Halfway(Solver):
        memory = 2

        def row(self, noises: Sequence[Noise], i: int) -> Row:
            shrunk = noises[i + 1].sigma / noises[i].sigma
            new = noises[i + 1].alpha - noises[i].alpha * shrunk
            return (shrunk, new) if i == 0 else (shrunk, new / 2, new / 2)

    yield "halfway"
    SOLVERS.unregister("halfway")


def test_a_solver_of_ones_own_steps_by_its_rows(halfway: str) -> None:
    ours = PlanScheduler.of(OWN, [900, 300], halfway)
    first, second = NoiseProcess.of(OWN).along([900, 300])[:2]
    start, noise, other = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    after = ours.step(noise, 900, start).prev_sample
    clean = first.clean(start, noise, "epsilon")
    torch.testing.assert_close(after, second.alpha * clean + second.sigma * noise)
    found = ours.step(other, 300, after).prev_sample
    torch.testing.assert_close(found, (clean + second.clean(after, other, "epsilon")) / 2)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spaced_timesteps_are_those_of_diffusers(spacing: str) -> None:
    """Whatever spacing the pipeline has itself, and where a plan stands in the place of its scheduler."""
    settings = {"timestep_spacing": spacing} if spacing != "log-snr" else {"use_lu_lambdas": True}
    theirs = DPMSolverMultistepScheduler.from_config(OWN.config, **settings, final_sigmas_type="zero")
    theirs.set_timesteps(6)
    karras = EulerDiscreteScheduler.from_config(OWN.config, use_karras_sigmas=True)
    for own in (OWN, karras, PlanScheduler.of(OWN, UNEVEN, "ddim")):
        assert spaced(own, 6, spacing) == theirs.timesteps.tolist()
    many = spaced(OWN, 900, spacing)
    assert many == sorted(set(many), reverse=True) and len(many) <= 900
