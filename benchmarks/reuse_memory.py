"""What does reuse keep in memory? On the published configurations, from shapes alone.

The denoisers are made without weights (torch's meta device), so nothing is computed: one call at the published size
gives the shapes of what is kept between calls, by what reuses it, and how many bytes of activations are alive at once
while it runs, with attention that keeps no matrix, as GPUs' kernels do. Per image in fp16; with guidance twice as much,
of both.

    python benchmarks/reuse_memory.py            # seconds
    python benchmarks/reuse_memory.py --smoke    # two blocks
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from published_models import adapter_of, dit, unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffes.adapters import ModelAdapter, ReuseSet

RESULTS = Path(__file__).parent / "results"
MODELS = {"DiT-XL/2-256, 256 px": (dit, 32), "SDXL base 1.0, 1024 px": (unet, 128)}
SMALL: dict[str, dict[str, Any]] = {"dit": {"num_layers": 2}, "unet": {"transformer_layers_per_block": [1, 1, 1]}}


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operators make, for as long as something holds them.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(each.untyped_storage()) for each in tree_leaves([args, kwargs]) if isinstance(each, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known and id(storage) not in given:
                    self._known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def call(denoiser: nn.Module, side: int) -> None:
    """One call on one image, on the meta device."""
    latents = torch.empty(1, 4, side, side, device="meta", dtype=torch.float16)
    timestep = torch.empty(1, device="meta", dtype=torch.int64)
    if side < 128:
        denoiser(latents, timestep=timestep, class_labels=torch.empty(1, device="meta", dtype=torch.int64))
        return
    added = {name: torch.empty(1, n, device="meta", dtype=torch.float16) for name, n in ADDED.items()}
    text = torch.empty(1, 77, 2048, device="meta", dtype=torch.float16)
    denoiser(latents, timestep, encoder_hidden_states=text, added_cond_kwargs=added)


ADDED = {"text_embeds": 1280, "time_ids": 6}


def kept(adapter: ModelAdapter, groups: ReuseSet, side: int) -> list[int]:
    """Bytes of each output that may be reused."""
    found: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[path] = tensor.numel() * tensor.element_size()

        return hook

    handles = [adapter.denoiser.get_submodule(path).register_forward_hook(note(path)) for path in groups.sources]
    call(adapter.denoiser, side)
    for handle in handles:
        handle.remove()
    return [found[path] for path in groups.sources]


@torch.no_grad()
def measure(name: str, adapter: ModelAdapter, side: int) -> dict[str, Any]:
    """Bytes per image."""
    with Alive() as alive, patch.object(F, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q)):
        call(adapter.denoiser, side)
    row: dict[str, Any] = {"model": name, "activations_peak": alive.peak}
    for groups in adapter.prunable("reuse"):
        assert isinstance(groups, ReuseSet)
        sizes = kept(adapter, groups, side)
        row[groups.name] = {"outputs": len(sizes), "all": sum(sizes), "largest": max(sizes)}
    return row


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: MB per image."""
    lines = [
        "| model | activations alive at once | what is reused | outputs | all of them | the largest |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        for what, sizes in row.items():
            if isinstance(sizes, dict):
                cells = [row["activations_peak"], sizes["all"], sizes["largest"]]
                peak, everything, largest = (f"{each / 1e6:.1f} MB" for each in cells)
                lines.append(f"| {row['model']} | {peak} | {what} | {sizes['outputs']} | {everything} | {largest} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="two blocks, into runs/smoke")
    args = parser.parse_args()
    args.out = Path("runs/smoke") if args.smoke and args.out == RESULTS else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (make, side) in MODELS.items():
        with torch.device("meta"):
            denoiser = make(**(SMALL[make.__name__] if args.smoke else {})).half()
        rows.append(measure(name, adapter_of(denoiser), side))
    (args.out / "reuse_memory.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    (args.out / "reuse_memory.md").write_text(table_of(rows))
    print(table_of(rows))


if __name__ == "__main__":
    main()
