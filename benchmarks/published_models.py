"""Does pruning fit the published models? Their configurations, random weights, on whatever device there is.

Question: how many groups do DiT-XL/2-256 and SDXL base 1.0 have, what share of their parameters is prunable, what do
the MACs of a call fall to at half of the levels, and does a routed call run? The weights are random (nothing is
downloaded), so quality is not measured here.

    python benchmarks/published_models.py                 # both; needs 12 GB of memory, some minutes on two cores
    python benchmarks/published_models.py --smoke         # the same networks with two blocks a place
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffes.adapters import Kind, ModelAdapter, adapter_for
from diffes.files import SHIPPED
from diffes.measure.currencies import prunable_fraction
from diffes.pruning import METHODS, GroupWeights
from diffes.pruning.bank import WeightBank
from diffes.pruning.build import build_bank
from diffes.runtime.router import Router
from diffes.spaces.schedule import Schedule, Stages

DIT_XL_2_256: dict[str, Any] = {  # the transformer/config.json of facebook/DiT-XL-2-256
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "attention_bias": True, "sample_size": 32, "patch_size": 2, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
SDXL_BASE: dict[str, Any] = {  # the unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def dit(**changes: Any) -> DiTTransformer2DModel:
    """DiT-XL/2-256 with random weights."""
    return DiTTransformer2DModel(**DIT_XL_2_256 | changes)


def unet(**changes: Any) -> UNet2DConditionModel:
    """SDXL base 1.0's U-Net with random weights."""
    return UNet2DConditionModel(**SDXL_BASE | changes)


MODELS = ("dit-xl", "sdxl")
SMALL: dict[str, dict[str, Any]] = {
    "dit-xl": {"num_layers": 2},
    "sdxl": {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1, "sample_size": 16},
}


def device_name(device: str) -> str:
    """How results call a device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def published(model: str, device: str, dtype: str, small: bool = False) -> ModelAdapter:
    """One of `MODELS`, random weights, made where they stay; with two blocks a place where it is to be small."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            made = (dit if model == "dit-xl" else unet)(**SMALL[model] if small else {})
    finally:
        torch.set_default_dtype(before)
    return adapter_of(made)


def adapter_of(denoiser: DiTTransformer2DModel | UNet2DConditionModel) -> ModelAdapter:
    """A pipeline around a denoiser, on its device and in its dtype. What only turns latents into pixels, or prompts
    into embeddings of the shapes that the U-Net reads, is as small as it can be."""
    vae = AutoencoderKL(latent_channels=4)
    pipe: Any
    if isinstance(denoiser, DiTTransformer2DModel):
        pipe = DiTPipeline(denoiser, vae, DDIMScheduler())
    else:
        tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "emoji-sdxl" / "tokenizer", model_max_length=77)
        pipe = StableDiffusionXLPipeline(
            vae, CLIPTextModel(_text(tokenizer, 768)), CLIPTextModelWithProjection(_text(tokenizer, 1280)), tokenizer,
            tokenizer, denoiser, EulerDiscreteScheduler(), add_watermarker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return adapter_for(pipe if denoiser.device.type == "meta" else pipe.to(denoiser.device, denoiser.dtype))


def _text(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, projection_dim=width, num_attention_heads=width // 64, num_hidden_layers=2,
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def call(adapter: ModelAdapter, side: int, timestep: int) -> torch.Tensor:
    """One denoiser call on a batch of one; prompts are random embeddings of SDXL's own shape."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side, side, generator=generator).to(adapter.dtype)
    if type(adapter.pipe).__name__ == "DiTPipeline":
        return adapter.denoise_once(latents, torch.tensor([timestep]), (0,))
    text, pooled = (torch.randn(shape, generator=generator).to(adapter.dtype) for shape in ((1, 77, 2048), (1, 1280)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]], dtype=adapter.dtype)}
    return adapter.denoiser(latents, timestep, encoder_hidden_states=text, added_cond_kwargs=added).sample


def measure(name: str, denoiser: Any, side: int) -> list[dict[str, Any]]:
    """Groups, shares and MACs, and calls at half of the levels, of both kinds."""
    adapter = adapter_of(denoiser)
    stages = Stages.equal(2)
    rows = []
    of_kind: dict[Kind, str | None] = {"width": "magnitude", "depth": None}
    for kind, method in of_kind.items():
        start = time.perf_counter()
        max_level = adapter.max_level(kind)
        level = max_level // 2
        if method is None:  # ranking blocks takes calibration images, and those of random weights would say nothing
            blocks = adapter.prunable(kind)[0]
            kept = torch.arange(blocks.n_kept(level, max_level), dtype=torch.int32)
            bank = WeightBank({(0, level): {blocks.name: GroupWeights(kept)}}, kind)
        else:
            bank = build_bank(adapter, METHODS.make(method), stages, None, guidance=1.0, seed=0)
        router = Router(adapter, bank)
        macs = {}
        with torch.no_grad():
            dense = call(adapter, side, 900)
            router.install(Schedule(stages, (level, 0), max_level))
            for stage, timestep in (("dense", 900), ("half", 100)):
                with FlopCounterMode(display=False) as counter:
                    out = call(adapter, side, timestep)
                macs[stage] = counter.get_total_flops() // 2
                if stage == "dense" and not torch.equal(out, dense):
                    raise SystemExit("level 0 is not the dense model")
            if not torch.isfinite(out).all() or torch.equal(out, dense):
                raise SystemExit("the routed call gave nothing useful")
            router.remove()
            if not torch.equal(call(adapter, side, 100), call(adapter, side, 100)):
                raise SystemExit("the dense model is not what it was")
        row = {
            "model": name, "kind": kind, "max_level": max_level, "group_sets": len(adapter.prunable(kind)),
            "groups": sum(p.n_groups for p in adapter.prunable(kind)),
            "parameters": sum(p.numel() for p in denoiser.parameters()),
            "prunable_fraction": round(prunable_fraction(adapter, kind), 4), "latent_side": side,
            "dtype": str(adapter.dtype).removeprefix("torch."), "level": level,
            "macs_dense": macs["dense"], "macs_at_level": macs["half"],
            "macs_fraction": round(macs["half"] / macs["dense"], 4),
            "bank_bytes": bank.nbytes, "seconds": round(time.perf_counter() - start, 1), "torch": torch.__version__,
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="few blocks, into runs/smoke")
    args = parser.parse_args()
    small_dit, small_unet = (SMALL[model] if args.smoke else {} for model in MODELS)
    if args.smoke:
        args.out = Path("runs/smoke")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure("DiT-XL/2-256", dit(**small_dit), 32)
    torch.set_default_dtype(torch.bfloat16)  # five gigabytes of U-Net instead of ten
    rows += measure("SDXL base 1.0", unet(**small_unet), 32)
    (args.out / "published_models.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
