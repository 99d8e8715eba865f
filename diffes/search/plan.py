"""Plans: which nodes of a fine grid of timesteps call the denoiser, and at which level, under one cost."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffes.errors import DiffesError
from diffes.search.schedule import Schedule, Stages
from diffes.search.space import COST_RESOLUTION, SearchSpace


@dataclass(frozen=True)
class PlanSpace(SearchSpace):
    """Feasible plans.

    A plan is a schedule of N nodes, node 0 the cleanest, in which the value `max_level` means that the node is skipped:
    the denoiser is not called there, which costs nothing. A plan is feasible when it costs no more than the budget,
    has at least one call, and every call is at an allowed level. What is left of a budget may stay unspent.

    Args:
        stages: one narrow range of timesteps a node; it is called at the noisiest of them, `hi - 1`.
        max_level: H + 1, the value of a skipped node; calls are at levels from 0 (dense) to H.
        steps: (N,) ones: a node is called once or not at all.
        level_costs: (N, H + 2) cost of a call at each node at each level, whole numbers, the last of each node 0. A
            thinner level may cost more than a denser one.
        budget: the largest cost allowed; None allows all.
        allowed: levels that a call may have, rising: `(0,)` where only the timesteps are searched.
        starts: feasible plans (N,) from which a search starts.
        reusing: levels that reuse what an earlier call computed, which the noisiest call of a plan cannot be at.
    """

    mutation: ClassVar[str] = "plan_move"
    small_mutation: ClassVar[str] = "plan_move:max_moves=1"
    crossover: ClassVar[str] = "node_exchange"

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
                f"allowed must be rising levels in [0, {self.max_level - 1}], at least one, got {self.allowed}: "
                f"{self.max_level} is a skipped node"
            )
        if 0 in self.reusing or not set(levels) - set(self.reusing):
            raise DiffesError(
                f"reusing must be levels above 0 and leave at least one of {self.allowed}, got {self.reusing}: the "
                "first call of a run has nothing to reuse"
            )
        costs = np.array(self.level_costs) if len({len(row) for row in self.level_costs}) == 1 else np.empty(0)
        if costs.shape != (n, self.max_level + 1) or costs[:, -1].any() or not (costs[:, :-1] > 0).all():
            raise DiffesError(
                f"level_costs must be {(n, self.max_level + 1)} whole numbers, positive but for the last of each node, "
                f"which is 0 for a skipped one; got {self.level_costs}"
            )
        smallest = int(costs[:, self.first_levels].min())
        if self.budget is not None and self.budget < smallest:
            raise DiffesError(
                f"no plan costs {self.budget} or less: the smallest possible is {smallest} (one call at the cheapest "
                "allowed level); raise the budget"
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
        """A budget in dense calls, of whatever currency the costs are: MACs or milliseconds.

        Costs are counted in millionths of a dense call and rounded up, so that no plan costs more than it should.

        Args:
            costs: (N, H + 1) cost of one call at each node, node 0 the cleanest, at each level, in any unit.
            calls: largest cost of a plan over that of a dense call (their mean where it differs by node); None allows
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
            raise DiffesError(f"costs of calls must be an (N, H + 1) table of positive numbers, got {costs}")
        n, skip = table.shape
        levels = tuple(range(skip)) if allowed is None else tuple(allowed)
        scaled = table / table[:, 0].mean() * COST_RESOLUTION
        whole = np.maximum(np.ceil(scaled - 1e-6), 1).astype(int)  # a dense call is not one unit more than it is
        known = [level for level in levels if 0 <= level < skip]
        first = [level for level in known if level not in reusing] or known  # none: refused below
        smallest = whole[:, first].min(initial=2**62) / COST_RESOLUTION
        if calls is not None and not (smallest <= calls < math.inf):
            raise DiffesError(
                f"calls must be at least {math.ceil(smallest * 1e4) / 1e4:.4f} dense calls, what one call at the "
                f"cheapest allowed level costs, got {calls}; raise it"
            )
        rows = tuple((*(int(cost) for cost in row), 0) for row in whole)
        budget = None if calls is None else math.floor(calls * COST_RESOLUTION * (1 + 1e-12))
        plans = tuple(tuple(int(level) for level in plan) for plan in starts)
        reused = tuple(level for level in levels if level in reusing)
        return cls(Stages.equal(n, n_timesteps), skip, (1,) * n, rows, budget, levels, plans, reused)

    @property
    def skip(self) -> int:
        """The value of a node without a call."""
        return self.max_level

    @property
    def genes(self) -> tuple[int, ...]:
        """Values that a node may have: the allowed levels, and that of a skipped one."""
        return (*self.allowed, self.skip)

    @property
    def thinnest(self) -> int:
        """The highest allowed level."""
        return self.allowed[-1]

    @property
    def first_levels(self) -> list[int]:
        """Allowed levels of the noisiest call, which has nothing to reuse."""
        return [level for level in self.allowed if level not in self.reusing]

    def called(self, levels: Sequence[int]) -> list[int]:
        """Nodes that a plan (N,) calls, the cleanest first."""
        skip = self.skip
        return [node for node, level in enumerate(levels) if level != skip]

    def fits(self, levels: Sequence[int]) -> bool:
        """Whether a plan (N,) is within the budget, has a call, and only allowed ones; the same as feasible."""
        genes = len(levels) == self.n_stages and set(levels) <= set(self.genes) and min(levels) < self.skip
        return genes and levels[self.called(levels)[-1]] not in self.reusing and self.affords(levels)

    def cost(self, levels: Sequence[int]) -> int:
        """Cost of a plan (N,), in millionths of a dense call where `dense_calls` made the space."""
        return sum(map(operator.getitem, self.level_costs, levels))

    def affords(self, levels: Sequence[int]) -> bool:
        """Whether a plan (N,) costs no more than the budget."""
        return self.budget is None or self.cost(levels) <= self.budget

    def is_feasible(self, levels: Sequence[int]) -> bool:
        """Whether a plan (N,) is feasible, in the sense of the class."""
        return self.fits(levels)

    def pays(self, node: int, level: int) -> bool:
        """Whether a single call at a node can be paid."""
        return self.budget is None or self.level_costs[node][level] <= self.budget

    def cheaper(self, node: int, level: int) -> list[int]:
        """Allowed levels that cost less at a node than `level` does, the dearest first, of equals the denser first."""
        costs = self.level_costs[node]
        return sorted((k for k in self.allowed if costs[k] < costs[level]), key=lambda k: (-costs[k], k))

    def denser(self, level: int) -> list[int]:
        """Allowed levels that are denser than `level`, the thinnest of them first."""
        return [k for k in reversed(self.allowed) if k < level]

    def grounded(self, levels: Sequence[int]) -> list[int]:
        """The plan (N,) with its noisiest call at the densest level that reuses nothing, where it would reuse."""
        plan, called = list(levels), self.called(levels)
        if called and plan[called[-1]] in self.reusing:
            plan[called[-1]] = self.first_levels[0]
        return plan

    def pay(self, levels: Sequence[int], rng: np.random.Generator, spare: Collection[int] = ()) -> list[int]:
        """A plan (N,) within the budget, grounded: as long as it costs too much, a random call is dropped or made
        cheaper.

        Args:
            levels: (N,) allowed levels and skipped nodes.
            rng: draws the calls, and whether they are dropped; each is as likely.
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
        """A plan (N,) whose random calls are made denser, by one allowed level each time, as far as the budget goes.

        Without a budget nothing is left to spend, and the plan stays as it is.
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
        """A feasible plan near any genome: its genes are made allowed ones, and random calls pay for what is too much.

        Skipped nodes stay skipped; only where there would be no call at all, a random one that can be paid is made.

        Args:
            levels: (N,) integers; a level that is not allowed becomes the nearest allowed one, of two the thinner.
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
        """A random feasible plan: a mix of levels, and as many calls as can be paid at about evenly spread nodes.

        The mix is drawn between a single level and all allowed ones alike; each call is at a random node of its share
        of the trajectory. Without a budget the number of calls is drawn, small ones as likely as large ones.
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
        """As many calls as can be paid at the densest allowed level, evenly spread from the noisiest node on.

        Where not even one can be paid there, it is at the densest level at which one can.
        """
        for level in self.first_levels:
            if (plan := self.even(level)) is not None:
                return plan
        node, level = self._single(np.random.default_rng(0))
        return [level if each == node else self.skip for each in range(self.n_stages)]

    def even(self, level: int) -> list[int] | None:
        """As many calls as can be paid at one level, evenly spread from the noisiest node on, grounded; None if none
        can."""
        for count in range(self.n_stages, 0, -1):
            if self.affords(plan := self.grounded(self._trailing(count, level))):
                return plan
        return None

    def ramp(self, level: int) -> list[int] | None:
        """As many evenly spread calls as can be paid whose levels fall evenly from one at the noisiest call to the
        densest at the cleanest, each rounded to an allowed one; None if none can."""
        for count in range(self.n_stages, 1, -1):
            plan = [self.skip] * self.n_stages
            for i, node in enumerate(trailing(count, self.n_stages)):
                wanted = level * (1 - i / (count - 1))
                plan[node] = min(self.first_levels, key=lambda k, to=wanted: abs(k - to))  # type: ignore[misc]
            if self.affords(plan):
                return plan
        return None

    def constants(self) -> list[list[int]]:
        """Evenly spread calls (N,) at the densest allowed level, from one to as many as there are nodes."""
        counts = np.unique(np.geomspace(1, self.n_stages, 9).round().astype(int)).tolist()
        return [self._trailing(count, self.allowed[0]) for count in counts]

    def schedule(self, levels: Sequence[int]) -> Schedule:
        """The plan as an immutable schedule.

        Raises:
            DiffesError: it is not feasible.
        """
        schedule = self.any_schedule(levels)
        if not self.is_feasible(schedule.levels):
            raise DiffesError(
                f"plan {list(schedule.levels)} is not feasible: it costs {self.cost(schedule.levels)} of at most "
                f"{self.budget}, must call at least one node, and each at one of the levels {list(self.allowed)} "
                f"({self.skip} is a skipped node), the noisiest at one of {self.first_levels}"
            )
        return schedule

    def _trailing(self, count: int, level: int) -> list[int]:
        """`count` calls at one level, spaced as diffusers' "trailing" timesteps: the noisiest node is one of them."""
        plan = [self.skip] * self.n_stages
        for node in trailing(count, self.n_stages):
            plan[node] = level
        return plan

    def _single(self, rng: np.random.Generator) -> tuple[int, int]:
        """A random node and allowed level that can be paid on their own."""
        levels = self.first_levels
        pairs = [(node, level) for node in range(self.n_stages) for level in levels if self.pays(node, level)]
        return pairs[int(rng.integers(len(pairs)))]


