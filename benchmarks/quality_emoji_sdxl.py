"""How good are the images of `emoji-sdxl` on prompts that it was never trained on?

Question: do independent classifiers, trained on composed scenes and never on the model's images, see the object, the
background and the layout that the prompt asked for, and how far are the images from composed scenes of the same
prompts? The distance is the Fréchet distance in the features of the object classifier.

    python benchmarks/quality_emoji_sdxl.py                                # about 9 minutes on two CPU cores
    python benchmarks/quality_emoji_sdxl.py --guidance-sweep 1 1.5 2 3 4   # a table, nothing is written
    python benchmarks/quality_emoji_sdxl.py --smoke                        # seconds, nothing is written
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from emoji_world import BACKGROUNDS, FONT, LAYOUTS, OBJECTS, Scene, caption, compose, splits
from quality_fashion_dit import command_line, frechet, to_uint8
from torch import nn
from tqdm import tqdm
from train_emoji_sdxl import SHIPPED
from train_fashion_dit import to_float

NAME = "quality_emoji_sdxl"
RESULTS = Path(__file__).parent / "results"
PARTS = {"object": tuple(OBJECTS), "background": tuple(BACKGROUNDS), "layout": tuple(LAYOUTS)}
BATCH = 64


class Classifier(nn.Module):
    """A small convolutional network that names one part of a scene."""

    WIDTH = 96

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, self.WIDTH), nn.ReLU())
        self.head = nn.Linear(self.WIDTH, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps (n, 3, 32, 32) images in [-1, 1] to (n, n_classes) logits."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 96) in float64, of uint8 images (n, 3, 32, 32)."""
        return torch.cat([self.body(to_float(part)) for part in images.split(500)]).double()

    @torch.no_grad()
    def assigned(self, images: torch.Tensor) -> torch.Tensor:
        """(n,) classes of uint8 images (n, 3, 32, 32)."""
        return torch.cat([self(to_float(part)).argmax(1) for part in images.split(500)])


def labels(scenes: list[Scene], part: str) -> torch.Tensor:
    """(n,) what a classifier of that part should say."""
    at = list(PARTS).index(part)
    return torch.tensor([PARTS[part].index(scene[at]) for scene in scenes])


