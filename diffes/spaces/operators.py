"""Mutations and crossovers by name: those of diffes, of other packages, and of DEAP."""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from deap import tools

from diffes.errors import DiffesError, PluginError, unknown_name
from diffes.plugins import guarded, own_trace, unexpected
from diffes.registry import Registry
from diffes.spaces.genome import Genome, Origin
from diffes.spaces.space import SearchSpace

Operator = Callable[..., tuple[Any, ...]]
T = TypeVar("T", bound=Callable[..., Any])
DEAP = "deap."  # prefix of the names of DEAP's own operators
OURS = ("space", "rng")  # parameters of an operator that was written for diffes
DEFAULT_OF = "default_of"  # attribute of an operator: by the kind of space and of search, the operator and its options


def mended(genome: Any, space: SearchSpace, rng: np.random.Generator) -> Any:
    """Return the genome itself, repaired in place if it is not feasible. Most operators end with this."""
    if not space.is_feasible(genome):
        genome[:] = space.repair(genome, rng)
    return genome


@contextmanager
def confined(rng: np.random.Generator) -> Iterator[None]:
    """Seed Python's and numpy's global random generators from `rng` for the block, and restore them after it.

    `rng` then decides what DEAP's own operators and selections draw, and nothing outside the block changes.
    """
    python, legacy = random.getstate(), np.random.get_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


class PlainOperator:
    """Operator that does not know diffes, as DEAP's own, adapted to keep the budget.

    It draws from the global `random`, which is seeded while it runs and restored after. Its bounds (`low` and `up`), if
    it has them, come from the space. What it returns is rounded to whole levels and repaired to the budget.

    Args:
        name: for messages.
        function: `(genome, **options) -> (genome,)`, or with two genomes for a crossover.
        n_parents: number of genomes that it takes.
    """

    def __init__(self, name: str, function: Operator, n_parents: int) -> None:
        self.name = name
        self.function = function
        given: list[inspect.Parameter] = []
        options: list[inspect.Parameter] = []
        for parameter in list(inspect.signature(function).parameters.values()):
            if len(given) < n_parents:
                given.append(parameter.replace(kind=inspect.Parameter.POSITIONAL_ONLY))
            elif parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        self._bounded = [option.name for option in options if option.name in ("low", "up")]
        options = [option.replace(default=None) if option.name in self._bounded else option for option in options]
        ours = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in OURS]
        self.__signature__ = inspect.Signature([*given, *ours, *options])
        self.__doc__ = function.__doc__

    def __call__(self, *genomes: Any, space: SearchSpace, rng: np.random.Generator, **options: Any) -> tuple[Any, ...]:
        bounds = {"low": 0, "up": space.max_level}
        filled = {name: bounds[name] for name in self._bounded} | options
        try:
            with confined(rng):
                results = self.function(*genomes, **filled)
            if not isinstance(results, tuple) or len(results) != len(genomes):
                raise unexpected(f"operator {self.name!r}", f"return a tuple of {len(genomes)} genomes", results)
            made = [_whole(genome) for genome in results]
        except DiffesError:
            raise
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise PluginError(
                f"operator {self.name!r} fails on a genome of {space.n_stages} levels from 0 to {space.max_level} "
                f"({type(error).__name__}: {error}). Choose an operator for lists of whole numbers",
                "" if self.name.startswith(DEAP) else own_trace(error),
            ) from error
        for genome in made:
            if len(genome) != space.n_stages:
                raise DiffesError(
                    f"operator {self.name!r} returned a genome of {len(genome)} levels, and it must have "
                    f"{space.n_stages}. Choose an operator that keeps the length."
                )
        return tuple(mended(genome, space, rng) for genome in made)


def _whole(genome: Any) -> Any:
    """Round a genome to whole levels, in place where it is a list."""
    levels = [round(level) for level in genome]
    if not isinstance(genome, list):
        return levels
    genome[:] = levels
    return genome


class OperatorRegistry(Registry[Operator]):
    """Registry of operators; `deap.NAME` is one of DEAP's. Plain ones, which take no `space` and `rng`, are adapted.

    Args:
        kind: "mutation" or "crossover".
        group: entry-point group.
        prefix: prefix of DEAP's names of this kind.
        n_parents: number of genomes that an operator takes.
    """

    def __init__(self, kind: str, group: str, prefix: str, n_parents: int) -> None:
        super().__init__(kind, group)
        self._prefix = prefix
        self.n_parents = n_parents

    def get(self, name: str) -> Operator:
        """Return the operator of that name, in the form described at `mutation`; errors as for any registry."""
        function = self._of_deap(name) if name.startswith(DEAP) else super().get(name)
        if set(OURS) & set(inspect.signature(function).parameters):
            return function
        return PlainOperator(name, function, self.n_parents)

    def default(self, space: SearchSpace, *, small: bool = False) -> str:
        """Return the spec of the operator that was written as the default of a kind of space, by `default_of`.

        Args:
            space: the feasible schedules. The default of its class goes before those of the base classes.
            small: whether it is for a search that takes small steps.

        Raises:
            DiffesError: there is no such operator, or several.
        """
        for kind in type(space).__mro__:
            found = [f"{name}:{options}" if options else name for name, options in self._defaults(kind, small)]
            if len(found) > 1:
                raise DiffesError(
                    f"{' and '.join(found)} are both the default {self.kind} of {kind.__name__}. Choose one of them by "
                    "its name."
                )
            if found:
                return found[0]
        raise DiffesError(
            f"no installed {self.kind} is the default of {type(space).__name__}. Choose one by its name: "
            f"{', '.join(self.names()) or 'none is installed'}."
        )

    def _defaults(self, kind: type, small: bool) -> Iterator[tuple[str, str]]:
        """Yield the name and options of each operator that is the default of a class, once.

        Those that do not import are left out, and so are wrappers, which have the attributes of what they wrap.
        """
        seen: list[Operator] = []
        for name in self.names():
            with suppress(DiffesError):
                function = super().get(name)
                marked, options = getattr(function, DEFAULT_OF, {}).get((kind, small), (None, ""))
                if marked is function and function not in seen:
                    seen.append(function)
                    yield name, options

    def _of_deap(self, name: str) -> Operator:
        known = {
            f"{DEAP}{each}": function
            for each, function in vars(tools).items()
            if each.startswith(self._prefix) and inspect.isfunction(function)
        }
        if name not in known:
            raise unknown_name(self.kind, name, known)
        return known[name]


