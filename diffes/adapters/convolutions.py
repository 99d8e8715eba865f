"""Channels between the two convolutions of a ResNet block, and convolutions as matrices.

A convolution of kernel k adds up k x k matrices (d_out, C), one for each offset, applied to the channels of a pixel. As
one matrix (d_out k k, C) it is pruned like a linear layer: the same channels go at every offset.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffes.adapters.groups import GroupSet, base_of


def resnet_channels(path: str, resnet: Any) -> GroupSet | None:
    """Return the channels between the convolutions of a ResNet block at a module path, in the groups over which they
    are normalised: without a whole group, the others stay as they are. None where there is one group only, or where
    the second convolution makes pixels of another number.

    Args:
        path: of the block.
        resnet: a `ResnetBlock2D`.
    """
    norm, conv2 = resnet.norm2, base_of(resnet.conv2)
    plain = conv2.stride == (1, 1) and conv2.padding == tuple(k // 2 for k in conv2.kernel_size)
    if not isinstance(norm, nn.GroupNorm) or norm.num_groups < 2 or not plain:
        return None
    inner = [name for name in ("conv1", "time_emb_proj") if getattr(resnet, name, None) is not None]
    layers = tuple(f"{path}.{name}" for name in (*inner, "conv2"))
    return GroupSet(
        path, norm.num_groups, norm.num_channels // norm.num_groups, (*layers[:-1], f"{path}.norm2"), layers[-1:],
        norm=f"{path}.norm2", counted=layers,
    )  # fmt: skip


def as_matrix(weight: Tensor) -> Tensor:
    """Return the weight of a consumer as a matrix (rows, d_in): of a convolution (d_out, C, k, k), (d_out k k, C)."""
    return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1]) if weight.dim() == 4 else weight


def as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    """Return the matrix (rows, n) of a consumer with n inputs left in the form of its dense weight."""
    if like.dim() == 2:
        return matrix
    return matrix.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2).contiguous()


def as_tokens(inputs: Tensor, layer: nn.Module) -> Tensor:
    """Return the inputs of a layer (n, ..., d_in): of a convolution (n, C, h, w), its pixels (n, h w, C)."""
    return inputs.flatten(2).transpose(1, 2) if isinstance(base_of(layer), nn.Conv2d) else inputs


def as_rows(gradient: Tensor, layer: nn.Module) -> Tensor:
    """Return the gradients of the rows of a layer's matrix, token by token of its inputs, (n, ..., rows).

    Output pixel p of a convolution reads input pixel q = p + offset; so the row of that offset has, at q, the gradient
    of output pixel q - offset.
    """
    convolution = base_of(layer)
    if not isinstance(convolution, nn.Conv2d):
        return gradient
    n, d_out, *_ = gradient.shape
    k = convolution.kernel_size
    shifted = F.unfold(gradient, k, padding=(k[0] // 2, k[1] // 2)).view(n, d_out, *k, -1).flip(2, 3)
    return shifted.flatten(1, 3).transpose(1, 2)