def trailing(n: int, size: int) -> list[int]:
    """`n` of `size` timesteps or nodes, evenly spread from the last one down, as diffusers' "trailing" spacing."""
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
    """Timestep and level of each call of a plan, in the order of sampling: the noisiest first."""
    nodes = zip(plan.stages.ranges, plan.levels, strict=True)
    return tuple((hi - 1, level) for (_, hi), level in nodes if level < plan.max_level)[::-1]


def plans_only(space: SearchSpace, name: str) -> PlanSpace:
    """The space, if it is one of plans.

    Raises:
        DiffesError: it is not; the message says what `name` needs.
    """
    if not isinstance(space, PlanSpace):
        raise DiffesError(
            f"{name!r} works on plans, which choose the timesteps too, and this space has a fixed number of steps a "
            f"stage; take {space.mutation!r} or another operator of levels, or search a PlanSpace"
        )
    return space


def schedules_only(space: SearchSpace, name: str) -> None:
    """Refuses a space of plans.

    Raises:
        DiffesError: the space is one of plans; the message says what `name` needs.
    """
    if isinstance(space, PlanSpace):
        raise DiffesError(
            f"strategy {name!r} works on levels of stages and this is a space of plans of {space.n_stages} nodes; take "
            "another strategy, or search levels only"
        )
