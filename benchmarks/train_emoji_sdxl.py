"""Trains `emoji-sdxl`, the small text-to-image pipeline of SDXL's own classes that ships with diffes.

Question: can a text-conditional U-Net small enough to live in a Git repository follow prompts it never saw?

The autoencoder comes first; the U-Net is then trained together with its two text encoders, which start from nothing.
All are saved in the folder format of `diffusers.StableDiffusionXLPipeline`. Work in progress is kept in `--work`: the
same command goes on after a kill. The pictures and captions come from `emoji_world.py`.

    python benchmarks/train_emoji_sdxl.py                    # at full length, on a GPU if there is one
    python benchmarks/train_emoji_sdxl.py --smoke            # a few steps of everything, nothing useful comes out
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from emoji_world import FONT, SIZE, caption, compose, splits
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from train_fashion_dit import optimiser_for, to_float
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SHIPPED = Path(__file__).parents[1] / "diffes" / "models" / "emoji-sdxl"
MAX_TOKENS = 16
WIDTH = 64  # of each text encoder
LATENTS = (4, SIZE // 4, SIZE // 4)


def build_vae() -> AutoencoderKL:
    """A small AutoencoderKL: (3, 32, 32) images to (4, 8, 8) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
    )


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding in which every word of the captions is one token and every other text can be spelled."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    state = json.loads(bpe.to_str())["model"]
    tokens = list(state["vocab"])
    tokens += [f"{letter}</w>" for letter in alphabet if f"{letter}</w>" not in state["vocab"]]
    vocab = {token: i for i, token in enumerate(tokens + special)}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["merges"]]
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=special[0], eos_token=special[1], unk_token=special[1],
        pad_token=special[1], model_max_length=MAX_TOKENS,
    )  # fmt: skip


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two small CLIP text encoders; the second also gives the pooled embedding."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_unet() -> UNet2DConditionModel:
    """A U-Net as SDXL's: transformer blocks at two resolutions (8x8: 4 heads, 4x4: 8 heads), 11 blocks in all."""
    return UNet2DConditionModel(
        sample_size=LATENTS[1],
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[4, 8],  # the number of heads, as in SDXL's own configuration
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + WIDTH,
    )


