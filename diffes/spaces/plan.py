"""Plans: which nodes of a fine grid of timesteps call the denoiser, at which levels, within one budget."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from diffes.errors import DiffesError
from diffes.spaces.schedule import Schedule, Stages
from diffes.spaces.space import COST_RESOLUTION, SearchSpace


@dataclass(frozen=True)
class PlanSpace(SearchSpace):
    """Space of feasible plans.

    A plan is a schedule of N nodes, node 0 the cleanest. The value `max_level` means that a node is skipped: the
    denoiser is not called there, which costs nothing. A plan is feasible when it costs no more than the budget, has at
    least one call, every call is at an allowed level, and the noisiest call reuses nothing. Part of the budget may stay
    unspent.

    Args:
        stages: one narrow range of timesteps per node; the node is called at the noisiest of them, `hi - 1`.
        max_level: H + 1, the value of a skipped node; calls are at levels from 0 (dense) to H.
        steps: (N,) ones: a node is called once or not at all.
        level_costs: (N, H + 2) cost of a call at each node at each level, whole numbers, the last of each node 0. A
            higher level may cost more than a lower one.
        budget: the largest cost allowed; None allows all.
        allowed: levels that a call may have, rising: `(0,)` where only the timesteps are searched.
        starts: feasible plans (N,) from which a search starts.
        reusing: levels that reuse what an earlier call computed; the noisiest call of a plan cannot have one of them.
    """

    allowed: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...] = ()
    reusing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.stages)
        if self.steps != (1,) * n:
            raise DiffesError(f"steps of a plan space must be {n} ones, got {self.steps}")
        levels = list(self.allowed)
        if not levels or levels != sorted({*levels}) or levels[0] < 0 or levels[-1] >= self.max_level:
            raise DiffesError(
                f"allowed must have one or more rising levels in [0, {self.max_level - 1}], got {self.allowed}. The "
                f"value {self.max_level} means a skipped node."
            )
        if 0 in self.reusing or not set(levels) - set(self.reusing):
            raise DiffesError(
                f"reusing must have levels above 0 and leave out at least one of {self.allowed}, got {self.reusing}. "
                "The first call of a run has nothing to reuse."
            )
        costs = np.array(self.level_costs) if len({len(row) for row in self.level_costs}) == 1 else np.empty(0)
        if costs.shape != (n, self.max_level + 1) or costs[:, -1].any() or not (costs[:, :-1] > 0).all():
            raise DiffesError(
                f"level_costs must be a table of {n} nodes with {self.max_level + 1} whole numbers each: costs above "
                f"0, and 0 at the end for a skipped node. Got {self.level_costs}."
            )
        smallest = int(costs[:, self.first_levels].min())
        if self.budget is not None and self.budget < smallest:
            raise DiffesError(
                f"no plan costs {self.budget} or less. The cheapest, one call at the cheapest allowed level, costs "
                f"{smallest}. Raise the budget."
            )
        for plan in self.starts:
            self.schedule(plan)

    @classmethod
    def dense_calls(
        cls,
        costs: Sequence[Sequence[float]],
        calls: float | None,
        *,
        allowed: Sequence[int] | None = None,
        starts: Sequence[Sequence[int]] = (),
        n_timesteps: int = 1000,
        reusing: Sequence[int] = (),
    ) -> PlanSpace:
        """Make a space whose budget is in dense calls, for costs in any currency: MACs or milliseconds.

        Costs are counted in millionths of a dense call and rounded up, so that no plan costs more than it should.

        Args:
            costs: (N, H + 1) cost of one call at each node, node 0 the cleanest, at each level, in any unit.
            calls: largest cost of a plan, in dense calls (in their mean cost where it differs by node); None allows
                all.
            allowed: levels that a call may have; all when left out.
            starts: feasible plans (N,) from which a search starts; H + 1 is a skipped node.
            n_timesteps: T, training timesteps that the nodes divide equally.
            reusing: levels that reuse what an earlier call computed.

        Raises:
            DiffesError: costs are not positive numbers, or the budget is below the cheapest call.
        """
        table = np.array(costs, dtype=float)
        if table.ndim != 2 or not (np.isfinite(table).all() and (table > 0).all()):
            raise DiffesError(f"costs must be a table (N, H + 1) of positive numbers, got {costs}")
        n, skip = table.shape
        levels = tuple(range(skip)) if allowed is None else tuple(allowed)
        scaled = table / table[:, 0].mean() * COST_RESOLUTION
        whole = np.maximum(np.ceil(scaled - 1e-6), 1).astype(int)  # a dense call is not one unit more than it is
        known = [level for level in levels if 0 <= level < skip]
        first = [level for level in known if level not in reusing] or known  # none: refused below
        smallest = whole[:, first].min(initial=2**62) / COST_RESOLUTION
        if calls is not None and not (smallest <= calls < math.inf):
            raise DiffesError(
                f"calls must be a finite number of at least {math.ceil(smallest * 1e4) / 1e4:.4f} dense calls, got "
                f"{calls}. One call at the cheapest allowed level costs that much."
            )
        rows = tuple((*(int(cost) for cost in row), 0) for row in whole)
        budget = None if calls is None else math.floor(calls * COST_RESOLUTION * (1 + 1e-12))
        plans = tuple(tuple(int(level) for level in plan) for plan in starts)
        reused = tuple(level for level in levels if level in reusing)
        return cls(Stages.equal(n, n_timesteps), skip, (1,) * n, rows, budget, levels, plans, reused)

    @property
    def skip(self) -> int:
        """Value of a node without a call."""
        return self.max_level

    @property
    def genes(self) -> tuple[int, ...]:
        """Values that a node may have: the allowed levels, and `skip`."""
        return (*self.allowed, self.skip)

    @property
    def most_pruned(self) -> int:
        """Highest allowed level."""
        return self.allowed[-1]

    @property
    def first_levels(self) -> list[int]:
        """Allowed levels of the noisiest call, which has nothing to reuse."""
        return [level for level in self.allowed if level not in self.reusing]

    def called(self, levels: Sequence[int]) -> list[int]:
        """Return the nodes that a plan (N,) calls, the cleanest first."""
        skip = self.skip
        return [node for node, level in enumerate(levels) if level != skip]

    def fits(self, levels: Sequence[int]) -> bool:
        """Check whether a plan (N,) is feasible, as the class defines it."""
        genes = len(levels) == self.n_stages and set(levels) <= set(self.genes) and min(levels) < self.skip
        return genes and levels[self.called(levels)[-1]] not in self.reusing and self.affords(levels)

    def cost(self, levels: Sequence[int]) -> int:
        """Return the cost of a plan (N,), in millionths of a dense call if `dense_calls` made the space."""
        return sum(map(operator.getitem, self.level_costs, levels))

    def affords(self, levels: Sequence[int]) -> bool:
        """Check whether a plan (N,) costs no more than the budget."""
        return self.budget is None or self.cost(levels) <= self.budget

    def is_feasible(self, levels: Sequence[int]) -> bool:
        """Check whether a plan (N,) is feasible, as the class defines it."""
        return self.fits(levels)

    def pays(self, node: int, level: int) -> bool:
        """Check whether the budget allows a single call at a node and level."""
        return self.budget is None or self.level_costs[node][level] <= self.budget

    def cheaper(self, node: int, level: int) -> list[int]:
        """Return the allowed levels that cost less at a node than `level`, the most expensive first.

        Of equals, the denser is first.
        """
        costs = self.level_costs[node]
        return sorted((k for k in self.allowed if costs[k] < costs[level]), key=lambda k: (-costs[k], k))

    def denser(self, level: int) -> list[int]:
        """Return the allowed levels below `level`, the highest first."""
        return [k for k in reversed(self.allowed) if k < level]

    def grounded(self, levels: Sequence[int]) -> list[int]:
        """Return the plan (N,) with its noisiest call at the densest level that reuses nothing, if that call reuses."""
        plan, called = list(levels), self.called(levels)
        if called and plan[called[-1]] in self.reusing:
            plan[called[-1]] = self.first_levels[0]
        return plan

    def pay(self, levels: Sequence[int], rng: np.random.Generator, spare: Collection[int] = ()) -> list[int]:
        """Return a grounded plan (N,) within the budget: while it is over, drop a random call or make it cheaper.

        Args:
            levels: (N,) allowed levels and skipped nodes.
            rng: draws the calls, and whether to drop them or make them cheaper, with equal probability.
            spare: nodes that are left alone, as long as there are others.
        """
        plan = self.grounded(levels)
        while not self.affords(plan):
            calls = [node for node in self.called(plan) if node not in spare] or self.called(plan)
            node = int(rng.choice(calls))
            cheaper = self.cheaper(node, plan[node])
            if node == self.called(plan)[-1]:
                cheaper = [level for level in cheaper if level not in self.reusing]
            plan[node] = cheaper[0] if cheaper and rng.random() < 0.5 else self.skip
            plan = self.grounded(plan)
        return plan

    def spend(self, levels: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Return a plan (N,) in which random calls are made denser, one allowed level at a time, within the budget.

        Without a budget there is nothing to spend, and the plan is only grounded.
        """
        plan = self.grounded(levels)
        while self.budget is not None:
            left = self.budget - self.cost(plan)
            first = self.called(plan)[-1:]
            denser = {
                node: [level for level in self.denser(plan[node]) if node not in first or level not in self.reusing]
                for node in self.called(plan)
            }
            options = [
                (node, levels[0])
                for node, levels in denser.items()
                if levels and self.level_costs[node][levels[0]] - self.level_costs[node][plan[node]] <= left
            ]
            if not options:
                break
            node, level = options[int(rng.integers(len(options)))]
            plan[node] = level
        return plan

    def repair(self, levels: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Return a feasible plan near any genome: levels become allowed ones, and random calls pay for excess cost.

        Skipped nodes stay skipped. Only if there would be no call at all, a random call that can be paid is added.

        Args:
            levels: (N,) integers; a level that is not allowed becomes the nearest allowed one, the higher of two.
            rng: draws the calls.
        """
        levels = [min(int(level), self.skip) for level in levels]
        nearest = {level: min(self.allowed, key=lambda k, to=level: (abs(k - to), -k)) for level in {*levels}}  # type: ignore[misc]
        plan = [level if level == self.skip else nearest[level] for level in levels]
        plan = self.pay(plan, rng)
        if not self.called(plan):
            node, level = self._single(rng)
            plan[node] = level
        return plan

    def sample(self, rng: np.random.Generator) -> list[int]:
        """Draw a random feasible plan: a mix of levels, and as many calls as can be paid at about evenly spaced nodes.

        The mix ranges from a single level to all allowed levels alike. Each call is at a random node of its share of
        the trajectory. Without a budget the logarithm of the number of calls is drawn uniformly.
        """
        mix = rng.dirichlet([0.5] * len(self.allowed))
        costs = np.array(self.level_costs)[:, list(self.allowed)].mean(0)
        if self.budget is None:
            count = round(math.exp(rng.uniform(0, math.log(self.n_stages))))
        else:
            count = min(max(round(self.budget / float(mix @ costs)), 1), self.n_stages)
        edges = [i * self.n_stages // count for i in range(count + 1)]
        plan = [self.skip] * self.n_stages
        for low, high in itertools.pairwise(edges):
            plan[int(rng.integers(low, high))] = int(rng.choice(self.allowed, p=mix))
        return self.spend(self.repair(plan, rng), rng)

    def uniform(self) -> list[int]:
        """Return as many calls as can be paid at the densest level, evenly spaced from the noisiest node on.

        The level is the densest that reuses nothing and of which at least one call can be paid at the noisiest node. If
        there is no such level, the plan is one random call that can be paid.
        """
        for level in self.first_levels:
            if (plan := self.evenly_spaced(level)) is not None:
                return plan
        node, level = self._single(np.random.default_rng(0))
        return [level if each == node else self.skip for each in range(self.n_stages)]

    def evenly_spaced(self, level: int) -> list[int] | None:
        """Return as many calls as can be paid at one level, evenly spaced from the noisiest node on; None if none can.

        The plan is grounded.
        """
        for count in range(self.n_stages, 0, -1):
            if self.affords(plan := self.grounded(self._trailing(count, level))):
                return plan
        return None

    def ramp(self, level: int) -> list[int] | None:
        """Return as many evenly spaced calls as can be paid, with levels that fall evenly along the trajectory.

        They fall from `level` at the noisiest call to dense at the cleanest, each rounded to an allowed level that
        reuses nothing. None if not even two calls can be paid.
        """
        for count in range(self.n_stages, 1, -1):
            plan = [self.skip] * self.n_stages
            for i, node in enumerate(trailing(count, self.n_stages)):
                wanted = level * (1 - i / (count - 1))
                plan[node] = min(self.first_levels, key=lambda k, to=wanted: abs(k - to))  # type: ignore[misc]
            if self.affords(plan):
                return plan
        return None

    def constants(self) -> list[list[int]]:
        """Return plans (N,) of evenly spaced calls at the densest allowed level, from one call to one per node."""
        counts = np.unique(np.geomspace(1, self.n_stages, 9).round().astype(int)).tolist()
        return [self._trailing(count, self.allowed[0]) for count in counts]

    def schedule(self, levels: Sequence[int]) -> Schedule:
        """Return the plan as an immutable schedule.

        Raises:
            DiffesError: it is not feasible.
        """
        schedule = self.any_schedule(levels)
        if not self.is_feasible(schedule.levels):
            raise DiffesError(
                f"plan {list(schedule.levels)} is not feasible. It costs {self.cost(schedule.levels)}, and the budget "
                f"is {self.budget}. It needs at least one call. Levels of calls must be in {list(self.allowed)}, and "
                f"that of the noisiest call in {self.first_levels}. The value {self.skip} means a skipped node."
            )
        return schedule

    def _trailing(self, count: int, level: int) -> list[int]:
        """Place `count` calls at one level, spaced as diffusers' "trailing" timesteps; the noisiest node is called."""
        plan = [self.skip] * self.n_stages
        for node in trailing(count, self.n_stages):
            plan[node] = level
        return plan

    def _single(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a random node and allowed level that can be paid on their own."""
        levels = self.first_levels
        pairs = [(node, level) for node in range(self.n_stages) for level in levels if self.pays(node, level)]
        return pairs[int(rng.integers(len(pairs)))]


def trailing(n: int, size: int) -> list[int]:
    """Return `n` of `size` timesteps or nodes, evenly spaced from the last one down: diffusers' "trailing" spacing."""
    return [round(size * (n - i) / n) - 1 for i in range(n)]


def power_spaced(n: int, size: int, power: float, shift: float) -> list[int]:
    """Return at most `n` of `size` timesteps, falling, denser towards the clean end for larger powers.

    They lie at `size ((n - i - shift) / n)^power - 1`, so that power 1 and shift 0 are "trailing".

    Args:
        n: at least 1.
        size: T.
        power: above 0.
        shift: towards the clean end, in steps, in [0, 1).

    Example:
        >>> power_spaced(4, 1000, 1.0, 0.0), power_spaced(4, 1000, 1.25, 0.75)
        ([999, 749, 499, 249], [770, 486, 233, 30])
    """
    found = (round(size * ((n - i - shift) / n) ** power) - 1 for i in range(n))
    return sorted({max(timestep, 0) for timestep in found}, reverse=True)


def calls_of(plan: Schedule) -> tuple[tuple[int, int], ...]:
    """Return the timestep and level of each call of a plan, in the order of sampling: the noisiest first."""
    nodes = zip(plan.stages.ranges, plan.levels, strict=True)
    return tuple((hi - 1, level) for (_, hi), level in nodes if level < plan.max_level)[::-1]


def plans_only(space: SearchSpace, name: str) -> PlanSpace:
    """Return the space, if it is one of plans.

    Raises:
        DiffesError: it is not; the message says what `name` needs.
    """
    if not isinstance(space, PlanSpace):
        raise DiffesError(
            f"{name!r} works on plans only, and this space has levels of stages. Choose an operator of levels, leave "
            "the operator out to take the default, or search plans (--genes joint)."
        )
    return space


def schedules_only(space: SearchSpace, name: str) -> None:
    """Check that a space is not one of plans.

    Raises:
        DiffesError: the space is one of plans; the message says what `name` needs.
    """
    if isinstance(space, PlanSpace):
        raise DiffesError(
            f"strategy {name!r} works on levels of stages only, and this is a space of plans of {space.n_stages} "
            "nodes. Choose another strategy, or search levels (--genes levels)."
        )
