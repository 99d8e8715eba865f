"""Measures the quality of `fashion-dit`.

Question: does `fashion-dit` draw the garment it was asked for, and how far are its images from real ones?

A small classifier, trained on the real training images only, answers both: by the class that it assigns to each
generated image, and by the Fréchet distance in its features. Everything runs on the CPU in fp32; the classifier is
trained once and kept in `--work`.

    python benchmarks/quality_fashion_dit.py                                # writes quality_fashion_dit.json and .png
    python benchmarks/quality_fashion_dit.py --guidance-sweep 1.5 2 3 4     # prints a table, writes no results
    python benchmarks/quality_fashion_dit.py --smoke                        # a few seconds, the numbers mean nothing

Data: Fashion-MNIST, as in `train_fashion_dit.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from train_fashion_dit import CLASSES, DATA_DIR, SHIPPED, load_fashion_mnist, to_float

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = (10, 20, 50)
MAIN_STEPS = 20
BATCH = 250  # the noise of an image depends on its place in its batch: keep this fixed
MIN_ACCURACY = 0.9  # of the classifier on the real test images; below it the numbers would not say much
NAME = "quality_fashion_dit"
RESULTS = Path(__file__).parent / "results"


class Judged(NamedTuple):
    """What the classifier says about a set of images."""

    features: torch.Tensor  # (n, Classifier.WIDTH) float64
    assigned: torch.Tensor  # (n,) class ids


class Classifier(nn.Module):
    """Three convolutions and two linear layers; the features are what the last linear layer reads."""

    WIDTH = 64

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
            blocks += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            blocks += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 4 * 4, self.WIDTH), nn.ReLU())
        self.head = nn.Linear(self.WIDTH, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps (n, 1, 32, 32) images in [-1, 1] to (n, 10) logits."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def judge(self, images: torch.Tensor) -> Judged:
        """Features and assigned classes of uint8 images (n, 1, 32, 32)."""
        features = torch.cat([self.body(to_float(batch)) for batch in images.split(500)])
        return Judged(features.double(), self.head(features).argmax(1))


def shifted(images: torch.Tensor, generator: torch.Generator, most: int = 2) -> torch.Tensor:
    """Moves every image by its own random whole number of pixels, at most `most`, in both directions."""
    windows = F.pad(images, (most,) * 4).unfold(2, 32, 1).unfold(3, 32, 1)
    rows, columns = torch.randint(2 * most + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, rows, columns]


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> Classifier:
    """Trains on real images with random shifts, AdamW and a one-cycle rate."""
    torch.manual_seed(seed)  # a script of its own: weight initialisation and dropout have no generator argument
    generator = torch.Generator().manual_seed(seed)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    batches = [order for _ in range(epochs) for order in torch.randperm(len(images), generator=generator).split(256)]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=len(batches))
    smooth = 0.0
    bar = tqdm(batches, desc="classifier", unit="step", mininterval=10)
    for step, chosen in enumerate(bar):
        logits = model(to_float(shifted(images[chosen], generator)))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
        smooth += (loss.item() - smooth) / min(step + 1, 100)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    return model.eval()


def cached_classifier(args: argparse.Namespace) -> Classifier:
    """The classifier of this number of epochs and this seed, from `--work` where it is there."""
    path = args.work / f"classifier-{args.epochs}-epochs-seed-{args.seed}.safetensors"
    if path.exists() and not args.smoke:
        model = Classifier().eval()
        model.load_state_dict(load_file(path))
        return model
    images, labels = load_fashion_mnist(args.data_dir, "train")
    if args.smoke:
        images, labels = images[:1024], labels[:1024]
    model = train_classifier(images, labels, args.epochs, args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (n, d) in float64.

    `|m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2))`, where the last trace is that of the root of the symmetric
    `S1^(1/2) S2 S1^(1/2)`, which has the same eigenvalues.
    """
    gap = first.mean(0) - second.mean(0)
    cov1, cov2 = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float(gap @ gap + cov1.trace() + cov2.trace() - 2 * cross)