def train(part: str, images: torch.Tensor, wanted: torch.Tensor, args: argparse.Namespace) -> Classifier:
    """AdamW with a one-cycle rate, on composed scenes of all pairs, the held-out ones too."""
    torch.manual_seed(args.seed)  # a script of its own: weight initialisation and dropout have no generator argument
    generator = torch.Generator().manual_seed(args.seed)
    model = Classifier(len(PARTS[part]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    epochs = args.epochs if part == "object" else 1
    batches = [order for _ in range(epochs) for order in torch.randperm(len(images), generator=generator).split(128)]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=len(batches))
    for chosen in tqdm(batches, desc=f"{part} classifier", mininterval=10):
        loss = F.cross_entropy(model(to_float(images[chosen])), wanted[chosen], label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
    return model.eval()


def generate(
    pipe: StableDiffusionXLPipeline, prompts: list[str], steps: int, guidance: float, seed: int
) -> torch.Tensor:
    """One uint8 image (n, 3, 32, 32) of each prompt; equal seeds give equal noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in tqdm(range(0, len(prompts), BATCH), desc=f"{steps} steps, guidance {guidance:g}"):
        asked = prompts[start : start + BATCH]
        drawn.append(
            to_uint8(
                pipe(
                    asked, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pt"
                ).images
            )
        )
    return torch.cat(drawn)


def accuracy(judges: dict[str, Classifier], images: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Fraction of images in which each judge sees what was asked for, and in which all do."""
    right = {part: judge.assigned(images) == labels(scenes, part) for part, judge in judges.items()}
    right["all three"] = torch.stack(list(right.values())).all(0)
    return {part: round(hits.double().mean().item(), 4) for part, hits in right.items()}


@torch.no_grad()
def reconstruct(pipe: StableDiffusionXLPipeline, images: torch.Tensor) -> torch.Tensor:
    """What the autoencoder alone leaves of uint8 images."""
    modes = [pipe.vae.encode(to_float(part)).latent_dist.mode() for part in images.split(BATCH)]
    return torch.cat([to_uint8(pipe.vae.decode(mode).sample / 2 + 0.5) for mode in modes])


def measure(
    pipe: StableDiffusionXLPipeline, judges: dict[str, Classifier], args: argparse.Namespace
) -> tuple[dict[str, Any], torch.Tensor, list[str]]:
    """All numbers, the images at the main setting and their prompts."""
    _, unseen = splits()
    scenes = [unseen[i] for i in torch.randperm(len(unseen), generator=torch.Generator().manual_seed(1)).tolist()]
    scenes = (scenes * (args.n_images // len(scenes) + 1))[: args.n_images]
    prompts = [caption(scene) for scene in scenes]
    drawn = {steps: generate(pipe, prompts, steps, args.guidance, args.seed) for steps in args.steps}
    unguided = generate(pipe, prompts, args.main_steps, 1.0, args.seed)
    composed, reference = (torch.from_numpy(compose(scenes, len(scenes), args.font, seed)[0]) for seed in (101, 102))
    scenes_composed = compose(scenes, len(scenes), args.font, 101)[1]
    restored = reconstruct(pipe, composed)
    features = judges["object"].features
    compared = {str(steps): images for steps, images in drawn.items()}
    compared |= {"without guidance": unguided, "reconstructed scenes": restored, "other composed scenes": composed}
    distance = {name: frechet(features(images), features(reference)) for name, images in compared.items()}
    return (
        {
            "prompts": f"{args.n_images} images of the {len(set(prompts))} prompts of pairs never trained on",
            "accuracy": {str(steps): accuracy(judges, images, scenes) for steps, images in drawn.items()}
            | {"without guidance": accuracy(judges, unguided, scenes)},
            "accuracy_on_composed_scenes": accuracy(judges, composed, scenes_composed),
            "accuracy_on_reconstructed_scenes": accuracy(judges, restored, scenes_composed),
            "frechet": {
                "name": "Fréchet distance in the 96 features of the object classifier, to composed scenes",
                **{name: round(value, 3) for name, value in distance.items()},
            },
        },
        drawn[args.main_steps],
        prompts,
    )


def save_grid(images: torch.Tensor, prompts: list[str], title: str, path: Path) -> None:
    """The first 24 images with their prompts."""
    figure, axes = plt.subplots(4, 6, figsize=(12, 9), layout="constrained")
    for axis, image, prompt in zip(axes.flat, images, prompts, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        words = prompt.split()
        axis.set_title("\n".join((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]))), fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    """Reads the command line; `--smoke` shrinks everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the pipeline")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--guidance-sweep", type=float, nargs="+", metavar="G", help="print a table and write nothing")
    parser.add_argument("--n-images", type=int, default=640)
    parser.add_argument("--scenes", type=int, default=16_000, help="composed scenes that the classifiers learn from")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the object classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few images and steps; writes only where --out says")
    args = parser.parse_args()
    args.steps, args.main_steps = (10, 20, 50), 20
    if args.smoke:
        args.n_images, args.scenes, args.epochs, args.steps, args.main_steps = 24, 256, 1, (2,), 2
    if not (args.model / "model_index.json").exists():
        parser.error(f"no pipeline in {args.model}: run train_emoji_sdxl.py first or pass --model")
    return args


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    seen, unseen = splits()
    pictures, scenes = compose(seen + unseen, args.scenes, args.font, args.seed + 1000)
    images = torch.from_numpy(pictures)
    judges = {part: train(part, images, labels(scenes, part), args) for part in PARTS}
    pipe = StableDiffusionXLPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.guidance_sweep:
        asked = (unseen * 2)[: args.n_images]
        for guidance in args.guidance_sweep:
            drawn = generate(pipe, [caption(scene) for scene in asked], args.main_steps, guidance, args.seed)
            print(f"guidance {guidance:g}: {accuracy(judges, drawn, asked)}", flush=True)
        return
    facts, drawn, prompts = measure(pipe, judges, args)
    facts["provenance"] = {
        "model": args.model.resolve().name, "guidance": args.guidance, "scheduler": "Euler", "seed": args.seed,
        "classifier_scenes": args.scenes, "classifier_epochs": args.epochs, "command": command_line(NAME),
        "torch": torch.__version__, "diffusers": diffusers.__version__, "smoke": args.smoke,
    }  # fmt: skip
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    print(text, end="")
    out = args.out or (None if args.smoke else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{NAME}.json").write_text(text, encoding="utf-8")
        title = (
            f"emoji-sdxl, prompts never trained on, {args.main_steps} steps, guidance {args.guidance:g}, not selected"
        )
        save_grid(drawn, prompts, title, out / f"{NAME}.png")
        print(f"written: {NAME}.json and {NAME}.png in {out}")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
