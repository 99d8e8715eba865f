"""Transformer blocks of diffusers: what each takes and returns, and which heads and channels it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from diffes.adapters.groups import GroupSet, channels_of, heads_of, norm_across_heads, sharing


@dataclass(frozen=True)
class BlockForm:
    """Form of a transformer block: where its forward takes and returns which states, and its layers.

    Args:
        hidden: place of the hidden states in what it returns; None where it returns them alone.
        context: place of the states of the text in what it returns; None where it does not return them.
        attentions: names of its attention layers with heads that can be removed, in the order of the forward pass.
        ffns: names of its FFNs with channels that can be removed, likewise.
        others: further layers whose outputs a call may reuse, each with the layers that only it reads.
        sharing: names of the projection that makes the channels of its FFN, and of the output projection which these
            share with the heads of `attn`; None where there is none.
        states: names of the arguments that hold the hidden states and those of the text, the first two.

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
    others: tuple[tuple[str, ...], ...] = ()
    sharing: tuple[str, str] | None = None
    states: tuple[str, str] = ("hidden_states", "encoder_hidden_states")

    def skipped(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block would return if it changed nothing: the forward of a skipped block."""
        hidden, context = (kwargs[name] if name in kwargs else _at(args, i) for i, name in enumerate(self.states))
        if self.hidden is None:
            return hidden
        found: list[Any] = [None, None]
        found[self.hidden] = hidden
        if self.context is not None:
            found[self.context] = context
        return tuple(found)

    def change(self, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        """Return the hidden states before and after a block, each (n, tokens, d)."""
        before: Tensor = kwargs[self.states[0]] if self.states[0] in kwargs else args[0]
        return before, output if self.hidden is None else output[self.hidden]

    def sets(self, path: str, block: Any) -> list[GroupSet]:
        """Return the heads and FFN channels of a block at a module path. Heads stay where a norm runs across them all:
        without some of them, the others would change."""
        if self.sharing is not None:
            return sharing(path, block, *self.sharing)
        attentions = [each for each in _named(self.attentions, path, block) if not norm_across_heads(each[1])]
        ffns = _named(self.ffns, path, block)
        return [*(heads_of(*each) for each in attentions), *(channels_of(*each) for each in ffns)]

    def branches(self, path: str, block: Any) -> list[tuple[str, ...]]:
        """Return the paths of the layers of a block whose outputs a call may reuse, each with those that it alone
        reads, which then need not be computed."""
        found = [name for name, _ in _named((*self.attentions, *self.ffns), path, block)]
        return [*((name,) for name in found), *(tuple(f"{path}.{name}" for name in names) for names in self.others)]


def _named(names: Sequence[str], path: str, block: Any) -> list[tuple[str, Any]]:
    """Return the paths of those layers that a block has, with the layers."""
    return [(f"{path}.{name}", layer) for name in names if (layer := getattr(block, name, None)) is not None]


_JOINT = BlockForm(1, 0, ("attn", "attn2"), ("ff", "ff_context"))
_VIDEO = BlockForm(attentions=("attn1", "attn2"), ffns=("ff", "ffn"))
_HUNYUAN = BlockForm(0, 1, ("attn",), ("ff", "ff_context"))
_HUNYUAN_SINGLE = BlockForm(0, 1, others=(("proj_out", "attn", "proj_mlp"),), sharing=("proj_mlp", "proj_out"))
BLOCKS: dict[str, BlockForm] = {
    "BasicTransformerBlock": BlockForm(attentions=("attn1", "attn2"), ffns=("ff",)),  # DiT, PixArt, U-Nets
    "JointTransformerBlock": _JOINT,  # Stable Diffusion 3 and 3.5
    "FluxTransformerBlock": _JOINT,
    "FluxSingleTransformerBlock": replace(_HUNYUAN_SINGLE, hidden=1, context=0),
    "SanaTransformerBlock": BlockForm(attentions=("attn2",), others=(("attn1",), ("ff",))),  # linear, convolutions
    "QwenImageTransformerBlock": BlockForm(1, 0, ("attn",), ("img_mlp", "txt_mlp")),
    "ZImageTransformerBlock": BlockForm(
        attentions=("attention",), ffns=("feed_forward",), states=("x", "encoder_hidden_states")
    ),
    "LTXVideoTransformerBlock": _VIDEO,
    "WanTransformerBlock": _VIDEO,
    "CogVideoXBlock": BlockForm(0, 1, ("attn1",), ("ff",)),
    "HunyuanVideoTransformerBlock": _HUNYUAN,
    "HunyuanVideoTokenReplaceTransformerBlock": _HUNYUAN,
    "HunyuanVideoSingleTransformerBlock": _HUNYUAN_SINGLE,
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _HUNYUAN_SINGLE,
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
