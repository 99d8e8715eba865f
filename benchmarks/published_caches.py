"""Published caches of diffusion models, each put on a copy of a denoiser as its own package does it.

Those of diffusers (`diffusers.hooks`) are put on by its `apply_*` functions: `enable_cache` belongs to models that
declare it, and neither `UNet2DConditionModel` nor `DiTTransformer2DModel` does. DeepCache and cache-dit come from the
package registry, and are no dependencies of diffes.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache
from diffusers.hooks.sea_cache import SeaCacheConfig, apply_sea_cache

from diffes.adapters import ModelAdapter, Probes
from diffes.solvers.scheduler import PlanScheduler
from diffes.spaces.plan import trailing

EVERYWHERE = (-1, 1001)  # timesteps
BRANCHES = [r".*attn\d", r".*\.ff"]
BLOCKS = [r".*transformer_blocks\.\d+"]
MAG_STEPS = 20  # of the run that MagCache's ratios are measured on
Knob = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What a cache is put on.

    Args:
        denoiser: a copy, used for one run.
        scheduler: of the run, ready.
        timestep: gives that of the present call.
        adapter: of the model itself.
        probes: calibration probes, for caches that measure something first.
        guidance: of the run.
    """

    denoiser: Any
    scheduler: Any
    timestep: Callable[[], float]
    adapter: ModelAdapter
    probes: Probes
    guidance: float

    @property
    def steps(self) -> int:
        """Calls of the run."""
        return len(self.scheduler.timesteps)


@dataclass(frozen=True)
class Published:
    """A published cache.

    Args:
        name: of its row.
        knobs: settings to choose from.
        install: puts it on a copy.
    """

    name: str
    knobs: Sequence[Knob]
    install: Callable[[Target, Knob], None]


@contextlib.contextmanager
def cached(
    cache: Published, knob: Knob, adapter: ModelAdapter, scheduler: Any, probes: Probes, guidance: float
) -> Iterator[None]:
    """The pipeline with a fresh copy of its denoiser that has the cache on, for one run; afterwards its own again."""
    pipe: Any = adapter.pipe
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    own, seen = getattr(pipe, name), [0.0]
    copied = copy.deepcopy(own)
    copied.register_forward_pre_hook(
        lambda _, args, kwargs: seen.__setitem__(0, adapter.timestep(args, kwargs)), with_kwargs=True
    )
    cache.install(Target(copied, scheduler, lambda: seen[0], adapter, probes, guidance), knob)
    setattr(pipe, name, copied)
    try:
        yield
    finally:
        setattr(pipe, name, own)


def _deep_cache(target: Target, knob: Knob) -> None:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(SimpleNamespace(unet=target.denoiser, scheduler=target.scheduler))
    helper.set_params(cache_interval=knob["interval"], cache_branch_id=knob["branch"])
    helper.enable()


def _first_block(target: Target, knob: Knob) -> None:
    hooks.apply_first_block_cache(target.denoiser, hooks.FirstBlockCacheConfig(threshold=knob["threshold"]))
    _in_context(target)


def _pyramid(target: Target, knob: Knob) -> None:
    every = {
        f"{kind}_attention_{name}": knob[value]
        for kind in ("spatial", "cross")
        for name, value in (("block_skip_range", "interval"), ("timestep_skip_range", "within"))
    }
    config = hooks.PyramidAttentionBroadcastConfig(**every, current_timestep_callback=target.timestep)
    hooks.apply_pyramid_attention_broadcast(target.denoiser, config)


def _faster(target: Target, knob: Knob) -> None:
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=knob["interval"], spatial_attention_timestep_skip_range=knob["within"],
        attention_weight_callback=lambda _: knob["weight"], tensor_format="BCHW", is_guidance_distilled=True,
        current_timestep_callback=target.timestep,
    )  # fmt: skip
    hooks.apply_faster_cache(target.denoiser, config)


def _taylor(target: Target, knob: Knob) -> None:
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=knob["interval"], max_order=knob["order"], disable_cache_before_step=knob["order"] + 1,
        taylor_factors_dtype=torch.float32, cache_identifiers=list(knob["of"]),
    )  # fmt: skip
    hooks.apply_taylorseer_cache(target.denoiser, config)
    _in_context(target)


