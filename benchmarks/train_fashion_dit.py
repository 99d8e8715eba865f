"""Trains `fashion-dit`, the latent diffusion transformer that ships with diffes.

Question: can a class-conditional DiT small enough to live in a Git repository draw Fashion-MNIST garments?

Two models are trained, the autoencoder first, then the denoiser on its latents, and saved together in the folder
format of `diffusers.DiTPipeline`. Work in progress is kept in `--work`: the same command goes on after a kill.

    python benchmarks/train_fashion_dit.py                    # at full length, on a GPU if there is one
    python benchmarks/train_fashion_dit.py --smoke            # a few steps of everything, nothing useful comes out

Data: Fashion-MNIST (MIT licence) as four idx files, e.g. from Debian's package `dataset-fashion-mnist`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NULL_CLASS = 1000  # DiTPipeline hard-codes this id for the unconditional branch
DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
SHIPPED = Path(__file__).parents[1] / "diffes" / "models" / "fashion-dit"


def load_fashion_mnist(data_dir: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads one split ("train" or "t10k") of the idx files.

    Returns:
        Images (n, 1, 32, 32) uint8, the 28x28 originals padded with black, and labels (n,) int64.
    """

    def read(kind: str, header: int) -> np.ndarray:
        path = data_dir / f"{split}-{kind}-ubyte.gz"
        if not path.exists():
            raise SystemExit(f"{path} is missing: install Debian's dataset-fashion-mnist or pass --data-dir")
        return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)

    labels = torch.from_numpy(read("labels-idx1", 8).astype(np.int64))
    images = torch.from_numpy(read("images-idx3", 16).copy()).view(-1, 1, 28, 28)
    return F.pad(images, (2, 2, 2, 2)), labels


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float in [-1, 1], as the autoencoder takes it."""
    return images.float() / 127.5 - 1.0


def build_vae() -> AutoencoderKL:
    """A small AutoencoderKL: (1, 32, 32) images to (4, 8, 8) latents."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def build_dit() -> DiTTransformer2DModel:
    """A DiT of 8 blocks, 8 heads and 16 tokens, with the adaptive norms at zero as in the DiT paper (section 3.2)."""
    dit = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=20,
        num_layers=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for block in dit.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return dit