def balanced_split(labels: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random indices of `count` images with equally many per class, and the indices of all the others."""
    order = torch.randperm(len(labels), generator=generator)
    per_class = [order[labels[order] == c][: count // len(CLASSES)] for c in range(len(CLASSES))]
    inside = torch.zeros(len(labels), dtype=torch.bool)
    inside[torch.cat(per_class)] = True
    return torch.nonzero(inside).flatten(), torch.nonzero(~inside).flatten()


def asked_classes(count: int) -> torch.Tensor:
    """The classes asked for: they take turns."""
    return torch.arange(count) % len(CLASSES)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [0, 1] to the 8 bits that real images have."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def generate(pipe: DiTPipeline, count: int, steps: int, guidance: float, seed: int) -> torch.Tensor:
    """Draws `count` uint8 images (count, 1, 32, 32); equal seeds give equal noise whatever `steps` and `guidance`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for asked in tqdm(asked_classes(count).split(BATCH), desc=f"{steps} steps, guidance {guidance}", unit="batch"):
        images = pipe(
            asked.tolist(), guidance_scale=guidance, generator=generator, num_inference_steps=steps, output_type="np"
        ).images
        drawn.append(to_uint8(torch.from_numpy(images).permute(0, 3, 1, 2)))
    return torch.cat(drawn)


@torch.no_grad()
def reconstruct(pipe: DiTPipeline, images: torch.Tensor) -> torch.Tensor:
    """Encodes uint8 images to the mean of the autoencoder's posterior and decodes them again."""
    modes = [pipe.vae.encode(to_float(batch)).latent_dist.mode() for batch in images.split(BATCH)]
    return torch.cat([to_uint8(pipe.vae.decode(mode).sample / 2 + 0.5) for mode in modes])


def agreement(assigned: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Fraction of images that are assigned their label, overall and per class."""
    right = (assigned == labels).double()
    per_class = {name: round(right[labels == c].mean().item(), 4) for c, name in enumerate(CLASSES)}
    return {"overall": round(right.mean().item(), 4), "per_class": per_class}


def real_distances(features: torch.Tensor, labels: torch.Tensor, count: int, draws: int, seed: int) -> dict[str, float]:
    """Distance of `count` real images to the others over several random draws: what sample size alone costs."""
    generator = torch.Generator().manual_seed(seed)
    splits = (balanced_split(labels, count, generator) for _ in range(draws))
    values = np.array([frechet(features[inside], features[rest]) for inside, rest in splits])
    return {name: round(float(getattr(values, name)()), 3) for name in ("mean", "min", "max")}


class Real(NamedTuple):
    """The real test images and the split that all distances share."""

    images: torch.Tensor
    labels: torch.Tensor
    judged: Judged
    inside: torch.Tensor  # as many as are generated, equally many per class
    rest: torch.Tensor  # the others: what everything is measured against

    @property
    def reference(self) -> torch.Tensor:
        """Features that everything is measured against."""
        return self.judged.features[self.rest]


def load_real(classifier: Classifier, args: argparse.Namespace) -> Real:
    """Reads and judges the real test images, and sets `--n-images` of them aside."""
    images, labels = load_fashion_mnist(args.data_dir, "t10k")
    if args.smoke:
        images, labels = images[:1000], labels[:1000]
    inside, rest = balanced_split(labels, args.n_images, torch.Generator().manual_seed(args.seed))
    return Real(images, labels, classifier.judge(images), inside, rest)


def sweep(pipe: DiTPipeline, classifier: Classifier, real: Real, args: argparse.Namespace) -> None:
    """Prints agreement and distance per guidance."""
    print(f"{args.main_steps} steps, {args.n_images} images\nguidance  asked class  Fréchet distance")
    for guidance in args.guidance_sweep:
        judged = classifier.judge(generate(pipe, args.n_images, args.main_steps, guidance, args.seed))
        right = agreement(judged.assigned, asked_classes(args.n_images))["overall"]
        print(f"{guidance:8.2f}  {right:11.3f}  {frechet(judged.features, real.reference):16.3f}", flush=True)


def measure(
    pipe: DiTPipeline, classifier: Classifier, real: Real, args: argparse.Namespace
) -> tuple[dict[str, Any], torch.Tensor]:
    """All numbers, and the images drawn with `args.main_steps` steps."""
    asked = asked_classes(args.n_images)
    drawn = {steps: generate(pipe, args.n_images, steps, args.guidance, args.seed) for steps in args.steps}
    judged = {steps: classifier.judge(images) for steps, images in drawn.items()}
    restored = classifier.judge(reconstruct(pipe, real.images[real.inside]))
    features, labels, half = real.judged.features, real.labels, len(real.labels) // 2
    facts = {
        "asked_class": {str(steps): agreement(answer.assigned, asked) for steps, answer in judged.items()},
        "same_class_real_test": agreement(real.judged.assigned, labels),
        "same_class_reconstructions": agreement(restored.assigned, labels[real.inside]),
        "frechet": {
            "name": "Fréchet distance in the features of a Fashion-MNIST classifier",
            "reference": f"{len(real.rest)} real test images; rows of real images are measured against all the others",
            "generated": {str(k): round(frechet(v.features, real.reference), 3) for k, v in judged.items()},
            "reconstructions": round(frechet(restored.features, real.reference), 3),
            "real_same_count": real_distances(features, labels, args.n_images, args.draws, args.seed),
            "real_halves": real_distances(features, labels, half, args.draws, args.seed),
            "real_draws": args.draws,
        },
    }
    return facts, drawn[args.main_steps]


def save_grid(images: torch.Tensor, caption: str, path: Path) -> None:
    """Draws the first ten images of every class, one class a row."""
    columns = min(10, len(images) // len(CLASSES))
    cells = F.pad(images[: columns * len(CLASSES)], (1, 1, 1, 1), value=255)  # a thin white line between the images
    side = cells.shape[-1]
    sheet = cells.view(columns, len(CLASSES), side, side).permute(1, 2, 0, 3).reshape(side * len(CLASSES), -1)
    figure, axes = plt.subplots(figsize=(1.2 + 0.55 * columns, 6), layout="constrained")
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks([(row + 0.5) * side for row in range(len(CLASSES))], CLASSES)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(caption, fontsize=10)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    plt.close(figure)


def command_line(name: str = NAME) -> str:
    """How the script was called, without the folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{name}.py", *words])


def provenance(classifier: Classifier, args: argparse.Namespace) -> dict[str, Any]:
    """What it takes to get the same numbers again."""
    return {
        "model": args.model.resolve().name, "n_images": args.n_images, "guidance": args.guidance,
        "scheduler": "DDIM, eta 0", "seed": args.seed, "device": "cpu", "dtype": "float32", "command": command_line(),
        "torch": torch.__version__, "diffusers": diffusers.__version__, "smoke": args.smoke,
        "classifier": {
            "parameters": sum(p.numel() for p in classifier.parameters()), "features": Classifier.WIDTH,
            "epochs": args.epochs, "trained_on": "real training images with random shifts",
        },
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Reads the command line; `--smoke` shrinks everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the pipeline")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder of the four Fashion-MNIST idx files")
    parser.add_argument("--work", type=Path, default=Path("runs/quality-fashion-dit"), help="keeps the classifier")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--guidance-sweep", type=float, nargs="+", metavar="G", help="print a table and write nothing")
    parser.add_argument("--n-images", type=int, default=1000, help="images per setting, a multiple of 10")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the classifier")
    parser.add_argument("--draws", type=int, default=10, help="random draws of real images to compare with real ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few images and steps; writes only where --out says")
    args = parser.parse_args()
    args.steps, args.main_steps = STEPS, MAIN_STEPS
    if args.smoke:
        args.n_images, args.epochs, args.draws, args.steps, args.main_steps = 20, 1, 2, (1, 2), 2
        args.work = args.work / "smoke"
    if args.n_images < 20 or args.n_images % len(CLASSES):
        parser.error("--n-images must be a multiple of 10, at least 20")
    if not (args.model / "model_index.json").exists():
        parser.error(f"no pipeline in {args.model}: run train_fashion_dit.py first or pass --model")
    return args


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    classifier = cached_classifier(args)
    real = load_real(classifier, args)
    accuracy = agreement(real.judged.assigned, real.labels)["overall"]
    print(f"classifier: {accuracy:.2%} of {len(real.labels)} real test images right")
    if accuracy < MIN_ACCURACY and not args.smoke:
        raise SystemExit(f"that is below {MIN_ACCURACY:.0%}, too little to judge with: raise --epochs")
    pipe = DiTPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.guidance_sweep:
        sweep(pipe, classifier, real, args)
        return
    facts, images = measure(pipe, classifier, real, args)
    facts["provenance"] = provenance(classifier, args)
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    print(text, end="")
    out = args.out or (None if args.smoke else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{NAME}.json").write_text(text, encoding="utf-8")
        caption = f"{args.model.resolve().name}, {args.main_steps} DDIM steps, guidance {args.guidance:g}, not selected"
        save_grid(images, caption, out / f"{NAME}.png")
        print(f"written: {NAME}.json and {NAME}.png in {out}")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
