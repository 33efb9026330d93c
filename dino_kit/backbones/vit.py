"""The vision transformer, with published names of its weights.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929), in the form that
DINO trains: bias on qkv, LayerNorm epsilon 1e-6, stochastic depth, the normalised class token as
output.

An image is cut into patches of p × p pixels, and each is mapped linearly to a token. A class token,
learnt and the same for every image, goes before them; positions, learnt for one grid, are added:

    x = [class; patches W + b] + positions                             (B, T, D)

Blocks let tokens see each other and then think by themselves, each on what LayerNorm (LN) makes of
the tokens, and added to them:

    Q, K, V = LN(x) W + b, cut into h heads                            (B, h, T, d) each
    A = softmax(Q Kᵀ / √d)                                             (B, h, T, T), rows sum to 1
    x ← x + concat(A V) W + b
    x ← x + GELU(LN(x) W₁ + b₁) W₂ + b₂

The feature is LN(x) of the class token after the last block. A, which no forward pass keeps, is what
``get_selfattention`` computes of one block.

Two options are those of DINOv2's published weights, and off in DINO's: register tokens (Darcet et al.
2024, "Vision transformers need registers"), which hold what the network would else note down in
patches, and LayerScale (Touvron et al. 2021, "Going deeper with image transformers"), a learnt factor
for each channel of what a branch adds.

Legend: B batch, C channels, H and W pixels, N patches, R registers, T = P+N tokens (P = 1+R, the
class token and then the registers), D width, h heads, d = D/h, L = 2 * depth residual branches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.backbones.attention import attention, attention_maps
from dino_kit.backbones.interface import Features
from dino_kit.backbones.layers import (
    Mlp,
    PatchEmbed,
    block_index,
    check_sizes,
    init_linear_layers,
    patch_grid,
    run_block,
)
from dino_kit.backbones.products import Linear, linear
from dino_kit.backbones.stochastic_depth import add_branch, kept_rows, linear_rates
from dino_kit.errors import UserError


class ClassTokenTransformer(nn.Module):
    """Blocks on a class token and patches, with learnt positions: what ViTs have in common.

    Args:
        patch_embed: images ``(B, C, H, W)`` to patches ``(B, N, D)``.
        blocks: what is run, each called as :class:`Block` is.
        image_size, patch_size, in_chans, embed_dim, num_heads, drop_path_rate, norm_eps,
            num_register_tokens: as those of :class:`VisionTransformer`.
    """

    embedding = "patch_embed"  # the name under which the weights of patch_embed are published
    checkpoint_activations = False  # see run_block

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Iterable[nn.Module],
        *,
        image_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        num_heads: int,
        drop_path_rate: float,
        norm_eps: float,
        num_register_tokens: int = 0,
    ):
        super().__init__()
        self.image_size, self.patch_size, self.in_chans = image_size, patch_size, in_chans
        self.embed_dim, self.num_heads = embed_dim, num_heads
        side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, embed_dim))
        self.num_prefix_tokens = 1 + num_register_tokens
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
            if num_register_tokens
            else None
        )
        self.add_module(self.embedding, patch_embed)
        self.blocks = nn.ModuleList(blocks)
        self.depth = len(self.blocks)
        self.drop_path_rates = linear_rates(drop_path_rate, self.depth)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_linear_layers(self)
        if self.register_tokens is not None:
            # Drawn last: all other first weights are those of a network without.
            nn.init.trunc_normal_(self.register_tokens, std=0.02)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The normalised class tokens, ``(B, D)``.

        ``keep`` (L, B), bool, on the host, says which residual branches each sample keeps (see
        :func:`~dino_kit.backbones.stochastic_depth.draw_keep`); None keeps all, unscaled.
        """
        x = self._tokens(images)
        kept = [None] * (2 * self.depth) if keep is None else kept_rows(keep, x.device)
        for index, block in enumerate(self.blocks):
            branches = slice(2 * index, 2 * index + 2)
            # The class token is all that the last block owes.
            queries = 1 if index == self.depth - 1 else None
            rates = self.drop_path_rates[branches]
            x = run_block(block, self.checkpoint_activations, x, kept[branches], rates, queries)
        return self.norm(x[:, 0])

    def forward_features(self, images: Tensor) -> Features:
        """Class token, patches and their grid, normalised."""
        (x,) = self.get_intermediate_layers(images)
        return Features(x[:, 0], x[:, self.num_prefix_tokens :], self._grid(images))

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, first to last, normalised, each ``(B, T, D)``."""
        x = self._tokens(images)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= self.depth - n:
                outputs.append(self.norm(x))
        return outputs

    def _maps(self, images: Tensor, block: int) -> Tensor:
        """The maps that a block takes values by, ``(B, h, T, T)``; the class token first."""
        index = block_index(block, self.depth)
        x = self._tokens(images)
        for before in self.blocks[:index]:
            x = before(x)
        own = self.blocks[index]
        return own.attn.attention(own.norm1(x))

    def _tokens(self, images: Tensor) -> Tensor:
        grid = self._grid(images)
        patches = self._patches(images)  # (B, N, D)
        cls = self.cls_token.expand(len(images), -1, -1)  # (B, 1, D)
        x = torch.cat((cls, patches), dim=1) + self._positions(grid)  # (B, 1+N, D)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(len(images), -1, -1)  # (B, R, D)
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)  # (B, T, D)

    def _patches(self, images: Tensor) -> Tensor:
        return self.patch_embed(images)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings ``(1, 1+N, D)`` for a grid of patches; registers have none."""
        side = self.image_size // self.patch_size
        if grid == (side, side):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        # Weights are published for this exact sampling: the 0.1, added against rounding down to
        # one patch too few, also shifts every sampling point a little.
        factors = tuple((n + 0.1) / side for n in grid)
        patches = F.interpolate(
            patches.unflatten(1, (side, side)).permute(0, 3, 1, 2),
            scale_factor=factors,
            mode="bicubic",
        )  # (1, D, rows, columns)
        return torch.cat((cls, patches.flatten(2).transpose(1, 2)), dim=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return patch_grid(images, self.in_chans, self.patch_size)


class SelfAttentionTransformer(ClassTokenTransformer):
    """One whose blocks all take values by the softmax itself."""

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, h, T, T)``; the class token first."""
        return self._maps(images, -1)

    def get_selfattention(self, images: Tensor, block: int) -> Tensor:
        """The attention of one block, counted from 0, or from the end as -1; else as the last's.

        Raises:
            UserError: there is no such block.
        """
        return self._maps(images, block)


class VisionTransformer(SelfAttentionTransformer):
    """Images ``(B, C, H, W)``, sides multiples of the patch size, to class tokens ``(B, D)``.

    Any such sides will do: the position embedding, made for ``image_size``, is interpolated.

    Args:
        image_size: side in pixels for which position embeddings are made.
        patch_size: side of a patch in pixels.
        in_chans: C, channels of an image.
        embed_dim: D, width of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: width of a block's hidden layer, as a multiple of D.
        qkv_bias: whether query, key and value have a bias.
        drop_path_rate: the last block's rate of stochastic depth; it grows linearly from 0.
        norm_eps: epsilon of every LayerNorm.
        num_register_tokens: R, learnt tokens without a position, after the class token.
        layer_scale: first value of the learnt factors, one a channel, by which each residual branch
            is multiplied, such as 1e-5; None for none.

    Raises:
        UserError: the sizes do not fit together, or an option is out of its range.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        num_register_tokens: int = 0,
        layer_scale: float | None = None,
    ):
        check_sizes(
            drop_path_rate,
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
        )
        if num_register_tokens < 0:
            raise UserError(
                f"num_register_tokens is {num_register_tokens}; it is a whole number from 0."
            )
        if layer_scale is not None and not 0.0 < layer_scale < math.inf:
            raise UserError(
                f"layer_scale is {layer_scale}; it is a number above 0, or None for no LayerScale."
            )
        hidden = int(embed_dim * mlp_ratio)
        super().__init__(
            PatchEmbed(patch_size, in_chans, embed_dim),
            [
                Block(embed_dim, num_heads, hidden, qkv_bias, norm_eps, layer_scale)
                for _ in range(depth)
            ],
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            num_register_tokens=num_register_tokens,
        )