def default_of(space: type[SearchSpace], *, small: bool = False, options: str = "") -> Callable[[T], T]:
    """Make an operator the default of a kind of space, as a decorator: it is taken where the user names none.

    Args:
        space: class of the spaces. Classes derived from it share the default, unless they have their own.
        small: whether it is for searches that take small steps.
        options: options of the default: "max_moves=1".
    """

    def mark(function: T) -> T:
        function.__dict__.setdefault(DEFAULT_OF, {})[space, small] = function, options
        return function

    return mark


MUTATIONS = OperatorRegistry("mutation", "diffes.mutations", "mut", 1)
CROSSOVERS = OperatorRegistry("crossover", "diffes.crossovers", "cx", 2)


def mutation(name: str) -> Callable[[Operator], Operator]:
    """Register `function(genome, *, space, rng, **params) -> (genome,)` under a name, as a decorator.

    The function follows DEAP's convention, with its generator as an argument: `genome` is a list of S levels that it
    may change in place, `space` a `SearchSpace`, `rng` a `numpy.random.Generator` and its only source of randomness. It
    maps feasible genomes to feasible ones; `space.is_feasible` and `space.repair(genome, rng)` help with that. Further
    parameters are options: `--mutation name:param=value`. `diffes.testing.MutationConformance` checks all of it.

    A plain DEAP operator, `function(individual, **params) -> (individual,)`, works too: what it draws from the global
    `random` is seeded, and what it returns is repaired to the budget.
    """
    return MUTATIONS.register(name)


def crossover(name: str) -> Callable[[Operator], Operator]:
    """Register `function(one, other, *, space, rng, **params) -> (one, other)` under a name, as a decorator.

    It maps two feasible genomes to two feasible ones, under the same conditions as a mutation.
    """
    return CROSSOVERS.register(name)


class BoundOperator:
    """Mutation or crossover of a toolbox: an operator with its space, generator and options.

    Genomes that it returns have no fitness. Their `origin` names the operator and the last measured ancestors.

    Args:
        registry: registry that has the operator.
        spec: its name, with options after a colon.
        space: the feasible schedules.
        rng: source of its random draws.

    Raises:
        DiffesError: there is no such operator, or it takes no such options.
    """

    def __init__(self, registry: OperatorRegistry, spec: str, space: SearchSpace, rng: np.random.Generator) -> None:
        self.spec = spec
        self._space = space
        found = registry.parse(spec)[0]
        self._written = found.function if isinstance(found, PlainOperator) else found
        self._function = registry.bind(spec, registry.n_parents, space=space, rng=rng)

    def __call__(self, *genomes: Genome) -> tuple[Genome, ...]:
        origin = self._origin(genomes)
        what, wanted = f"operator {self.spec!r}", f"return a tuple of {len(genomes)} genomes"
        with guarded(self._written, what, wanted):
            results = self._function(*genomes)
        if not isinstance(results, tuple) or len(results) != len(genomes):
            raise unexpected(what, wanted, results)
        made = []
        for result in results:
            genome = self._checked(result)
            del genome.fitness.values
            genome.origin = origin
            made.append(genome)
        return tuple(made)

    def _checked(self, result: Any) -> Genome:
        """Return what an operator made as a genome, checked."""
        what, n = f"operator {self.spec!r}", self._space.n_stages
        try:
            levels = [operator.index(level) for level in result]
        except TypeError:
            levels = []
        if len(levels) != n:
            raise unexpected(what, f"return genomes of {n} whole levels", result)
        if not self._space.is_feasible(levels):
            raise unexpected(what, "return genomes that meet the budget (space.repair(genome, rng) makes one)", result)
        if not (isinstance(result, list) and hasattr(result, "fitness")):
            return Genome(levels)
        result[:] = levels
        return result  # type: ignore[return-value]  # a genome, or an individual of DEAP's `creator`

    def _origin(self, genomes: Sequence[Genome]) -> Origin:
        operators: list[str] = []
        parents: list[tuple[int, ...]] = []
        for genome in genomes:
            before = getattr(genome, "origin", None)  # individuals of DEAP's `creator` have none at first
            if before is not None and not genome.fitness.valid:  # changed since it was measured
                operators += before.operator.split(" + ")
                parents += before.parents
            else:
                parents.append(tuple(genome))
        return Origin(" + ".join(dict.fromkeys([*operators, self.spec])), tuple(dict.fromkeys(parents)))
