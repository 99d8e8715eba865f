"""Coefficients by least squares: of known terms, and along runs of small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import N_STAGES, small_bank
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

import diffes
from diffes.adapters import ModelAdapter
from diffes.errors import DiffesError
from diffes.measure.metrics import make_metric
from diffes.measure.plan_evaluator import PlanEvaluator
from diffes.pruning import GroupWeights
from diffes.pruning.bank import WeightBank
from diffes.runtime.router import Router
from diffes.solvers import Row, coefficients
from diffes.solvers.fitted import Fitted
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.plan import PlanSpace
from diffes.spaces.schedule import Plan, Stages
from diffes.spaces.store import EvaluationStore
from diffes.spaces.strategy import Rows

TIMESTEPS = (999, 800, 560, 310, 120)
LEVELS = (0, 1, 2, 0, 1)
GUIDANCE = 2.0


def products_of(*vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    stacked = np.stack(vectors)
    return stacked @ stacked.T


@pytest.mark.parametrize("memory", [1, 2, 3, 4])
def test_coefficients_are_those_of_least_squares(memory: int) -> None:
    """The terms do not span the target, and the ridge is tiny."""
    rng = np.random.default_rng(memory)
    terms, target = rng.normal(size=(memory + 1, 200)), rng.normal(size=200)
    wanted, *_ = np.linalg.lstsq(terms.T, target, rcond=None)
    prior = tuple(rng.normal(size=memory + 1))
    found = Fitted(memory, ridge=1e-12, scaled=False).fit(prior, products_of(*terms, target))
    assert found == pytest.approx(wanted, rel=1e-6) and all(type(each) is float for each in found)


def test_coefficients_that_made_the_target_are_found() -> None:
    terms = np.random.default_rng(0).normal(size=(3, 200)) * [[1.0], [30.0], [0.01]]
    made = (0.4, -1.5, 0.25)
    for scaled in (False, True):
        found = Fitted(ridge=1e-9, scaled=scaled).fit((1.0, 0.0, 0.0), products_of(*terms, made @ terms))
        assert found == pytest.approx(made, rel=1e-4)


def test_where_terms_are_collinear_the_prior_decides() -> None:
    """Only the sum of two equal terms is known; their difference stays that of the prior."""
    one, other, target = np.random.default_rng(1).normal(size=(3, 100))
    solver, prior = Fitted(scaled=False), (0.7, 0.9, -0.2)
    first, *equal = solver.fit(prior, products_of(one, other, other, one + 3 * other))
    assert [first, sum(equal)] == pytest.approx([1, 3], rel=1e-3)
    assert equal[0] - equal[1] == pytest.approx(1.1, rel=1e-6)
    strong = Fitted(ridge=1e6, scaled=False).fit(prior, products_of(one, other, target, one))
    assert strong == pytest.approx(prior, rel=1e-4)


def test_a_term_that_is_nothing_leaves_the_others_as_they_are() -> None:
    """A term is zero where a network predicts exactly 0."""
    term = np.arange(5.0)
    found = Fitted().fit((1.0, 0.5), products_of(term, 0 * term, 2 * term))
    assert found[0] == pytest.approx(2, rel=1e-4) and np.isfinite(found[1])


def test_scaled_steps_are_as_large_as_their_target() -> None:
    """Least squares alone shrinks them where the terms do not hold the target."""
    terms, target = np.random.default_rng(2).normal(size=(2, 100)), np.random.default_rng(3).normal(size=100)
    plain, scaled = (
        np.array(Fitted(scaled=each).fit((0.0, 1.0), products_of(*terms, target))) for each in (False, True)
    )
    assert np.square(plain @ terms).sum() < 0.5 * np.square(target).sum()
    assert np.square(scaled @ terms).sum() == pytest.approx(np.square(target).sum(), rel=1e-9)
    assert scaled / plain == pytest.approx([scaled[0] / plain[0]] * 2)


def evaluator_of(adapter: ModelAdapter, n: int = 4, **options: int) -> PlanEvaluator:
    stages = Stages.equal(N_STAGES)
    return PlanEvaluator(
        Router(adapter, small_bank(adapter, "obs", stages)), stages, "fitted", adapter.make_probes(n, 0),
        guidance=GUIDANCE, metric=make_metric("latent_mse", adapter.device), **{"reference_steps": 40, **options},  # type: ignore[arg-type]
    )  # fmt: skip


def plan_of(
    adapter: ModelAdapter,
    solver: str = "fitted",
    *,
    levels: tuple[int, ...] = LEVELS,
    timesteps: tuple[int, ...] = TIMESTEPS,
    rows: Rows | None = None,
) -> Plan:
    calls = tuple(zip(timesteps, levels, strict=False))
    return Plan(Stages.equal(N_STAGES), calls, adapter.max_level("width"), solver, rows)


def fit(evaluator: PlanEvaluator, plan: Plan, fidelity: float = 1.0) -> Rows:
    rows = evaluator.sampled(plan, fidelity)[1]
    assert rows is not None
    return rows


def flat(rows: Rows) -> list[float]:
    return [each for row in rows for each in row]


@pytest.mark.parametrize("levels", [(0,) * 5, LEVELS])
def test_a_fit_has_less_error_on_its_probes_than_2m(untrained: ModelAdapter, levels: tuple[int, ...]) -> None:
    evaluator = evaluator_of(untrained)
    fitness, rows = evaluator.measured(plan_of(untrained, levels=levels))
    plain, none = evaluator.measured(plan_of(untrained, "dpmsolver++", levels=levels))
    assert rows is not None and none is None
    assert [len(row) for row in rows] == [2, 3, 4, 4, 4]
    assert 0 > fitness > plain


def test_the_last_step_of_a_fit_is_that_of_least_squares(untrained: ModelAdapter) -> None:
    """No other last row of a fit without scaling leads nearer to the final latents of the reference."""
    evaluator = evaluator_of(untrained)
    plan = plan_of(untrained, "fitted:scaled=False,ridge=1e-9")
    rows = fit(evaluator, plan)
    best = evaluator.measured(plan_of(untrained, rows=rows))[0]
    for k in range(4):
        for change in (0.98, 1.02):
            last: Row = tuple(each * (change if k == j else 1) for j, each in enumerate(rows[-1]))
            assert evaluator.measured(plan_of(untrained, rows=(*rows[:-1], last)))[0] < best


def row_by_row(adapter: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the denoiser and encodes prompts for each row alone, so that what they say does not depend on the batch."""
    pipe: Any = adapter.pipe
    forward = adapter.denoiser.forward

    def each(*args: Any, **kwargs: Any) -> Any:
        n, found = len(args[0]), []
        for i in range(n):

            def row(each: Tensor, i: int = i) -> Tensor:
                return each[i : i + 1] if each.dim() and len(each) == n else each

            one = tree_map_only(Tensor, row, (args, kwargs))
            found.append(forward(*one[0], **one[1]))
        together = torch.cat([output[0] for output in found])
        return (together,) if isinstance(found[0], tuple) else type(found[0])(together)

    monkeypatch.setattr(adapter.denoiser, "forward", each)
    if hasattr(pipe, "encode_prompt"):
        encode = pipe.encode_prompt

        def encoded(prompt: list[str], **options: Any) -> tuple[Any, ...]:
            found = [encode(prompt=[text], **options) for text in prompt]
            return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True))

        monkeypatch.setattr(pipe, "encode_prompt", encoded, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fit_is_over_all_probes_whatever_the_batch_and_costs_no_further_calls(
    untrained: ModelAdapter, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_by_row(untrained, monkeypatch)
    whole, parts, plain = (evaluator_of(untrained, reference_steps=15, batch=n) for n in (32, batch, batch))
    rows, again = (fit(evaluator, plan_of(untrained)) for evaluator in (whole, parts))
    assert flat(again) == pytest.approx(flat(rows), rel=1e-6)
    plain.latents(plan_of(untrained, "dpmsolver++"))
    for evaluator in (whole, parts, plain):
        assert evaluator.denoiser_calls == evaluator.paid_calls == 5 * 4 * 2
        assert evaluator.reference_calls == 15 * 4 * 2


@pytest.mark.slow
def test_a_fit_in_parts_leads_where_one_at_once_does(untrained: ModelAdapter) -> None:
    """With a denoiser that rounds otherwise in another batch."""
    whole, parts = (evaluator_of(untrained, batch=n).latents(plan_of(untrained)) for n in (32, 3))
    assert (parts - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.slow
def test_fits_that_share_a_cache_are_those_of_each_plan_alone(untrained: ModelAdapter) -> None:
    """Plans that part at a level, at a timestep and at the end, in one cache with other solvers."""
    plans = [
        plan_of(untrained), plan_of(untrained, levels=(0, 1, 2, 1, 1)), plan_of(untrained, "fitted:memory=2"),
        plan_of(untrained, timesteps=(*TIMESTEPS[:3], 290, 120)), plan_of(untrained, levels=LEVELS[:4]),
        plan_of(untrained, timesteps=(999, 780, *TIMESTEPS[2:])), plan_of(untrained),
    ]  # fmt: skip
    shared, alone = evaluator_of(untrained), {}
    for plan in plans:
        alone[plan] = evaluator_of(untrained).sampled(plan)
        shared.latents(plan_of(untrained, "dpmsolver++", timesteps=plan.timesteps, levels=plan.levels))
    before = shared.denoiser_calls
    for plan in plans:
        latents, rows = shared.sampled(plan)
        assert rows == alone[plan][1] and torch.equal(latents, alone[plan][0])
    assert shared.denoiser_calls - before < 4 * 2 * sum(len(plan.calls) for plan in plans[:-1])


def test_a_rung_is_fitted_on_its_own_probes(tiny: ModelAdapter) -> None:
    """Half of the probes are a fit of their own, in whatever order the two are measured."""
    evaluator, half = evaluator_of(tiny), evaluator_of(tiny, n=2)
    rung, whole, again = (fit(evaluator, plan_of(tiny), fidelity) for fidelity in (0.5, 1.0, 0.5))
    assert flat(rung) == pytest.approx(flat(fit(half, plan_of(tiny))), rel=1e-4, abs=1e-4)
    assert flat(rung) != pytest.approx(flat(whole), rel=1e-3)
    assert again == rung
    assert fit(evaluator_of(tiny), plan_of(tiny)) == whole


def test_coefficients_that_a_plan_has_are_used_as_they_are(untrained: ModelAdapter) -> None:
    evaluator = evaluator_of(untrained)
    plan = evaluator.fitted(plan_of(untrained))
    rows = plan.coefficients
    assert rows is not None and rows == fit(evaluator, plan_of(untrained))
    assert evaluator.fitted(plan) == plan, "a fit does not begin with what was fitted before"
    latents, none = evaluator.sampled(plan)
    assert none is None and torch.equal(latents, evaluator.latents(plan_of(untrained)))
    with evaluator.router.routed(plan):
        scheduler = PlanScheduler.of(untrained.pipe.scheduler, TIMESTEPS, rows)
        assert torch.equal(untrained.sample(evaluator.probes, scheduler, GUIDANCE), latents)
    other = evaluator.latents(plan_of(untrained, rows=(*rows[:2], tuple(1.1 * each for each in rows[2]), *rows[3:])))
    assert not torch.equal(other, latents)
    ddim = coefficients("ddim", evaluator.process.along(TIMESTEPS))
    assert torch.equal(evaluator.latents(plan_of(untrained, rows=ddim)), evaluator.latents(plan_of(untrained, "ddim")))


@pytest.mark.slow
def test_plans_with_coefficients_share_a_cache(untrained: ModelAdapter) -> None:
    """Two plans begin alike, and one reads older predictions later, or ends with another step."""
    shared = evaluator_of(untrained)
    rows = coefficients("dpmsolver++", shared.process.along(TIMESTEPS))
    longer = (*rows[:3], (*rows[3], 0.1), rows[4])
    for each in (rows, longer, rows, (*rows[:4], (0.1, 0.9)), longer):
        plan = plan_of(untrained, rows=each)
        assert torch.equal(shared.latents(plan), evaluator_of(untrained, fits=False).latents(plan))
    assert shared.denoiser_calls == 4 * 2 * (5 + 5 + 0 + 1 + 0)


def test_only_fits_need_the_reference_recorded(tiny: ModelAdapter) -> None:
    evaluator = evaluator_of(tiny, fits=False)
    assert evaluator.recorded is None
    with pytest.raises(DiffesError, match="has not recorded its reference, so no solver can be fitted"):
        evaluator.latents(plan_of(tiny))
    rows = fit(evaluator_of(tiny), plan_of(tiny))
    assert evaluator.latents(plan_of(tiny, rows=rows)).shape == (4, 4, 4, 4)
    assert evaluator.fitted(plan_of(tiny, "unipc")).coefficients is None


def test_a_plan_that_is_not_fitted_yet_is_not_applied(tiny: ModelAdapter) -> None:
    dense, own = plan_of(tiny, levels=(0,) * 5), tiny.pipe.scheduler
    with pytest.raises(DiffesError, match=r"no coefficients, and its solver 'fitted' needs them\. Fit them with"):
        diffes.apply(tiny.pipe, dense)
    assert tiny.pipe.scheduler is own
    pipe = diffes.apply(tiny.pipe, evaluator_of(tiny).fitted(dense))
    assert isinstance(pipe.scheduler, PlanScheduler)


def test_a_run_that_is_no_number_is_a_failed_evaluation_that_is_kept(tiny: ModelAdapter, tmp_path: Path) -> None:
    """A store that holds it is opened again, and a fit of it leaves a plan."""
    evaluator, space = evaluator_of(tiny), PlanSpace.dense_calls([[1.0, 0.9, 0.8, 0.7, 0.6]] * 10, 4.0)
    broken = {}
    for name, weights in evaluator.router.bank[0, 1].items():
        (consumer,) = weights.consumers
        broken[name] = GroupWeights(weights.kept, (torch.full_like(consumer, float("nan")),))
    evaluator.router.bank = WeightBank({(0, 1): broken}, "width")
    genome = space.schedule([1, 5, 5, 5, 0, 5, 5, 5, 5, 0])
    (evaluation,) = evaluator([genome])
    assert evaluation.fitness == -float("inf")
    EvaluationStore(tmp_path / "journal", space).add(evaluation)
    assert EvaluationStore(tmp_path / "journal", space).evaluations() == [evaluation]
    evaluator.fitted(evaluator.plan(genome))