class Block(nn.Module):
    """Attention, then an MLP, each on the normalised tokens, scaled if asked, and added to them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        qkv_bias: bool,
        norm_eps: float,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(
        self, x: Tensor, kept=(None, None), rates=(0.0, 0.0), queries: int | None = None
    ) -> Tensor:
        """``(B, T, D)`` to the same, or to that of the first ``queries`` tokens alone.

        ``kept`` and ``rates`` of its two branches as add_branch's. Of tokens that are not asked
        for, keys and values are all that is computed.
        """

        def attended(y: Tensor) -> Tensor:
            return self.ls1(self.attn(self.norm1(y), queries))

        x = add_branch(x[:, :queries], attended, kept[0], rates[0], sees=x)
        return add_branch(x, lambda y: self.ls2(self.mlp(self.norm2(y))), kept[1], rates[1])


class LayerScale(nn.Module):
    """A learnt factor for each channel: ``(..., D)`` to the same."""

    def __init__(self, dim: int, first: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(first)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention. ``forward`` never holds the ``(B, h, T, T)`` maps."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """``(B, T, D)`` to the same, or to that of the first ``queries`` tokens alone."""
        x = attention(*self._queries_keys_values(x, queries))  # (B, h, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)

    def attention(self, x: Tensor) -> Tensor:
        """The maps ``(B, h, T, T)`` that ``forward`` uses for these tokens; rows sum to 1."""
        q, k = self._part(x, 0, 2)
        return attention_maps(q, k)

    def _queries_keys_values(self, x: Tensor, queries: int | None) -> tuple[Tensor, ...]:
        """By head; the queries of the first ``queries`` tokens alone, None for all."""
        if queries is None:
            return self._heads(self.qkv(x), 3)
        return *self._part(x[:, :queries], 0, 1), *self._part(x, 1, 3)

    def _part(self, x: Tensor, first: int, end: int) -> tuple[Tensor, ...]:
        """Of queries, keys and values those from ``first`` to before ``end``, by head."""
        rows = slice(first * x.shape[-1], end * x.shape[-1])
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return self._heads(linear(x, self.qkv.weight[rows], bias), end - first)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``(B, T, parts * D)`` to ``parts`` tensors ``(B, h, T, d)``."""
        batch, tokens, width = x.shape
        x = x.reshape(batch, tokens, parts, self.num_heads, width // parts // self.num_heads)
        return x.permute(2, 0, 3, 1, 4).unbind(0)