def train_vae(images: torch.Tensor, args: argparse.Namespace, device: torch.device) -> AutoencoderKL:
    """Absolute error, objects four times, plus a light KL term; stays in `--work/vae` once done.

    Encodings start almost without noise: from unit noise, a run this short ends with most channels still drowned in it.
    """
    folder = args.work / "vae"
    if (folder / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(folder).to(device)
        vae.register_to_config(_name_or_path="")  # no folder of this machine in the pipeline
        return vae
    generator = torch.Generator().manual_seed(args.seed)
    vae = build_vae().to(device)
    vae.quant_conv.bias.data[LATENTS[0] :] = -6  # of the log-variances
    optimiser, rate = optimiser_for(vae, 2e-3, args.vae_steps)
    smooth = 0.0
    bar = tqdm(range(args.vae_steps), desc="autoencoder", unit="step", mininterval=10)
    for step in bar:
        batch = to_float(images[torch.randint(len(images), (args.vae_batch,), generator=generator)]).to(device)
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).abs()
        weight = 1 + 3 * ((batch - batch[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1)  # corners are background
        loss = (weight * error).mean() / weight.float().mean() + 1e-6 * posterior.kl().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        rate.step()
        smooth += (loss.item() - smooth) / min(step + 1, 100)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (n, 4, 8, 8) of the posterior of every image; sets the autoencoder's scaling."""
    posteriors = [vae.encode(to_float(part).to(device)).latent_dist for part in tqdm(images.split(500), desc="latents")]
    mean, std = (torch.cat([getattr(p, part) for p in posteriors]) for part in ("mean", "std"))
    vae.register_to_config(scaling_factor=round(1.0 / mean.std().item(), 5))
    return mean, std


class TextToNoise(torch.nn.Module):
    """What is trained together: the U-Net and both text encoders, wired as StableDiffusionXLPipeline does."""

    def __init__(self, unet: UNet2DConditionModel, text_1: CLIPTextModel, text_2: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.unet, self.text_1, self.text_2 = unet, text_1, text_2

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise (n, 4, 8, 8) of tokens (n, MAX_TOKENS); `dropped` (n,) prompts become zeros, as the null
        condition of SDXL is."""
        first, second = (text(tokens, output_hidden_states=True) for text in (self.text_1, self.text_2))
        keep = (~dropped).float()
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * keep[:, None, None]
        sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=noisy.device).expand(len(noisy), 6)
        added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": sizes}
        return self.unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample


def train_unet(
    vae: AutoencoderKL, images: torch.Tensor, tokens: torch.Tensor, model: TextToNoise,
    scheduler: EulerDiscreteScheduler, args: argparse.Namespace, device: torch.device,
) -> float:  # fmt: skip
    """Noise prediction with 10 % of the prompts dropped; leaves the averaged weights, returns the last smooth loss."""
    generator = torch.Generator(device).manual_seed(args.seed)
    mean, std = encode_all(vae, images, device)
    tokens = tokens.to(device)
    signal = scheduler.alphas_cumprod.to(device)
    ema = EMAModel(model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    optimiser, rate = optimiser_for(model, args.rate, args.steps)
    checkpoint, first, smooth = args.work / "unet.pt", 0, 1.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        for _ in range(state["step"]):  # not its state: the rate follows --steps also where that has changed
            rate.step()
        generator.set_state(state["generator"].cpu())
        first, smooth = state["step"], state["smooth"]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="denoiser", mininterval=10)
    for step in bar:
        chosen = torch.randint(len(mean), (args.batch,), generator=generator, device=device)
        noise, jitter = (torch.randn(args.batch, *LATENTS, generator=generator, device=device) for _ in range(2))
        latents = (mean[chosen] + std[chosen] * jitter) * vae.config.scaling_factor
        timesteps = torch.randint(1000, (args.batch,), generator=generator, device=device)
        dropped = torch.rand(args.batch, generator=generator, device=device) < 0.1
        kept = signal[timesteps][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        loss = F.mse_loss(model(noisy, timesteps, tokens[chosen], dropped), noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        ema.step(model.parameters())
        smooth += (loss.item() - smooth) / min(step + 1, 200)
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
    return smooth


def save(pipe: StableDiffusionXLPipeline, args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Writes the pipeline in fp16, the prompts of searches and reports, calibration pictures, the training record."""
    pipe.to(dtype=torch.float16).save_pretrained(args.out)
    seen, unseen = splits()
    rng = np.random.default_rng(args.seed)
    seen, unseen = ([scenes[i] for i in rng.permutation(len(scenes))] for scenes in (seen, unseen))
    prompts = {"search": [caption(s) for s in seen[:300]], "heldout": [caption(s) for s in unseen]}
    (args.out / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    pictures, scenes = compose(seen[300:], 512, args.font, args.seed + 1)
    np.savez_compressed(args.out / "calibration.npz", images=pictures, prompts=np.array([caption(s) for s in scenes]))
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the pipeline is saved")
    parser.add_argument("--work", type=Path, default=Path("runs/train-emoji-sdxl"), help="work in progress")
    parser.add_argument("--images", type=int, default=24_000, help="pictures composed for training")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000, help="of the U-Net and its text encoders")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the same")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.smoke:
        args.images, args.vae_steps, args.steps, args.save_every = 400, 6, 6, 3
        if args.out == SHIPPED:
            args.out = args.work / "smoke"
            args.work = args.work / "smoke-work"
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # a script of its own: weight initialisation has no generator argument
    seen, unseen = splits()
    pictures, scenes = compose(seen, args.images, args.font, args.seed)
    images = torch.from_numpy(pictures)
    tokenizer = build_tokenizer([caption(scene) for scene in seen + unseen])
    tokens = tokenizer(
        [caption(scene) for scene in scenes], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    if tokens.shape[1] != MAX_TOKENS:
        raise SystemExit(f"captions take {tokens.shape[1]} tokens, more than MAX_TOKENS = {MAX_TOKENS}")
    vae = train_vae(images, args, device).eval()
    model = TextToNoise(build_unet(), *build_text_encoders(tokenizer)).to(device)
    scheduler = EulerDiscreteScheduler(beta_schedule="linear", timestep_spacing="leading", steps_offset=1)
    loss = train_unet(vae, images, tokens, model, scheduler, args, device)
    if math.isnan(loss):
        raise SystemExit("the denoiser's loss is NaN: nothing was saved; lower --rate")
    pipe = StableDiffusionXLPipeline(
        vae, model.text_1, model.text_2, tokenizer, tokenizer, model.unet, scheduler, add_watermarker=False
    )
    facts = {
        "images": args.images, "vae_steps": args.vae_steps, "vae_batch": args.vae_batch, "steps": args.steps,
        "batch": args.batch, "rate": args.rate, "seed": args.seed, "device": device.type,
        "final_noise_mse": round(loss, 5), "torch": torch.__version__,
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
        },
    }  # fmt: skip
    save(pipe, args, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
