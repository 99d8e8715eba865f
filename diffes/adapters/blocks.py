"""Transformer blocks of diffusers: what each takes and returns, and which heads and channels it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffes.adapters.groups import GroupSet, channels_of, heads_of


@dataclass(frozen=True)
class BlockForm:
    """Form of a transformer block: where its forward takes and returns which states, and its prunable layers.

    Args:
        hidden: place of the hidden states in what it returns; None where it returns them alone.
        context: place of the states of the text in what it returns; None where it does not return them.
        attentions: names of its attention layers whose heads can be removed, in the order of the forward pass.
        ffns: names of its FFNs whose channels can be removed, likewise.

    Example:
        >>> import torch
        >>> hidden, text = torch.zeros(1, 4, 8), torch.ones(1, 2, 8)
        >>> BLOCKS["JointTransformerBlock"].skipped(hidden_states=hidden, encoder_hidden_states=text)[1] is hidden
        True
    """

    hidden: int | None = None
    context: int | None = None
    attentions: tuple[str, ...] = ()
    ffns: tuple[str, ...] = ()

    def skipped(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would return if it changed nothing: the forward of a skipped block."""
        named = ("hidden_states", "encoder_hidden_states")
        hidden, context = (kwargs[name] if name in kwargs else _at(args, i) for i, name in enumerate(named))
        if self.hidden is None:
            return hidden
        found: list[Any] = [None, None]
        found[self.hidden] = hidden
        if self.context is not None:
            found[self.context] = context
        return tuple(found)

    def change(self, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        """Return the hidden states before and after a block, each (n, tokens, d)."""
        before: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return before, output if self.hidden is None else output[self.hidden]

    def sets(self, path: str, block: Any) -> list[GroupSet]:
        """Return the heads and FFN channels of a block at a module path."""
        layers = [(f"{path}.{name}", getattr(block, name, None)) for name in self.attentions]
        heads = [heads_of(where, layer) for where, layer in layers if layer is not None]
        ffns = [(f"{path}.{name}", getattr(block, name, None)) for name in self.ffns]
        return [*heads, *(channels_of(where, layer) for where, layer in ffns if layer is not None)]


_JOINT = BlockForm(1, 0, ("attn", "attn2"), ("ff", "ff_context"))
BLOCKS: dict[str, BlockForm] = {
    "BasicTransformerBlock": BlockForm(attentions=("attn1", "attn2"), ffns=("ff",)),  # DiT, PixArt, U-Nets
    "JointTransformerBlock": _JOINT,  # Stable Diffusion 3 and 3.5
    "FluxTransformerBlock": _JOINT,
    "FluxSingleTransformerBlock": BlockForm(1, 0),  # its heads and channels share a projection: whole blocks only
    "SanaTransformerBlock": BlockForm(attentions=("attn2",)),  # linear attention and convolutions stay
}
"""Blocks by the name of their class, in diffusers 0.42."""


def known_blocks(denoiser: nn.Module) -> list[str]:
    """Return the paths of all blocks of a known class in a network, in the order in which it holds them."""
    return [path for path, module in denoiser.named_modules() if type(module).__name__ in BLOCKS]


def form_of(block: nn.Module) -> BlockForm:
    """Return the form of a block; of one that is not known, that of a block which takes and returns one tensor."""
    return BLOCKS.get(type(block).__name__, BlockForm())


def _at(args: Sequence[Any], place: int) -> Any:
    return args[place] if place < len(args) else None
