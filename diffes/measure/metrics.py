"""Metrics by name; for all of them higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffes.errors import DiffesError, unknown_name
from diffes.plugins import guarded, unexpected
from diffes.registry import Registry

MetricFunction = Callable[[Tensor, Tensor], Tensor]
METRICS: Registry[MetricFunction] = Registry("metric", "diffes.metrics")


@dataclass(frozen=True)
class Metric:
    """A score per probe.

    Args:
        name: as the user wrote it.
        space: whether it reads final latents or decoded images.
        needs_reference: whether it compares with the dense model's output from the same noise.
        function: from (n, ...) outputs and (n, ...) dense outputs to (n,) scores, higher is better.
    """

    name: str
    space: Literal["latent", "image"]
    needs_reference: bool
    function: MetricFunction

    @torch.no_grad()
    def __call__(self, outputs: Tensor, references: Tensor) -> Tensor:
        """Return scores (n,) in fp64 on the CPU; one that is no finite number becomes -inf, a failure."""
        what, wanted = f"metric {self.name!r}", f"return a tensor of {len(outputs)} scores, one a probe"
        with guarded(self.function, what, wanted):
            scores = self.function(outputs.float(), references.float())
        if not isinstance(scores, Tensor) or scores.is_complex():
            raise unexpected(what, wanted, scores)
        if scores.numel() != len(outputs):
            raise DiffesError(f"{what} gave {scores.numel()} scores for {len(outputs)} probes; it must {wanted}")
        return scores.reshape(-1).cpu().double().nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


@METRICS.register("latent_mse")
def latent_mse(outputs: Tensor, references: Tensor) -> Tensor:
    """Return the negative mean squared difference of the final latents (n, C, h, w)."""
    return -(outputs - references).square().flatten(1).mean(1)


@METRICS.register("latent_cosine")
def latent_cosine(outputs: Tensor, references: Tensor) -> Tensor:
    """Return the cosine of the final latents (n, C, h, w), in [-1, 1]."""
    return F.cosine_similarity(outputs.flatten(1), references.flatten(1))


def make_metric(name: str, device: torch.device) -> Metric:
    """Make a metric: a registered latent one, else any of pyiqa's by its name there.

    Raises:
        DiffesError: the name is unknown, or pyiqa lacks a weight file and cannot fetch it.
    """
    if name in METRICS.names():
        return Metric(name, "latent", True, METRICS.get(name))
    try:
        import pyiqa  # takes seconds to import, so only where it is needed
    except ImportError as error:
        raise DiffesError(f"metric {name!r} needs pyiqa, which does not import: {error}") from error
    known = pyiqa.list_models()
    if name not in known:
        raise unknown_name("metric", name, [*METRICS.names(), *known])
    try:
        model = pyiqa.create_metric(name, device=device, as_loss=False)
    except Exception as error:  # each metric fails in its own way without its weights
        folder = Path(torch.hub.get_dir()) / "pyiqa"
        reason = " ".join(str(error).split())[:300]
        raise DiffesError(
            f"pyiqa metric {name!r} could not be set up ({type(error).__name__}: {reason}); where a weight file is "
            f"missing, let pyiqa fetch it once with network access or put it into {folder}"
        ) from error
    return Metric(name, "image", model.metric_mode == "FR", _pyiqa_function(model))


def _pyiqa_function(model: Any) -> MetricFunction:
    """Wrap a pyiqa model so that it takes three channels and higher is better."""
    sign = -1.0 if model.lower_better else 1.0

    def score(outputs: Tensor, references: Tensor) -> Tensor:
        broken = ~torch.isfinite(outputs).flatten(1).all(1)  # pyiqa refuses a batch with one such image in it
        outputs = outputs.masked_fill(broken[:, None, None, None], 0)
        pair = [images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1) for images in (outputs, references)]
        scores = (model(*pair) if model.metric_mode == "FR" else model(pair[0])).reshape(-1)
        return (sign * scores).masked_fill(broken, math.nan) if len(scores) == len(outputs) else scores

    return score
