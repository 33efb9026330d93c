"""DeepViT: a deep vision transformer whose last blocks mix the maps of their heads.

Source: Zhou et al. 2021, "DeepViT: Towards Deeper Vision Transformer" (arXiv:2103.11886), and the
sizes, the patch embedding and the scales of its published code, whose names the weights have.

In a deep ViT the attention of one block comes to look like that of the next, and blocks that look
where those before them looked add little: attention collapses (section 3). The heads of a block
still differ from each other. Re-Attention (section 4.2) therefore makes new maps out of all heads':

    attention      A_i = softmax(Q_i K_iᵀ / √d)                         (T, T), rows sum to 1
    mixed          M_i = Σ_j Θ_ij A_j + b_i                             Θ (h, h), learnt
    normalised     R_i = s · (γ_i (M_i - E[M_i]) / √(Var[M_i] + ε) + β_i)
    Re-Attention   Y_i = R_i V_i                                        (T, d)

The norm is a batch norm whose channels are the heads: E and Var are over all images, queries and
keys of a pass, in eval mode what the passes of the training have left (running statistics). So R
has a sign, and its rows sum to about zero before β is learnt and to no particular number then: it is
no attention, and :meth:`DeepViT.get_last_reattention` gives it. As the norm takes E away, b changes
nothing; it is there for the sake of published weights. s is 1, or 1/√d in ``deepvit_s``.

A block works at a scale of its own, r = 1/2, in the published models:

    x ← x + Attention(LN(r x)) / r,  the first blocks', or Re-Attention's, the last blocks'
    x ← x + MLP(LN(r x)) / r

As LN(r x) with ε is LN(x) with ε/r², that comes to a larger epsilon and branches of weight 1/r, and
is computed so. The patches come from two convolutions before the linear map of a ViT:

    C → 64, 7 × 7, every second pixel; BN, ReLU;  64 → 64, 3 × 3; BN, ReLU;  64 → D, p/2 × p/2

What the batch norms mean here. They are in training mode in the student and the teacher alike, each
with running statistics of its own: the teacher's of global crops, the student's of global crops and
then, in a second pass of a step, of local ones. A map of T tokens has values of about 1/T, and its
running statistics are those of the crops: other sizes than the training's work, but are normalised
by the statistics of that size. Which maps a norm sees is no matter of what is asked for: while it
measures them, a block computes the maps of all tokens and of the samples that stochastic depth drops.

Legend: B batch, C channels, H and W pixels, p side of a patch, N patches, T = 1+N tokens with the
class token, D width, h heads, d = D/h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_kit.backbones import vit
from dino_kit.backbones.layers import Mlp, check_sizes, run_block
from dino_kit.backbones.maps import WithoutSelfAttention
from dino_kit.backbones.stochastic_depth import add_branch
from dino_kit.errors import UserError

_STEM = 64  # channels of the patch embedding's convolutions
_BLOCK_SCALE = 0.5  # r


class DeepViT(WithoutSelfAttention, vit.ClassTokenTransformer):
    """Images ``(B, C, H, W)``, sides multiples of the patch size, to class tokens ``(B, D)``.

    Any such sides will do: the position embedding, made for ``image_size``, is interpolated.

    Args:
        image_size: side in pixels for which position embeddings are made.
        patch_size: p, side of a patch in pixels; even.
        in_chans: C, channels of an image.
        embed_dim: D, width of a token.
        depth: number of blocks.
        num_heads: h, attention heads of a block.
        mlp_ratio: width of a block's hidden layer, as a multiple of D.
        reattention_blocks: how many blocks, the last ones, have Re-Attention; None for all.
        scale_reattention: whether its maps are multiplied by 1/√d.
        drop_path_rate: the last block's rate of stochastic depth; it grows linearly from 0.
        norm_eps: epsilon of every LayerNorm.

    Raises:
        UserError: the sizes do not fit together.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 396,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        reattention_blocks: int | None = None,
        scale_reattention: bool = False,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        reattention_blocks = depth if reattention_blocks is None else reattention_blocks
        check_sizes(
            drop_path_rate,
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            reattention_blocks=reattention_blocks,
        )
        if reattention_blocks > depth:
            raise UserError(
                f"reattention_blocks is {reattention_blocks}; of depth {depth} that many blocks or "
                "fewer can have Re-Attention."
            )
        if patch_size % 2:
            raise UserError(
                f"patch_size is {patch_size}; a DeepViT, whose patch embedding begins with every "
                "second pixel, takes an even one."
            )
        hidden, eps = int(embed_dim * mlp_ratio), norm_eps / _BLOCK_SCALE**2
        map_scale = (embed_dim // num_heads) ** -0.5 if scale_reattention else 1.0

        def block(index: int) -> Block:
            if index < depth - reattention_blocks:
                attn = vit.Attention(embed_dim, num_heads, qkv_bias=True)
            else:
                attn = ReAttention(embed_dim, num_heads, map_scale)
            return Block(embed_dim, attn, hidden, eps)

        super().__init__(
            ConvPatchEmbed(patch_size, in_chans, embed_dim),
            [block(index) for index in range(depth)],
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
        )

    def no_weight_decay(self) -> set[str]:
        """What the authors keep from decaying, beside biases and one-dimensional parameters."""
        return {"cls_token", "pos_embed"}

    def get_last_reattention(self, images: Tensor) -> Tensor:
        """The last block's maps R, mixed and normalised, ``(B, h, T, T)``; the class token first.

        They have a sign, and their rows do not sum to 1.
        """
        return self._maps(images, -1)

    def _patches(self, images: Tensor) -> Tensor:
        # At half the image's size its convolutions hold as much as several blocks.
        return run_block(self.patch_embed, self.checkpoint_activations, images)


class ConvPatchEmbed(nn.Module):
    """Two convolutions, then a linear map of every patch: ``(B, C, H, W)`` to ``(B, N, D)``."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, _STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.conv2 = nn.Conv2d(_STEM, _STEM, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(_STEM)
        self.proj = nn.Conv2d(_STEM, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()  # (B, 64, H/2, W/2)
        x = self.bn2(self.conv2(x)).relu()  # (B, 64, H/2, W/2)
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)


class Block(nn.Module):
    """Attention or Re-Attention, then an MLP, each on the normalised tokens and added 1/r times."""

    def __init__(self, dim: int, attn: vit.Attention, hidden: int, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden)

    def forward(
        self, x: Tensor, kept=(None, None), rates=(0.0, 0.0), queries: int | None = None
    ) -> Tensor:
        """``(B, T, D)`` to the same, or to that of the first ``queries`` tokens alone.

        ``kept`` and ``rates`` of its two branches as add_branch's.
        """

        def attended(y: Tensor) -> Tensor:
            return self.attn(self.norm1(y), queries) / _BLOCK_SCALE

        if self.training and isinstance(self.attn, ReAttention):
            # Of all samples, for the norm to measure; what is dropped is dropped afterwards.
            x = add_branch(x[:, :queries], lambda y: y, kept[0], rates[0], sees=attended(x))
        else:
            x = add_branch(x[:, :queries], attended, kept[0], rates[0], sees=x)
        return add_branch(x, lambda y: self.mlp(self.norm2(y)) / _BLOCK_SCALE, kept[1], rates[1])


class ReAttention(vit.Attention):
    """Self-attention by maps that are mixed over the heads and normalised; it has to hold them."""

    def __init__(self, dim: int, num_heads: int, map_scale: float):
        super().__init__(dim, num_heads, qkv_bias=True)
        self.map_scale = map_scale
        self.reatten_matrix = nn.Conv2d(num_heads, num_heads, kernel_size=1)
        self.var_norm = nn.BatchNorm2d(num_heads)
        # Its true gradient is zero, and AdamW would magnify the rounding into steps that the
        # running mean follows late.
        self.reatten_matrix.bias.requires_grad_(False)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """``(B, T, D)`` to the same, or to that of the first ``queries`` tokens alone."""
        # In training the norm measures the maps of all queries, whoever is asked for.
        q, k, v = self._queries_keys_values(x, None if self.training else queries)
        maps = self._maps(q, k)[:, :, :queries]  # (B, h, Q, T)
        x = maps.to(v.dtype) @ v  # (B, h, Q, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, Q, D)

    def attention(self, x: Tensor) -> Tensor:
        """The maps R ``(B, h, T, T)`` that ``forward`` uses for these tokens."""
        q, k = self._part(x, 0, 2)
        return self._maps(q, k)

    def _maps(self, q: Tensor, k: Tensor) -> Tensor:
        """R of queries (B, h, Q, d) and keys (B, h, T, d), ``(B, h, Q, T)``."""
        maps = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
        # By how little maps differ from their mean is what counts: too fine for half precision.
        with torch.autocast(maps.device.type, enabled=False):
            maps = self.reatten_matrix(maps.to(self.reatten_matrix.weight.dtype))
            return self.var_norm(maps) * self.map_scale
