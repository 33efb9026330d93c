"""What backbones of patches have in common: layers, first weights, and which sizes fit.

Legend: B batch, C channels, H and W pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_kit.backbones.products import Linear, linear
from dino_kit.batch_norm import statistics_unchanged
from dino_kit.errors import UserError


class PatchEmbed(nn.Module):
    """One linear map of every patch: images ``(B, C, H, W)`` to ``(B, N, D)``."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if not x.requires_grad:
            return self.fc2(self.act(x))
        return _GeluLinear.apply(x, self.fc2.weight.to(x.dtype), self.fc2.bias.to(x.dtype))


class _GeluLinear(torch.autograd.Function):
    """``linear(gelu(x))`` that keeps ``x`` alone: GELU is little work, and its result is large.

    Autograd would keep both, and the second is a quarter of all that a block keeps.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        inner = torch.ops.aten.gelu_backward(linear(gradient, weight.mT), x)
        return inner, rows.mT @ F.gelu(x).flatten(0, -2), rows.sum(dim=0)


def run_block(
    block: Callable[..., Tensor],
    checkpoint_activations: bool,
    *arguments,
    within: nn.Module | None = None,
) -> Tensor:
    """``block(*arguments)``, or the same keeping nothing but the arguments for the backward pass.

    That computes the block a second time, and a network then holds the activations of one block.
    ``within`` is the module that a block is a part of, where it is none itself.
    """
    if not (checkpoint_activations and torch.is_grad_enabled()):
        return block(*arguments)
    # Blocks draw no random numbers, so there is no generator whose state must be brought back.
    return checkpoint(
        block,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), statistics_unchanged(within or block)),
    )


def init_linear_layers(network: nn.Module) -> None:
    """First weights of all linear layers: truncated normal of deviation 0.02, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def patch_grid(images: Tensor, in_chans: int, patch_size: int) -> tuple[int, int]:
    """Patches down and across of images ``(B, C, H, W)``.

    Raises:
        UserError: the images have another number of channels, or sides that are no multiples of
            the patch size.
    """
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise UserError(
            f"The backbone takes images of shape (batch, {in_chans}, height, width), and got "
            f"{tuple(images.shape)}; in_chans sets the number of channels."
        )
    height, width = images.shape[2:]
    p = patch_size
    if min(height, width) < p or height % p or width % p:
        nearest = [max(p, p * round(side / p)) for side in (height, width)]
        raise UserError(
            f"An image of {height} × {width} pixels cannot be cut into patches of {p} × {p}; "
            f"resize or crop it to multiples of {p}, such as {nearest[0]} × {nearest[1]}."
        )
    return height // p, width // p


def block_index(block: int, depth: int) -> int:
    """The place from 0 of a ``block`` of ``depth`` many, which may be counted from the end as -1.

    Raises:
        UserError: there is no such block.
    """
    if not -depth <= block < depth:
        raise UserError(
            f"There is no block {block}; in a network of depth {depth} they are 0 to {depth - 1}, "
            f"or, counted from the end, -1 to {-depth}."
        )
    return block % depth


def check_sizes(drop_path_rate: float, **sizes: int) -> None:
    """Raises :class:`UserError` for sizes, ``image_size`` and ``patch_size`` among them, that do
    not fit, or a rate of stochastic depth that is none; ``num_heads`` may be among them."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it is a whole number from 1.")
    image, patch = sizes["image_size"], sizes["patch_size"]
    if image % patch:
        raise UserError(
            f"image_size {image} is not a multiple of patch_size {patch}; the nearest that is: "
            f"{max(patch, patch * round(image / patch))}."
        )
    if sizes["embed_dim"] % sizes.get("num_heads", 1):
        raise UserError(
            f"embed_dim {sizes['embed_dim']} cannot be shared out among {sizes['num_heads']} heads; "
            "it is a multiple of num_heads."
        )
    if not 0.0 <= drop_path_rate < 1.0:
        raise UserError(
            f"drop_path_rate is {drop_path_rate}; a rate of stochastic depth is at least 0 and "
            "below 1."
        )