def optimiser_for(
    model: torch.nn.Module, peak: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a one-cycle rate: linear-cosine warm-up over 5 % of the steps, cosine decay to nothing."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=peak, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    return optimiser, rate


def train_vae(images: torch.Tensor, args: argparse.Namespace, device: torch.device) -> AutoencoderKL:
    """Absolute error plus a light KL term; stays in `--work/vae` once done."""
    folder = args.work / "vae"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder).to(device)
    generator = torch.Generator().manual_seed(args.seed)
    vae = build_vae().to(device)
    optimiser, rate = optimiser_for(vae, 2e-3, args.vae_steps)
    smooth = 0.0
    bar = tqdm(range(args.vae_steps), desc="autoencoder", unit="step", mininterval=10)
    for step in bar:
        batch = to_float(images[torch.randint(len(images), (args.vae_batch,), generator=generator)]).to(device)
        posterior = vae.encode(batch).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(restored, batch) + 1e-5 * posterior.kl().mean()
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
    means, stds = [], []
    for batch in tqdm(images.split(500), desc="latents", mininterval=10):
        posterior = vae.encode(to_float(batch).to(device)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    mean, std = torch.cat(means), torch.cat(stds)
    vae.register_to_config(scaling_factor=round(1.0 / mean.std().item(), 5))
    return mean, std


def train_dit(
    vae: AutoencoderKL, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace, device: torch.device
) -> tuple[DiTTransformer2DModel, DDIMScheduler, float]:
    """Noise prediction with 10 % of the labels dropped; returns the averaged weights and the smoothed final loss."""
    generator = torch.Generator(device).manual_seed(args.seed)
    mean, std = encode_all(vae, images, device)
    labels = labels.to(device)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    # In train mode every block of diffusers' DiT drops labels on its own; here one draw holds for the whole network.
    dit = build_dit().eval().to(device)
    ema = EMAModel(dit.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    optimiser, rate = optimiser_for(dit, args.dit_rate, args.dit_steps)
    checkpoint, first, smooth = args.work / "dit.pt", 0, 1.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        dit.load_state_dict(state["dit"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        rate.load_state_dict(state["rate"])
        generator.set_state(state["generator"].cpu())
        first, smooth = state["step"], state["smooth"]
    bar = tqdm(range(first, args.dit_steps), initial=first, total=args.dit_steps, desc="denoiser", mininterval=10)
    for step in bar:
        chosen = torch.randint(len(mean), (args.dit_batch,), generator=generator, device=device)
        noise, jitter = (torch.randn(args.dit_batch, 4, 8, 8, generator=generator, device=device) for _ in range(2))
        latents = (mean[chosen] + std[chosen] * jitter) * vae.config.scaling_factor
        timesteps = torch.randint(1000, (args.dit_batch,), generator=generator, device=device)
        dropped = torch.rand(args.dit_batch, generator=generator, device=device) < 0.1
        condition = torch.where(dropped, NULL_CLASS, labels[chosen])
        predicted = dit(scheduler.add_noise(latents, noise, timesteps), timesteps, condition).sample
        loss = F.mse_loss(predicted, noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimiser.step()
        rate.step()
        ema.step(dit.parameters())
        smooth += (loss.item() - smooth) / min(step + 1, 200)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0:
            torch.save(
                {
                    "dit": dit.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(),
                    "rate": rate.state_dict(), "generator": generator.get_state(), "step": step + 1, "smooth": smooth,
                },
                checkpoint,
            )  # fmt: skip
    ema.copy_to(dit.parameters())
    return dit, scheduler, smooth


def save(
    pipe: DiTPipeline, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace, facts: dict[str, Any]
) -> None:
    """Writes the pipeline in fp16, 1,024 class-balanced training images for calibration, and the training record."""
    pipe.to(dtype=torch.float16).save_pretrained(args.out)
    index = args.out / "model_index.json"  # DiTPipeline reads `id2label` from it, but does not write it
    labels_added = json.loads(index.read_text()) | {"id2label": {str(i): name for i, name in enumerate(CLASSES)}}
    index.write_text(json.dumps(labels_added, indent=2) + "\n")
    generator = torch.Generator().manual_seed(args.seed)
    per_class = [
        torch.nonzero(labels == c).flatten()[torch.randperm(int((labels == c).sum()), generator=generator)[:103]]
        for c in range(len(CLASSES))
    ]
    chosen = torch.stack([indices[:103] for indices in per_class], 1).flatten()[:1024]  # classes take turns
    np.savez_compressed(args.out / "calibration.npz", images=images[chosen].numpy(), labels=labels[chosen].numpy())
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the four Fashion-MNIST idx files")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the pipeline is saved")
    parser.add_argument("--work", type=Path, default=Path("runs/train-fashion-dit"), help="work in progress")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--dit-steps", type=int, default=4000)
    parser.add_argument("--dit-batch", type=int, default=128)
    parser.add_argument("--dit-rate", type=float, default=1e-3, help="peak learning rate of the denoiser")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.smoke:
        args.vae_steps, args.dit_steps, args.save_every = 40, 40, 20
        if args.out == SHIPPED:
            args.out = args.work / "smoke"
            args.work = args.work / "smoke-work"
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)  # a script of its own: weight initialisation has no generator argument
    images, labels = load_fashion_mnist(args.data_dir, "train")
    if args.smoke:
        images, labels = images[:1500], labels[:1500]
    start = time.perf_counter()
    vae = train_vae(images, args, device).eval()
    dit, scheduler, loss = train_dit(vae, images, labels, args, device)
    pipe = DiTPipeline(transformer=dit, vae=vae, scheduler=scheduler)
    facts = {
        "vae_steps": args.vae_steps, "vae_batch": args.vae_batch, "dit_steps": args.dit_steps,
        "dit_batch": args.dit_batch, "dit_rate": args.dit_rate, "seed": args.seed, "device": device.type,
        "final_noise_mse": round(loss, 5), "torch": torch.__version__,
        "dit_parameters": sum(p.numel() for p in dit.parameters()),
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip
    if math.isnan(loss):
        raise SystemExit("the denoiser's loss is NaN: nothing was saved; lower --dit-rate")
    save(pipe, images, labels, args, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
