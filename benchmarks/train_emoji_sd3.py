"""Trains `emoji-sd3`, the small flow-matching transformer of Stable Diffusion 3's own classes that ships with diffes.

Question: can a joint-attention transformer that fits into a Git repository follow prompts that it never saw?

Only the transformer is trained. Autoencoder, tokenizer and text encoders are those of `emoji-sdxl`. Pictures and
captions come from `emoji_world.py`. The pipeline has no T5: as diffusers' does without one, it appends zero tokens to
the text, `EXTRA` of them here, so call it with `max_sequence_length=EXTRA`.

Training goes in legs. A leg begins with the weights in `--out`, if there are any, with a short warm-up, and writes the
averaged weights there in fp16. Work in progress of a leg is kept in `--work`: the same command goes on after a kill.

    python benchmarks/train_emoji_sd3.py                    # a leg; on a CPU the matrix products are in bfloat16
    python benchmarks/train_emoji_sd3.py --smoke            # a few steps, nothing useful comes out
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from emoji_world import FONT, caption, compose, splits
from tqdm import tqdm
from train_emoji_sdxl import LATENTS, WIDTH, encode_all
from train_emoji_sdxl import SHIPPED as SDXL
from train_fashion_dit import optimiser_for
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

SHIPPED = SDXL.parent / "emoji-sd3"
EXTRA = 1  # zero tokens in the place of T5's
LAYERS, HEADS, HEAD = 5, 8, 24


def build_transformer() -> SD3Transformer2DModel:
    """A transformer as Stable Diffusion 3.5's: joint attention, RMS norms of queries and keys, a token per latent."""
    return SD3Transformer2DModel(
        sample_size=LATENTS[1], patch_size=1, in_channels=LATENTS[0], out_channels=LATENTS[0], num_layers=LAYERS,
        num_attention_heads=HEADS, attention_head_dim=HEAD, caption_projection_dim=HEADS * HEAD,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=LATENTS[1],
        qk_norm="rms_norm",
    )  # fmt: skip


def first_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """The first text encoder with the projection that Stable Diffusion 3 wants, which is the identity here."""
    encoder = CLIPTextModelWithProjection.from_pretrained(folder)
    torch.nn.init.eye_(encoder.text_projection.weight)
    return encoder


def build_pipeline(out: Path) -> StableDiffusion3Pipeline:
    """The pipeline with the transformer in `out`, or a new one."""
    vae = AutoencoderKL.from_pretrained(SDXL / "vae")
    vae.register_to_config(shift_factor=0.0, _name_or_path="")
    tokenizer = CLIPTokenizer.from_pretrained(SDXL / "tokenizer")
    begun = (out / "transformer" / "config.json").exists()
    transformer = SD3Transformer2DModel.from_pretrained(out / "transformer") if begun else build_transformer()
    one = first_encoder(SDXL / "text_encoder")
    two = CLIPTextModelWithProjection.from_pretrained(SDXL / "text_encoder_2")
    for part in (one, two, transformer):
        part.float()
    transformer.register_to_config(_name_or_path="")
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.float(),
        text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@torch.no_grad()
def encode_texts(pipe: StableDiffusion3Pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token (n, tokens, 2 WIDTH) and pooled (n, 2 WIDTH) embeddings, by the pipeline itself."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=EXTRA
    )
    return embeds, pooled


def train(
    pipe: StableDiffusion3Pipeline, images: torch.Tensor, captions: list[str], args: argparse.Namespace,
    device: torch.device,
) -> float:  # fmt: skip
    """Flow matching at logit-normal times with 10 % empty captions; leaves the averaged weights.

    Latents are `(1 - s) x + s e` and the target is `e - x`, at the timestep `1000 s` (Esser et al. 2024, section 3).
    Returns the last smooth loss.
    """
    generator = torch.Generator(device).manual_seed(args.seed + 1000 * args.leg)
    mean, std = encode_all(pipe.vae, images, device)
    texts = list(dict.fromkeys(["", *captions]))
    embeds, pooled = encode_texts(pipe, texts)
    which = torch.tensor([texts.index(text) for text in captions], device=device)
    model = pipe.transformer.train()
    ema = EMAModel(model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    optimiser, rate = optimiser_for(model, args.rate, args.steps)
    checkpoint, first, smooth = args.work / f"leg{args.leg}.pt", 0, 1.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        for _ in range(state["step"]):
            rate.step()
        generator.set_state(state["generator"].cpu())
        first, smooth = state["step"], state["smooth"]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="transformer", mininterval=10)
    for step in bar:
        chosen = torch.randint(len(mean), (args.batch,), generator=generator, device=device)
        noise, jitter = (torch.randn(args.batch, *LATENTS, generator=generator, device=device) for _ in range(2))
        latents = (mean[chosen] + std[chosen] * jitter) * pipe.vae.config.scaling_factor
        sigmas = torch.randn(args.batch, generator=generator, device=device).sigmoid()
        dropped = torch.rand(args.batch, generator=generator, device=device) < 0.1
        text = torch.where(dropped, 0, which[chosen])  # 0 is the empty caption
        level = sigmas[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            found = model(
                hidden_states=(1 - level) * latents + level * noise, timestep=1000 * sigmas,
                encoder_hidden_states=embeds[text], pooled_projections=pooled[text],
            ).sample  # fmt: skip
        loss = F.mse_loss(found.float(), noise - latents)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        ema.step(model.parameters())
        smooth += (loss.item() - smooth) / min(step + 1, 500)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0:
            torch.save(
                {
                    "model": model.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(), "step": step + 1, "smooth": smooth,
                },
                checkpoint,
            )  # fmt: skip
    ema.copy_to(model.parameters())
    checkpoint.unlink(missing_ok=True)
    return smooth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the pipeline, which the leg begins with")
    parser.add_argument("--work", type=Path, default=Path("runs/train-emoji-sd3"), help="work in progress")
    parser.add_argument("--images", type=int, default=24_000, help="pictures composed for training")
    parser.add_argument("--steps", type=int, default=6000, help="of this leg")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of this leg")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.steps, args.save_every = 400, 6, 3
        if args.out == SHIPPED:
            args.out, args.work = args.work / "smoke", args.work / "smoke-work"
    args.work.mkdir(parents=True, exist_ok=True)
    record = args.out / "training.json"
    legs: list[dict[str, Any]] = json.loads(record.read_text())["legs"] if record.exists() else []
    args.leg = len(legs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # a script of its own: weight initialisation has no generator argument
    seen, _ = splits()
    pictures, scenes = compose(seen, args.images, args.font, args.seed)
    pipe = build_pipeline(args.out).to(device)
    start = time.perf_counter()
    loss = train(pipe, torch.from_numpy(pictures), [caption(scene) for scene in scenes], args, device)
    if math.isnan(loss):
        raise SystemExit("the loss is NaN: nothing was saved; lower --rate")
    legs.append({
        "images": args.images, "steps": args.steps, "batch": args.batch, "rate": args.rate, "seed": args.seed,
        "device": device.type, "minutes": round((time.perf_counter() - start) / 60, 1), "loss": round(loss, 5),
        "torch": torch.__version__,
    })  # fmt: skip
    parameters = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
    }  # fmt: skip
    pipe.to(dtype=torch.float16).save_pretrained(args.out)
    for name in ("prompts.json", "calibration.npz"):
        shutil.copy2(SDXL / name, args.out / name)
    record.write_text(json.dumps({"legs": legs, "parameters": parameters}, indent=2) + "\n")
    print(json.dumps(legs[-1], indent=2))


if __name__ == "__main__":
    main()
