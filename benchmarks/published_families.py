"""Table of published denoisers: the shares of multiply-accumulates that levels can leave out, on the meta device.

    python benchmarks/published_families.py        # no weights, no downloads; about a minute

A call on one image or video, without guidance. "width" removes heads and channels, "depth" whole blocks, "reuse"
returns outputs of an earlier call: each column is the share that the highest level leaves out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffes.adapters import GroupSet
from diffes.adapters.blocks import form_of, known_blocks
from diffes.adapters.convolutions import resnet_channels
from diffes.adapters.unet import unet_layers

RESULTS = Path(__file__).parent / "results"
Built = tuple[Any, Callable[[Any], object]]


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape)


def now() -> torch.Tensor:
    return torch.zeros(1)


def unet(cross: int, side: int, added: Mapping[str, Any] | None = None, **config: Any) -> Built:
    def call(net: Any) -> object:
        text = empty(1, 77, cross)
        return net(empty(1, 4, side, side), now(), encoder_hidden_states=text, added_cond_kwargs=added)

    return UNet2DConditionModel(cross_attention_dim=cross, sample_size=side, **config), call


def sdxl() -> Built:
    config: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    return unet(2048, 128, {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)}, **config)


def dit() -> Built:
    net = DiTTransformer2DModel(num_layers=28, sample_size=32, in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    return net, lambda n: n(empty(1, 4, 32, 32), timestep=now(), class_labels=torch.zeros(1, dtype=torch.long))


def pixart() -> Built:
    net = PixArtTransformer2DModel(sample_size=128, caption_channels=4096, use_additional_conditions=True)
    added = {"resolution": empty(1, 2), "aspect_ratio": empty(1, 1)}
    return net, lambda n: n(empty(1, 4, 128, 128), empty(1, 120, 4096), now(), added)


def sd3(layers: int, **config: Any) -> Built:
    net = SD3Transformer2DModel(
        sample_size=128, num_layers=layers, num_attention_heads=layers, joint_attention_dim=4096,
        caption_projection_dim=64 * layers, pos_embed_max_size=192, **config,
    )  # fmt: skip
    return net, lambda n: n(empty(1, 16, 128, 128), empty(1, 333, 4096), empty(1, 2048), now())


def flux() -> Built:
    net = FluxTransformer2DModel(guidance_embeds=True)
    ids = {"img_ids": empty(4096, 3), "txt_ids": empty(512, 3), "guidance": now()}
    return net, lambda n: n(empty(1, 4096, 64), empty(1, 512, 4096), empty(1, 768), now(), **ids)


def qwen_image() -> Built:
    text = {"encoder_hidden_states": empty(1, 128, 3584), "encoder_hidden_states_mask": None}
    call = {"timestep": now(), "img_shapes": [(1, 64, 64)]}
    return QwenImageTransformer2DModel(), lambda n: n(empty(1, 4096, 64), **text, **call)


def z_image() -> Built:
    return ZImageTransformer2DModel(), lambda n: n([empty(16, 1, 128, 128)], now(), [empty(128, 2560)])


def sana() -> Built:
    return SanaTransformer2DModel(), lambda n: n(empty(1, 32, 32, 32), empty(1, 300, 2304), now())


def ltx() -> Built:
    video = {"num_frames": 16, "height": 16, "width": 24}
    return LTXVideoTransformer3DModel(), lambda n: n(
        empty(1, 16 * 16 * 24, 128), empty(1, 128, 4096), now(), empty(1, 128), **video
    )


def wan() -> Built:
    net = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    return net, lambda n: n(empty(1, 16, 21, 60, 104), now(), empty(1, 512, 4096))


def cogvideox() -> Built:
    return CogVideoXTransformer3DModel(), lambda n: n(empty(1, 13, 16, 60, 90), empty(1, 226, 4096), now())


def hunyuan_video() -> Built:
    net = HunyuanVideoTransformer3DModel(guidance_embeds=True)
    text = (empty(1, 256, 4096), torch.ones(1, 256))
    return net, lambda n: n(empty(1, 16, 9, 40, 64), now(), *text, empty(1, 768), now())


MODELS: dict[str, Callable[[], Built]] = {
    "DiT-XL/2, 256 px": dit,
    "Stable Diffusion 1.5, 512 px": lambda: unet(768, 64),
    "SDXL, 1024 px": sdxl,
    "PixArt-alpha XL, 1024 px": pixart,
    "Stable Diffusion 3 medium, 1024 px": lambda: sd3(24),
    "Stable Diffusion 3.5 large, 1024 px": lambda: sd3(38, qk_norm="rms_norm"),
    "FLUX.1-dev, 1024 px": flux,
    "Qwen-Image, 1024 px": qwen_image,
    "Z-Image, 1024 px": z_image,
    "Sana 1.6B, 1024 px": sana,
    "LTX-Video, 768 x 512, 121 frames": ltx,
    "Wan 2.1 1.3B, 480p, 81 frames": wan,
    "CogVideoX-2B, 480p, 49 frames": cogvideox,
    "HunyuanVideo, 512 x 320, 33 frames": hunyuan_video,
}


def sets_of(net: nn.Module) -> tuple[list[GroupSet], list[GroupSet]]:
    """Heads and FFN channels of the blocks, and channels of ResNet blocks."""
    blocks = [groups for path in known_blocks(net) for groups in form_of(at(net, path)).sets(path, at(net, path))]
    resnets = [(path, module) for path, module in net.named_modules() if isinstance(module, ResnetBlock2D)]
    return blocks, [found for each in resnets if (found := resnet_channels(*each)) is not None]


def at(net: nn.Module, path: str) -> Any:
    return net.get_submodule(path)


def row(name: str, built: Built) -> dict[str, Any]:
    net, call = built
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(net.eval())
    root = type(net).__name__
    macs = {path.removeprefix(f"{root}."): sum(n.values()) / 2 for path, n in counter.get_flop_counts().items()}
    blocks, resnets = sets_of(net)
    paths = known_blocks(net)
    reused = [each for path in paths for each in form_of(at(net, path)).branches(path, at(net, path))]

    def share(found: Iterable[str]) -> float:
        return round(sum(macs.get(path, 0.0) for path in found) / macs[root], 4)

    counted = [path for groups in (*blocks, *resnets) for path in (groups.counted or (groups.name,))]
    counted += dict.fromkeys(groups.consumers[0] for groups in blocks if groups.first is not None)  # shared
    parameters = sum(p.numel() for p in net.parameters())
    layers = {at(net, path) for groups in (*blocks, *resnets) for path in (*groups.producers, *groups.consumers)}
    return {
        "model": name, "denoiser": root, "parameters": parameters, "macs": macs[root], "width": share(counted),
        "convolutions": share(path for groups in resnets for path in groups.counted), "depth": share(paths),
        "reuse": share(path for each in reused for path in each), "blocks": len(paths), "group_sets": len(blocks),
        "width_parameters": round(sum(p.numel() for each in layers for p in each.parameters()) / parameters, 4),
        "decoder_layers": unet_layers(net).n_groups if isinstance(net, UNet2DConditionModel) else 0,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    lines = [
        f"{versions}, the meta device: `python benchmarks/published_families.py`",
        "",
        "| model | parameters | GMACs a call | heads and channels | of these convolutions | blocks | reused outputs |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("width", "convolutions", "depth", "reuse")
    for r in rows:
        shares = " | ".join(f"{r[name]:.0%}" if r[name] else "-" for name in names)
        lines.append(f"| {r['model']} | {r['parameters'] / 1e9:.2f} B | {r['macs'] / 1e9:,.0f} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", help="part of a model's name")
    parser.add_argument("--smoke", action="store_true", help="one model, into runs/smoke")
    args = parser.parse_args()
    if args.smoke:
        args.only, args.out = "DiT", Path("runs/smoke")
    rows = []
    with torch.device("meta"):
        for name, build in MODELS.items():
            if args.only is None or args.only in name:
                rows.append(row(name, build()))
                print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "published_families.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.out / "published_families.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
