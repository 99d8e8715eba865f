"""Noise process of a model: how much signal and noise its latents hold, and what its network predicts of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffes.errors import DiffesError

Floats = NDArray[np.float64]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
LEAST_SIGNAL = 2.0**-12  # least alpha: pure noise has no logarithm of its signal; its square is diffusers' bound


@dataclass(frozen=True)
class Noise:
    """Signal and noise at one timestep: latents are `alpha * clean + sigma * noise`.

    Args:
        alpha: scale of the signal, in (0, 1].
        sigma: scale of the noise, in [0, 1]; 0 at the end of sampling.

    Example:
        >>> round(Noise(0.6, 0.8).log_snr, 4)
        -0.2877
    """

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Natural logarithm of alpha over sigma: half the logarithm of the signal-to-noise ratio in variances."""
        return float(np.log(self.alpha) - np.log(self.sigma)) if self.sigma else float("inf")

    def clean(self, latents: Tensor, output: Tensor, prediction: str) -> Tensor:
        """Return the clean latents that an output of the network stands for, of the same shape.

        Args:
            latents: latents that the network was given.
            output: output of the network, guidance included.
            prediction: what the network is trained to predict.
        """
        if prediction == "epsilon":
            return (latents - self.sigma * output) / self.alpha
        if prediction == "v_prediction":
            return self.alpha * latents - self.sigma * output
        if prediction == "flow_prediction":
            return latents - self.sigma * output
        return output


END = Noise(1.0, 0.0)


def own_of(scheduler: Any) -> Any:
    """Return the pipeline's own scheduler, also where a plan's scheduler has taken its place."""
    return getattr(scheduler, "replaces", None) or scheduler


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """Signal and noise at every training timestep, and what the network predicts.

    Args:
        alphas: (T,) scales of the signal.
        sigmas: (T,) scales of the noise, rising.
        prediction: "epsilon" (the noise), "v_prediction", "sample" (the clean latents) or "flow_prediction" (noise
            minus clean latents).

    Flow matching has `alpha = 1 - sigma`, and timestep `t` stands for `sigma = (t + 1) / T`. A network of that kind is
    told `T sigma = t + 1`. Shifts of sigmas, by resolution or by `mu`, only choose timesteps, so they belong to a
    schedule of steps and not to the process.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> process = NoiseProcess.of(DDIMScheduler())
        >>> process.prediction, len(process.alphas), round(process.at(999).sigma, 4), process.told_at(999)
        ('epsilon', 1000, 1.0, 999)
        >>> flow = NoiseProcess.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
        >>> flow.prediction, flow.at(499), flow.told_at(499)
        ('flow_prediction', Noise(alpha=0.5, sigma=0.5), 500)
    """

    alphas: Floats
    sigmas: Floats
    prediction: Prediction

    @classmethod
    def of(cls, scheduler: Any) -> NoiseProcess:
        """Read the process of a scheduler from its own tables.

        Args:
            scheduler: a scheduler of diffusers with `alphas_cumprod`, one of flow matching, or one of ours in the place
                of such.

        Raises:
            DiffesError: the scheduler has another process, or predicts something unknown.
        """
        scheduler = own_of(scheduler)
        config, name = scheduler.config, type(scheduler).__name__
        prediction = config.get("prediction_type", "epsilon")
        flows = bool(config.get("use_flow_sigmas")) or prediction == "flow_prediction"
        if flows or (name.startswith("FlowMatch") and not hasattr(scheduler, "alphas_cumprod")):
            if config.get("invert_sigmas"):
                raise DiffesError(f"{name} counts its sigmas from the clean end (invert_sigmas), which plans do not")
            n = int(config.num_train_timesteps)
            sigmas = np.arange(1, n + 1) / n
            return cls(np.maximum(1 - sigmas, LEAST_SIGNAL**2), sigmas, "flow_prediction")
        if not hasattr(scheduler, "alphas_cumprod"):
            raise DiffesError(
                f"{name} does not count in training timesteps, of which stages and plans are made: it has no table of "
                "signal and noise. Give the pipeline another scheduler, for instance with "
                "EulerDiscreteScheduler.from_config."
            )
        signal = scheduler.alphas_cumprod.double().cpu().numpy()
        signal = np.where(signal > 0, signal, LEAST_SIGNAL**2)  # zero terminal SNR, with diffusers' bound
        if prediction not in get_args(Prediction):
            raise DiffesError(f"prediction_type must be one of {', '.join(get_args(Prediction))}, got {prediction!r}")
        return cls(np.sqrt(signal), np.sqrt(1 - signal), prediction)

    @property
    def flows(self) -> bool:
        """True where the process is that of flow matching."""
        return self.prediction == "flow_prediction"

    def at(self, timestep: int) -> Noise:
        """Return signal and noise at a training timestep in [0, T)."""
        return Noise(float(self.alphas[timestep]), float(self.sigmas[timestep]))

    def along(self, timesteps: list[int] | tuple[int, ...]) -> list[Noise]:
        """Return signal and noise (n + 1,) at each of n timesteps and at the end of sampling."""
        return [*map(self.at, timesteps), END]

    def told(self, timesteps: Tensor) -> Tensor:
        """Return what the network is told at training timesteps (n,)."""
        return timesteps + 1.0 if self.flows else timesteps

    def told_at(self, timestep: int) -> int:
        """Return what the network is told at a training timestep."""
        return timestep + self.flows
