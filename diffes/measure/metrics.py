"""Metrics by name; of scores higher is better, whatever a metric's own direction is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffes.errors import DiffesError, unknown_name
from diffes.plugins import guarded, unexpected
from diffes.registry import Registry

if TYPE_CHECKING:
    from diffes.adapters import Condition

Space = Literal["latent", "image"]
MetricFunction = Callable[..., Tensor]
METRICS: Registry[MetricFunction] = Registry("metric", "diffes.metrics")


@dataclass(frozen=True)
class Metric:
    """A score per probe.

    Args:
        name: as the user wrote it.
        space: whether it reads final latents or decoded images.
        higher_is_better: whether a higher value of the function is a better one.
        function: from outputs (n, ...), outputs of the dense model (n, ...) and, if it has a parameter of that name, n
            `conditions`, to values (n,).

    Raises:
        DiffesError: the space is neither "latent" nor "image", or `higher_is_better` is no bool.
    """

    name: str
    space: Space
    higher_is_better: bool
    function: MetricFunction

    def __post_init__(self) -> None:
        if self.space not in get_args(Space):
            raise unexpected(f"space of metric {self.name!r}", "be 'latent' or 'image'", self.space)
        if not isinstance(self.higher_is_better, bool):
            raise unexpected(f"higher_is_better of metric {self.name!r}", "be True or False", self.higher_is_better)

    @torch.no_grad()
    def __call__(self, outputs: Tensor, references: Tensor, conditions: Sequence[Condition] = ()) -> Tensor:
        """Return scores (n,) in fp64 on the CPU, higher is better; one that is no finite number becomes -inf, a
        failure.

        Args:
            outputs: (n, ...) latents, or images (n, channels, height, width) in [0, 1].
            references: (n, ...) the same of the dense model, from the same noise.
            conditions: n class ids or prompts; not needed where the function has no such parameter.
        """
        what, wanted = f"metric {self.name!r}", f"return a tensor of {len(outputs)} scores, one a probe"
        with guarded(self.function, what, wanted):
            given = {"conditions": conditions} if _reads_conditions(self.function) else {}
            scores = self.function(outputs.float(), references.float(), **given)
        if not isinstance(scores, Tensor) or scores.is_complex():
            raise unexpected(what, wanted, scores)
        if scores.numel() != len(outputs):
            raise DiffesError(f"{what} gave {scores.numel()} scores for {len(outputs)} probes; it must {wanted}")
        scores = scores.reshape(-1).cpu().double() * (1 if self.higher_is_better else -1)
        return scores.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _reads_conditions(function: MetricFunction) -> bool:
    try:
        return "conditions" in inspect.signature(function).parameters
    except ValueError:  # some functions of C have no signature
        return False


def metric(name: str, *, space: Space = "latent", higher_is_better: bool = True) -> Callable[[MetricFunction], Metric]:
    """Register `function(outputs, references) -> values (n,)` as a metric, as a decorator. The decorated name is then
    the metric, which returns scores; its `function` is the function as it was written.

    The function gets the outputs of n probes, and those of the dense model from the same noise, in fp32 on the model's
    device. If it has a parameter `conditions`, it also gets the n class ids or prompts of the probes.

    Args:
        name: name of the metric.
        space: what it reads: final latents (n, C, h, w), or images (n, channels, height, width) in [0, 1].
        higher_is_better: False for errors and distances.

    Raises:
        DiffesError: the space is neither "latent" nor "image", or `higher_is_better` is no bool.

    Example:
        >>> @metric("largest_error", space="image", higher_is_better=False)
        ... def largest_error(outputs, references):
        ...     return (outputs - references).abs().flatten(1).amax(1)
        >>> largest_error(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)).tolist()
        [-0.5, -0.5]
        >>> METRICS.unregister("largest_error")
    """

    def add(function: MetricFunction) -> Metric:
        made = Metric(name, space, higher_is_better, function)
        METRICS.register(name)(made)
        return made

    return add


@METRICS.register("latent_mse")
def latent_mse(outputs: Tensor, references: Tensor) -> Tensor:
    """Return the negative mean squared difference of the final latents (n, C, h, w)."""
    return -(outputs - references).square().flatten(1).mean(1)


@METRICS.register("latent_cosine")
def latent_cosine(outputs: Tensor, references: Tensor) -> Tensor:
    """Return the cosine of the final latents (n, C, h, w), in [-1, 1]."""
    return F.cosine_similarity(outputs.flatten(1), references.flatten(1))


def check_metric(name: str) -> None:
    """Check that a metric is registered, or one of pyiqa's.

    Raises:
        DiffesError: its name is unknown.
    """
    if name not in METRICS.names() and name not in (known := _pyiqa().list_models()):
        raise unknown_name("metric", name, [*METRICS.names(), *known])


def _pyiqa() -> Any:
    """Import pyiqa, which takes seconds, so only where it is needed."""
    try:
        import pyiqa
    except ImportError as error:
        raise DiffesError(f"metrics other than {', '.join(METRICS.names())} need pyiqa: {error}") from error
    return pyiqa


def make_metric(name: str, device: torch.device) -> Metric:
    """Make a metric: a registered one, else any of pyiqa's by its name there. A registered function that `metric` does
    not decorate reads latents, and higher is better.

    Raises:
        DiffesError: the name is unknown, or pyiqa lacks a weight file and cannot fetch it.
    """
    if name in METRICS.names():
        found = METRICS.get(name)
        return replace(found, name=name) if isinstance(found, Metric) else Metric(name, "latent", True, found)
    check_metric(name)
    try:
        model = _pyiqa().create_metric(name, device=device, as_loss=False)
    except Exception as error:  # each metric fails in its own way without its weights
        folder = Path(torch.hub.get_dir()) / "pyiqa"
        reason = " ".join(str(error).split())[:300]
        raise DiffesError(
            f"pyiqa metric {name!r} could not be set up ({type(error).__name__}: {reason}); where a weight file is "
            f"missing, let pyiqa fetch it once with network access or put it into {folder}"
        ) from error
    return Metric(name, "image", not model.lower_better, _pyiqa_function(model))


def _pyiqa_function(model: Any) -> MetricFunction:
    """Wrap a pyiqa model so that it takes one channel or three, and an image that is broken fails alone."""

    def score(outputs: Tensor, references: Tensor) -> Tensor:
        broken = ~torch.isfinite(outputs).flatten(1).all(1)  # pyiqa refuses a batch with one such image in it
        outputs = outputs.masked_fill(broken[:, None, None, None], 0)
        pair = [images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1) for images in (outputs, references)]
        scores = (model(*pair) if model.metric_mode == "FR" else model(pair[0])).reshape(-1)
        return scores.masked_fill(broken, math.nan) if len(scores) == len(outputs) else scores

    return score
