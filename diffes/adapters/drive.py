"""Sampling runs by a pipeline's own call, which stops at every step of its scheduler and is driven from outside."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from greenlet import error as GreenletError
from greenlet import greenlet
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from diffes.errors import DiffesError
from diffes.solvers import own_of

CACHED_TEXTS = 16  # calls of `encode_prompt` whose embeddings are kept
QUIET = {"disable": True}

FirstCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a denoiser call: positional ones, and those by name."""


class Answers:
    """Shapes of what denoisers return, so that a call whose result nobody reads is answered at once.

    A pipeline that continues a run in the middle goes through the steps that are done, because it may count them. The
    calls that it makes there are answered with zeros of the shape that calls on such latents had before, in a batch of
    any size.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, torch.Size, torch.dtype], tuple[int, Any]] = {}

    def learn(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Remember the shape of an output."""
        key = _key(name, args, kwargs)
        if key not in self._known:
            shapes = tree_map_only(Tensor, lambda each: torch.empty_like(each, device="meta"), output)
            self._known[key] = len(latents_of(args, kwargs)[1]), shapes

    def of(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
        """Return zeros for a call; None where the shape of its result is not known."""
        known, latents = self._known.get(_key(name, args, kwargs)), latents_of(args, kwargs)[1]
        if known is None:
            return None
        rows, shapes = known

        def zeros(like: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
            if isinstance(like, list):
                return [torch.zeros_like(like[0], device=latents.device)] * len(latents)
            shape = (len(like) * len(latents) // rows, *like.shape[1:])
            return torch.zeros(shape, dtype=like.dtype, device=latents.device)

        return tree_map_only((Tensor, list), zeros, shapes, is_leaf=lambda each: isinstance(each, list))


class Texts:
    """Cache of the last results of a pipeline's `encode_prompt`: every evaluation asks for the same prompts."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Any] = OrderedDict()

    def remembering(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Return `encode` with this cache. Calls that are given tensors or other objects are not kept."""

        @functools.wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            plain = all(
                each is None or isinstance(each, str | int | float | torch.device | torch.dtype)
                for each in tree_leaves([args, kwargs])
            )
            if not plain:
                return encode(*args, **kwargs)
            key = repr((args, sorted(kwargs.items())))
            if key not in self._known:
                with torch.no_grad():
                    self._known[key] = encode(*args, **kwargs)
            self._known.move_to_end(key)
            while len(self._known) > CACHED_TEXTS:
                self._known.popitem(last=False)
            return self._known[key]

        return remembered


class Drive:
    """A call of a pipeline that waits at every step of its scheduler for the next latents.

    The pipeline runs in a coroutine (greenlet). While it waits, it has the scheduler and the attributes that it had
    before the call, so that several runs can take turns.

    Args:
        pipe: the pipeline.
        denoisers: names of its components that are called in every step.
        call: arguments of the call.
        scheduler: the scheduler of the run, ready: it scales the inputs and says the timesteps; its `step` is not
            called.
        index: number of calls that are done; above 0 the pipeline begins with the latents that `latents` is given.
        answers: shapes of the denoisers' results.
        texts: cache of encoded prompts.
        strength: share of the trajectory that the pipeline samples; None where it samples all of it. It then drops
            timesteps from the beginning, by their number, and is offered as many more.
        prepared: False where the pipeline is to set the scheduler's timesteps, and `first_call` leaves it after that.

    Example:
        >>> from diffes.adapters import adapter_for, load_pipeline
        >>> adapter = adapter_for(load_pipeline("fashion-dit"))
        >>> call = adapter.call_of(adapter.make_probes(1, 0), 1.0)
        >>> drive = Drive(adapter.pipe, ["transformer"], call, adapter.fresh_scheduler(4))
        >>> output, latents = drive.next()
        >>> output.shape == latents.shape
        True
        >>> drive.close()
    """

    __slots__ = ("__weakref__", "_call", "_coroutine", "_grad", "_own", "index")

    def __init__(
        self,
        pipe: Any,
        denoisers: Sequence[str],
        call: Mapping[str, Any],
        scheduler: Any,
        *,
        index: int = 0,
        answers: Answers | None = None,
        texts: Texts | None = None,
        prepared: bool = True,
        strength: float | None = None,
    ) -> None:
        self.index = index
        self._call = _Call(
            pipe, tuple(denoisers), dict(call), answers or Answers(), texts or Texts(),
            strength if prepared else None, to_answer=index,
        )  # fmt: skip
        self._call.scheduler = self._call.standing_in(scheduler) if prepared else scheduler
        self._own: dict[str, Any] = {"_progress_bar_config": QUIET}  # private attributes, as the call has set them
        self._grad = torch.is_grad_enabled()
        self._coroutine = greenlet(self._call.run)  # which knows nothing of this object, so that it can be collected
        self._coroutine.gr_context = contextvars.copy_context()

    def next(self, latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Let the pipeline go on with these latents, to its next step.

        Args:
            latents: result of the step at which it waits; of a run that begins with noise of the pipeline's own, None.

        Returns:
            The output of the denoiser, guidance included, and the latents that belong to it: what `scheduler.step` is
            called with.

        Raises:
            DiffesError: the pipeline returned without making a step.
        """
        found = self._resumed(latents)
        if self._coroutine.dead:
            raise DiffesError(
                f"{type(self._call.pipe).__name__} returned before step {self.index + 1} of its scheduler: it does not "
                "make the calls that its scheduler asks for, so diffes cannot sample with it"
            )
        self.index += 1
        return found  # type: ignore[no-any-return]

    def first_call(self) -> FirstCall:
        """Return the arguments of the first denoiser call, and leave the pipeline there."""
        self._call.leaves = True
        found: FirstCall = self._resumed(None)
        self.close()
        return found

    def output(self, latents: Tensor) -> Any:
        """Let a run whose calls are all made return what the pipeline returns for these final latents."""
        found = self._resumed(latents)
        if not self._coroutine.dead:
            self.close()
            raise DiffesError(f"{type(self._call.pipe).__name__} makes more steps than its scheduler has timesteps")
        return found

    def argument(self, name: str) -> Any:
        """Return an argument of the call; None where it has none of that name."""
        return self._call.arguments.get(name)

    def close(self) -> None:
        """Leave the pipeline where it is."""
        if self._coroutine and not self._coroutine.dead:
            self._coroutine.parent = greenlet.getcurrent()
            with self._inside():
                self._coroutine.throw()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, GreenletError):  # it was never begun, or in another thread
            self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copy of a run begins another call."""

    def _resumed(self, latents: Tensor | None) -> Any:
        self._coroutine.parent = greenlet.getcurrent()
        with self._inside():
            return self._coroutine.switch(latents)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Give the pipeline the state of this call inside the context, and its own one afterwards."""
        call, pipe = self._call, self._call.pipe
        attributes, grad = pipe.__dict__, torch.is_grad_enabled()
        names = ("scheduler", "encode_prompt", *call.denoisers)
        before = {name: value for name, value in attributes.items() if _is_private(name) or name in names}
        hooks: list[Any] = []
        attributes |= self._own | {"scheduler": call.scheduler}
        if hasattr(pipe, "encode_prompt"):
            attributes["encode_prompt"] = call.texts.remembering(pipe.encode_prompt)
        for name in call.denoisers:
            module = before[name]
            if call.to_answer or call.leaves:
                attributes[name] = _StandIn(module, functools.partial(call.called, name, module))
            elif self._coroutine.gr_frame is None and not self._coroutine.dead:  # the first call of the run
                hooks.append(module.register_forward_hook(functools.partial(call.learn, name), with_kwargs=True))
        torch.set_grad_enabled(self._grad)
        try:
            yield
        finally:
            self._grad = torch.is_grad_enabled()
            torch.set_grad_enabled(grad)
            self._own = {name: value for name, value in attributes.items() if _is_private(name)}
            for name in [name for name in attributes if (_is_private(name) or name in names) and name not in before]:
                del attributes[name]
            attributes |= before
            for hook in hooks:
                hook.remove()


@dataclass(eq=False)
class _Call:
    """State of a pipeline's call that its coroutine needs. It does not refer to the `Drive`, which can so be freed.

    Args:
        pipe: the pipeline.
        denoisers: names of its components that are called in every step.
        arguments: of the call.
        answers: shapes of the denoisers' results.
        texts: cache of encoded prompts.
        strength: share of the trajectory that is sampled.
        to_answer: number of steps that are left to be answered at once.
        leaves: whether the pipeline is left at its first denoiser call.
        latents: latents with which the pipeline goes on after the answered steps.
        scheduler: the one that it has.
    """

    pipe: Any
    denoisers: tuple[str, ...]
    arguments: dict[str, Any]
    answers: Answers
    texts: Texts
    strength: float | None
    to_answer: int
    leaves: bool = False
    latents: Tensor | None = None
    scheduler: Any = None

    def run(self, latents: Tensor | None) -> Any:
        self.latents = latents
        call = type(self.pipe).__call__
        if torch.is_grad_enabled():  # diffusers' calls are decorated with `torch.no_grad`
            call = inspect.unwrap(call)
        if self.strength is None:
            return call(self.pipe, **self.arguments)
        left = self.scheduler.timesteps
        for n in offers(len(left), self.strength):
            dropped = n - len(left)
            self.scheduler.timesteps = torch.cat([left[:1].expand(dropped), left])
            self.scheduler.set_begin_index = functools.partial(_begin, dropped)
            try:
                return call(self.pipe, **self.arguments | {"num_inference_steps": n})
            except _BeginsElsewhere:
                continue
        raise DiffesError(
            f"{type(self.pipe).__name__} cannot begin {len(left)} calls at strength {self.strength:g}: choose another"
        )

    def learn(self, name: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.answers.learn(name, args, kwargs, output)

    def called(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a denoiser: leave the pipeline with the arguments, or answer at once."""
        if self.leaves:
            _wait((args, kwargs))
        found = self.answers.of(name, args, kwargs) if self.to_answer else None
        if found is None:
            found = unwrapped(module).forward(*args, **kwargs)  # without hooks: only the shape of the result is wanted
            self.answers.learn(name, args, kwargs, found)
        return found

    def standing_in(self, scheduler: Any) -> Any:
        """Return a scheduler like the given one that stops at every step; the steps that are done are answered."""
        made = copy.copy(scheduler)

        @functools.wraps(scheduler.set_timesteps)
        def set_timesteps(*_args: Any, **_kwargs: Any) -> None: ...

        @functools.wraps(scheduler.step)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *_args: Any, **kwargs: Any) -> Any:
            if self.to_answer:
                self.to_answer, after = self.to_answer - 1, self.latents
                for name in () if self.to_answer else self.denoisers:  # it goes on with the denoisers themselves
                    self.pipe.__dict__[name] = self.pipe.__dict__[name]._module
            else:
                after = _wait((model_output, sample))
            if not kwargs.get("return_dict", True):
                return after, after
            return DDIMSchedulerOutput(prev_sample=after, pred_original_sample=after)

        made.set_timesteps, made.step = set_timesteps, step
        made.replaces = own_of(self.pipe.scheduler)
        made.set_begin_index = lambda *_args, **_kwargs: None
        if hasattr(scheduler, "scale_model_input"):  # schedulers of flow matching have none
            made.scale_model_input = scheduler.scale_model_input
        return made


class _BeginsElsewhere(Exception):
    """Error: a pipeline drops another number of timesteps than it was offered more."""


def _begin(expected: int, begin_index: int = 0) -> None:
    if begin_index != expected:
        raise _BeginsElsewhere


def offers(n: int, strength: float) -> list[int]:
    """Return the numbers of steps at which a pipeline makes `n` calls at a strength below 1.

    Pipelines drop the first calls by number. Some make `int(N s)` of N, others that number rounded up.

    Example:
        >>> offers(3, 0.6)
        [5, 6, 4]
    """
    near = math.floor(n / strength)
    likely = [near, near + 1, near - 1, near + 2]
    return [m for m in likely if m >= n and n in (int(m * strength), m - int(m - m * strength))]


class _StandIn:
    """Object in the place of a module: it has the module's attributes and class, but another call."""

    def __init__(self, module: Any, call: Callable[..., Any]) -> None:
        self.__dict__ |= {"_module": module, "_call": call}

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_call"](*args, **kwargs)


def unwrapped(module: Any) -> Any:
    """Return the module itself, without the wrapper of `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def _wait(found: Any) -> Any:
    """Leave the present coroutine with a value, and return what it is resumed with."""
    driver = greenlet.getcurrent().parent
    assert driver is not None
    return driver.switch(found)


def _is_private(name: str) -> bool:
    return name.startswith("_") and name != "_internal_dict"


def latents_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """Return the place of the latents in the arguments of a denoiser call, and the latents (n, ...), which some
    denoisers take as a list."""
    names = [name for name in ("hidden_states", "sample", "x") if kwargs.get(name) is not None]
    place: int | str = 0 if args and isinstance(args[0], Tensor | list) else names[0]
    found = (kwargs if isinstance(place, str) else args)[place]  # type: ignore[index]
    return place, torch.stack(found) if isinstance(found, list) else found


def _key(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, torch.Size, torch.dtype]:
    latents = latents_of(args, kwargs)[1]
    return name, latents.shape[1:], latents.dtype