@functools.cache
def _mag_ratios(adapter: ModelAdapter, probes: Probes, guidance: float) -> list[float]:
    """What MagCache wants to know of a model, as its own documentation measures it: a run of it prints them."""
    measured = Published("", (), lambda at, _: apply_mag_cache(at.denoiser, MagCacheConfig(
        calibrate=True, num_inference_steps=MAG_STEPS)))  # fmt: skip
    steps = PlanScheduler.of(adapter.pipe.scheduler, trailing(MAG_STEPS, adapter.n_timesteps), "dpmsolver++")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), cached(measured, {}, adapter, steps, probes, guidance):
        adapter.sample(probes, steps, guidance)
    found = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    if not found:
        raise ValueError("MagCache found no transformer blocks on the model")
    ratios: list[float] = ast.literal_eval(found[0])
    return ratios


def _mag(target: Target, knob: Knob) -> None:
    config = MagCacheConfig(
        threshold=knob["threshold"], max_skip_steps=knob["skips"], retention_ratio=knob["retention"],
        num_inference_steps=target.steps,
        mag_ratios=torch.tensor(_mag_ratios(target.adapter, target.probes, target.guidance)),
    )  # fmt: skip
    apply_mag_cache(target.denoiser, config)


def _sea(target: Target, knob: Knob) -> None:
    apply_sea_cache(target.denoiser, SeaCacheConfig(threshold=knob["threshold"], raw_vision_callback=_frames))
    _in_context(target)


def _frames(_module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Latents as SeaCache takes them: videos (C, 1, h, w) of one frame each."""
    return list((args[0] if args else kwargs["hidden_states"])[:, :, None])


def _cache_dit(target: Target, knob: Knob) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=knob["first"], Bn_compute_blocks=0, residual_diff_threshold=knob["threshold"],
        max_warmup_steps=1, num_inference_steps=target.steps, enable_separate_cfg=False,
    )  # fmt: skip
    cache_dit.enable_cache(target.denoiser, cache_config=config)


def _in_context(target: Target) -> None:
    """What a pipeline's `cache_context` does before each call: says whose state is kept, and where the run is."""
    timesteps = [float(t) for t in target.scheduler.timesteps]

    def enter(module: Any, _args: Any, _kwargs: Any) -> None:
        i = timesteps.index(target.timestep())
        noise = float(
            target.scheduler.sigmas[i]
        )  # over signal; what follows is the share of noise, as flow models count
        share = noise / (1 + noise)
        _set_cache_context(module, CacheContext("run", step_index=i, sigma=share, num_inference_steps=len(timesteps)))

    target.denoiser.register_forward_pre_hook(enter, with_kwargs=True)


def _grid(**choices: Sequence[Any]) -> list[Knob]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


_THRESHOLDS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
_WITHIN = ((100, 800), EVERYWHERE)
PUBLISHED = (
    Published("DeepCache", _grid(interval=(2, 3, 4), branch=(0, 1, 3)), _deep_cache),
    Published("diffusers FirstBlockCache", _grid(threshold=_THRESHOLDS), _first_block),
    Published("diffusers PyramidAttentionBroadcast", _grid(interval=(2, 3, 4), within=_WITHIN), _pyramid),
    Published(
        "diffusers FasterCache", _grid(interval=(2, 3), within=((-1, 681), EVERYWHERE), weight=(0.0, 0.5)), _faster
    ),
    Published("diffusers TaylorSeer", _grid(interval=(2, 3), order=(0, 1), of=(BRANCHES, BLOCKS)), _taylor),
    Published(
        "diffusers MagCache", _grid(threshold=(0.003, 0.01, 0.03, 0.1), skips=(1, 2), retention=(0.0, 0.2)), _mag
    ),
    Published("diffusers SeaCache", _grid(threshold=_THRESHOLDS), _sea),
    Published("cache-dit DBCache", _grid(first=(1, 2), threshold=_THRESHOLDS), _cache_dit),
)
