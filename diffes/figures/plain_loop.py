"""Python program that runs a plan in plain torch, for the card of an exported folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffes.adapters import ClassifierFreeGuidance
from diffes.files import shipped_models
from diffes.forms import FrontRecord
from diffes.solvers import END, Noise, coefficients
from diffes.spaces.schedule import Plan

CLEAN = {"epsilon": "(x - s * out) / a", "v_prediction": "a * x - s * out", "sample": "out"}
GUIDED = "\n    no, yes = out.chunk(2)\n    out = no + {guidance!r} * (yes - no)"


WRITTEN_OUT = {"DiTPipeline", "StableDiffusionXLPipeline"}  # pipelines whose denoiser calls are written below


def is_written_out(pipeline: type) -> bool:
    """Return True where `plain_loop` knows the denoiser calls of a class of pipelines.

    Example:
        >>> from diffusers import DiTPipeline, FluxPipeline
        >>> is_written_out(DiTPipeline), is_written_out(FluxPipeline)
        (True, False)
    """
    return bool(WRITTEN_OUT & {each.__name__ for each in pipeline.__mro__})


def rows_of(plan: Plan, sigmas: Sequence[float], flows: bool = False) -> Sequence[Sequence[float]]:
    """Return the coefficients of each call of a plan; without fitted ones, compute them from noise over signal.

    Args:
        plan: the plan.
        sigmas: noise over signal at each call.
        flows: whether the process is that of flow matching, in which signal and noise add up to 1.
    """
    if plan.coefficients is not None:
        return plan.coefficients
    sizes = [1 + sigma if flows else (1 + sigma**2) ** 0.5 for sigma in sigmas]
    noises = [Noise(1 / size, sigma / size) for size, sigma in zip(sizes, sigmas, strict=True)]
    return coefficients(plan.solver, [*noises, END])


def plain_loop(plan: Plan, front: FrontRecord, model: str, name: str, pipeline: Any) -> str:
    """Return a program of at most 25 lines that samples two images of a plan, with its own loop and arithmetic.

    Args:
        plan: the plan that the program runs.
        front: its front, with the plan's point only.
        model: name, path or hub id of the base model.
        name: name of the exported folder.
        pipeline: class of the base model's pipeline.
    """
    (point,), guidance = front.points, front.guidance
    branches = ClassifierFreeGuidance(guidance).branches
    guided = branches > 1
    if any(plan.levels):
        imports, opened = "import diffes\nimport torch", f'diffes.load("{name}", device="cpu")  # it prunes each call'
    elif model in shipped_models():
        imports, opened = "import torch\nfrom diffes import load_pipeline  # ships it", f'load_pipeline("{model}")'
    else:
        imports = "import torch\nfrom diffusers import DiffusionPipeline"
        opened = f'DiffusionPipeline.from_pretrained("{model}")'
    if "class_labels" in inspect.signature(pipeline.__call__).parameters:
        net, given = "pipe.transformer", "[1000, 1000, 0, 1]" if guided else "[0, 1]"
        conditions = [f"labels = torch.tensor({given})" + ("  # 1000 is no class" if guided else "")]
        call = f"net(inputs, timestep=torch.full(({2 * branches},), t), class_labels=labels).sample[:, : x.shape[1]]"
    else:
        net, prompts = "pipe.unet", '["a big fox on a purple background"] * 2'
        conditions = [
            f"text, none, pooled, none_pooled = pipe.encode_prompt({prompts}, do_classifier_free_guidance=True)",
            "side = net.config.sample_size * pipe.vae_scale_factor",
            "sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=x.dtype)",
        ]
        if guided:
            conditions.append("text, pooled = torch.cat([none, text]), torch.cat([none_pooled, pooled])")
        conditions.append('added = {"text_embeds": pooled, "time_ids": sizes.expand(len(text), 6)}')
        call = "net(inputs, t, encoder_hidden_states=text, added_cond_kwargs=added).sample"
    coefficients_of = [[float(f"{each:.9g}") for each in row] for row in rows_of(plan, point.sigmas)]
    sigmas = [float(f"{each:.9g}") for each in point.sigmas]
    begins = "pipe.scheduler.set_timesteps(len(timesteps))\n" if any(plan.levels) else ""
    counts = "\n    pipe.scheduler.index += 1" if any(plan.levels) else ""
    lines = "\n".join(conditions)
    mixed = GUIDED.format(guidance=guidance) if guided else ""
    return f"""{imports}

pipe = {opened}
timesteps, sigmas = {list(plan.timesteps)}, {sigmas}
rows = {coefficients_of}
net, kept = {net}, []
x = torch.randn(2, net.config.in_channels, *[net.config.sample_size] * 2, generator=torch.Generator().manual_seed(0))
torch.set_grad_enabled(False)
{lines}
{begins}for t, sigma, row in zip(timesteps, sigmas, rows):
    a, s = (1 + sigma**2) ** -0.5, sigma / (1 + sigma**2) ** 0.5  # signal and noise
    inputs = {"torch.cat([x, x])" if guided else "x"}
    out = {call}{mixed}
    kept = [{CLEAN[front.prediction_type or "epsilon"]}, *kept]  # clean predictions, newest first
    x = row[0] * x + sum(weight * clean for weight, clean in zip(row[1:], kept)){counts}
images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
"""
