"""CSWin Transformer: stripes that cross, in four stages; published names of its weights.

Source: Dong et al. 2021, "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped
Windows" (arXiv:2107.00652), and the published code, whose names the weights have.

Attention among all of N tokens costs N². Within small windows it is cheap, but a token sees far only
after many blocks. Here (section 3.2) half of the heads attend within stripes as high as the image and
sw wide, the others within stripes as wide as the image and sw high, so that a block shows each token
a cross. Of a stripe X^m, and of stripes X^1 … X^M side by side:

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V + LePE(V)
    Y_k^m = Attention(X^m W_k^Q, X^m W_k^K, X^m W_k^V)                  heads k = 1 … h
    head_k = (Y_k^1, …, Y_k^M)                           vertical stripes for k ≤ h/2, then horizontal
    CSWin-Attention(X) = Concat(head_1, …, head_h) W^O

(The paper writes the horizontal ones first, the code and its weights have them last.) On n × m tokens,
D wide, that takes n·m·D (4D + sw·n + sw·m) multiplications, projections included. LePE, the locally
enhanced positional encoding (section 3.3), is where tokens learn of places: a convolution, 3 × 3, of
each channel of V by itself, within the stripe, zero around it. It is of no size, so images of any are
met without interpolation. A block is a ViT's (section 3.4):

    x ← x + CSWin-Attention(LN(x))
    x ← x + MLP(LN(x))

The network (section 3.1): each stage begins with a convolution, then a LayerNorm of each token.

    stage 1    7 × 7, stride 4    H/4 × W/4 tokens     D wide    sw 1
    stage 2    3 × 3, stride 2    H/8 × W/8            2D        sw 2
    stage 3    3 × 3, stride 2    H/16 × W/16          4D        sw 7
    stage 4    3 × 3, stride 2    H/32 × W/32          8D        all heads among all tokens
    LN, and the mean of the tokens: the feature, 8D wide

Stripes widen where tokens are fewer; for images of 384 pixels the authors have 12 in the place of 7.

Multi-crop and larger pictures bring grids that no such width divides. A stripe is always as long as
the grid. As in the authors' code for dense prediction, stripes lie centred over the grid, and the outer
two stand out equally far, to a token. There what stands out is filled with zeros, whose scores of 0
take attention from the tokens, the more the more stands out: a student's local crops would be seen
otherwise than its global ones. Here a stripe is what of it lies on the grid (:func:`stripe_widths`).
Where widths divide the grid, and in LePE, both are the same.

Legend: B batch, C channels, H and W pixels, D width of the first stage, N = n·m tokens of a stage on
its grid, h heads, d width of a head, sw width of a stripe, L residual branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from dino_kit.backbones.attention import attention
from dino_kit.backbones.grids import Grid
from dino_kit.backbones.interface import Features
from dino_kit.backbones.layers import Mlp, check_sizes, init_linear_layers, patch_grid, run_block
from dino_kit.backbones.maps import WithoutSelfAttention
from dino_kit.backbones.products import Linear
from dino_kit.backbones.stochastic_depth import add_branch, kept_rows, linear_rates
from dino_kit.errors import UserError

_ROWS, _COLUMNS = 1, 2  # axes of (B, n, m, …)


class CSWin(WithoutSelfAttention):
    """Images ``(B, C, H, W)``, sides multiples of 32, to their features ``(B, 8D)``.

    As with every backbone, the attribute ``embed_dim`` is the width of the feature, 8D; the argument
    is D, as in the paper. ``patch_size`` is the stride of the last stage, whose tokens are what
    stands for patches, and ``depth`` the number of its blocks.

    Args:
        image_size: side in pixels that it is meant for; no weight depends on it.
        in_chans: C, channels of an image.
        embed_dim: D, width of a token of the first stage; each stage doubles it.
        depths: blocks of each of the four stages.
        heads: h of each stage; even in the first three.
        split_sizes: sw of each stage; the last is the paper's way to say all, and of no effect.
        mlp_ratio: width of a block's hidden layer, as a multiple of the stage's width.
        drop_path_rate: the last block's rate of stochastic depth; it grows linearly from 0.
        norm_eps: epsilon of every LayerNorm.

    Raises:
        UserError: the sizes do not fit together.
    """

    num_prefix_tokens = 0
    patch_size = 32
    checkpoint_activations = False  # see run_block

    def __init__(
        self,
        image_size: int = 224,
        in_chans: int = 3,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_sizes(
            drop_path_rate,
            image_size=image_size,
            patch_size=self.patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
        )
        _check_stages(embed_dim, depths=depths, heads=heads, split_sizes=split_sizes)
        self.image_size, self.in_chans = image_size, in_chans
        self.embed_dim, self.depth = 8 * embed_dim, depths[-1]
        self.drop_path_rates = linear_rates(drop_path_rate, sum(depths))

        def stage(number: int) -> nn.ModuleList:
            width = embed_dim << number
            split_size = None if number == 3 else split_sizes[number]
            sizes = (width, heads[number], split_size, int(width * mlp_ratio), norm_eps)
            return nn.ModuleList(Block(*sizes) for _ in range(depths[number]))

        def merge(number: int) -> Merge:
            return Merge(embed_dim << number, embed_dim << (number + 1), norm_eps)

        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, stride=4, padding=2),
            Tokens(),
            nn.LayerNorm(embed_dim, eps=norm_eps),
        )
        self.stage1, self.merge1 = stage(0), merge(0)
        self.stage2, self.merge2 = stage(1), merge(1)
        self.stage3, self.merge3 = stage(2), merge(2)
        self.stage4 = stage(3)
        self.norm = nn.LayerNorm(self.embed_dim, eps=norm_eps)
        init_linear_layers(self)

    @property
    def blocks(self) -> list[Block]:
        """Those of all stages, first to last."""
        return [*self.stage1, *self.stage2, *self.stage3, *self.stage4]

    def no_weight_decay(self) -> set[str]:
        """Names of what the authors keep from decaying beside what is a bias or 1-D: nothing.

        Theirs are the class token and the position embedding, which it does not have.
        """
        return set()

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The means of the last stage's normalised tokens, ``(B, 8D)``.

        ``keep`` (L, B), bool, on the host, says which residual branches each sample keeps (see
        :func:`~dino_kit.backbones.stochastic_depth.draw_keep`); None keeps all, unscaled.
        """
        outputs, _ = self._last_stage(images, keep)
        return self.norm(outputs[-1]).mean(dim=1)

    def forward_features(self, images: Tensor) -> Features:
        """The mean of the last stage's tokens, the tokens and their grid, normalised."""
        outputs, grid = self._last_stage(images)
        x = self.norm(outputs[-1])
        return Features(x.mean(dim=1), x, grid)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last stage's last ``n`` blocks, first to last, normalised, ``(B, N, 8D)``.

        There are ``depth`` of them: those of other stages are of other grids and widths.
        """
        outputs, _ = self._last_stage(images)
        return [self.norm(x) for x in outputs[-n:]]

    def _last_stage(
        self, images: Tensor, keep: Tensor | None = None
    ) -> tuple[list[Tensor], Grid]:
        """Outputs of each block of the last stage, (B, N, 8D), and their grid."""
        rows, columns = patch_grid(images, self.in_chans, self.patch_size)
        rates = self.drop_path_rates
        kept = [None] * len(rates) if keep is None else kept_rows(keep, images.device)
        # Of each block's two branches, in turn.
        branches = ((kept[i : i + 2], rates[i : i + 2]) for i in range(0, len(rates), 2))

        def run(block: Block, x: Tensor, grid: Grid) -> Tensor:
            return run_block(block, self.checkpoint_activations, x, grid, *next(branches))

        x, grid = self.stage1_conv_embed(images), (8 * rows, 8 * columns)
        x = x.to(self.norm.weight.dtype)  # (B, N, D); see Merge
        for stage, merge in (
            (self.stage1, self.merge1), (self.stage2, self.merge2), (self.stage3, self.merge3)
        ):  # fmt: skip
            for block in stage:
                x = run(block, x, grid)
            x, grid = merge(x, grid), (grid[0] // 2, grid[1] // 2)
        outputs = []
        for block in self.stage4:
            x = run(block, x, grid)
            outputs.append(x)
        return outputs, grid


class Tokens(nn.Module):
    """``(B, D, n, m)`` to ``(B, N, D)``, row by row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Merge(nn.Module):
    """A convolution to a grid of half the sides: ``(B, N, D)`` to ``(B, N/4, 2D)``, normalised."""

    def __init__(self, dim: int, dim_out: int, norm_eps: float):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim_out, eps=norm_eps)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.conv(x.transpose(1, 2).unflatten(2, grid))  # (B, 2D, n/2, m/2)
        # Under autocast, too, what the blocks add to keeps the weights' precision.
        return self.norm(x.flatten(2).transpose(1, 2).to(self.norm.weight.dtype))  # (B, N/4, 2D)


class Block(nn.Module):
    """Attention in stripes, then an MLP, each on the normalised tokens and added to them.

    With no ``split_size``, all tokens attend to each other.
    """

    def __init__(
        self, dim: int, num_heads: int, split_size: int | None, hidden: int, norm_eps: float
    ):
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attns = CrossShapedAttention(dim, num_heads, split_size)
        self.proj = Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, grid: Grid, kept=(None, None), rates=(0.0, 0.0)) -> Tensor:
        """``(B, N, D)`` to the same; ``kept`` and ``rates`` of its two branches as add_branch's."""

        def attended(y: Tensor) -> Tensor:
            return self.proj(self.attns(self.qkv(self.norm1(y)), grid))

        x = add_branch(x, attended, kept[0], rates[0])
        return add_branch(x, lambda y: self.mlp(self.norm2(y)), kept[1], rates[1])


class CrossShapedAttention(nn.ModuleList):
    """Half of the heads in vertical stripes and half in horizontal ones, or all of them in one."""

    def __init__(self, dim: int, num_heads: int, split_size: int | None):
        axes = (_COLUMNS, _ROWS) if split_size else (_COLUMNS,)
        dim, num_heads = dim // len(axes), num_heads // len(axes)
        super().__init__(StripeAttention(dim, num_heads, axis, split_size) for axis in axes)
        self.dim = dim  # of each

    def forward(self, qkv: Tensor, grid: Grid) -> Tensor:
        """Queries, keys and values ``(B, N, 3D)`` of the tokens of ``grid`` to ``(B, N, D)``."""
        x = qkv.reshape(len(qkv), *grid, 3, len(self), self.dim)
        results = [attn(x[..., part, :]) for part, attn in enumerate(self)]  # (B, n, m, D/2) or D
        return _joined(results, dim=3).flatten(1, 2)  # (B, N, D)


class StripeAttention(nn.Module):
    """Attention with LePE within stripes.

    Args:
        dim: width of all heads together.
        num_heads: how many they are.
        axis: of (B, n, m, …), along which stripes lie side by side.
        width: sw, of a stripe; None for all that there is.
    """

    def __init__(self, dim: int, num_heads: int, axis: int, width: int | None):
        super().__init__()
        self.dim, self.num_heads, self.axis, self.width = dim, num_heads, axis, width
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)  # LePE, by its published name

    def forward(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values ``(B, n, m, 3, D)`` to ``(B, n, m, D)``."""
        length = qkv.shape[self.axis]
        # Neighbours of one width at a time: where the width divides the grid, that is all of them.
        runs = [list(run) for _, run in groupby(stripe_widths(length, self.width or length))]
        parts = qkv.split([sum(run) for run in runs], dim=self.axis)
        results = [self._stripes(part, run[0]) for part, run in zip(parts, runs, strict=True)]
        return _joined(results, dim=self.axis)

    def _stripes(self, qkv: Tensor, width: int) -> Tensor:
        """``forward`` where stripes have exactly that width."""
        batch, n, m = qkv.shape[:3]
        dim, h, d = self.dim, self.num_heads, self.dim // self.num_heads
        rows, columns = (width, m) if self.axis == _ROWS else (n, width)
        down, across = n // rows, m // columns
        stripes, tokens = batch * down * across, rows * columns
        x = qkv.reshape(batch, down, rows, across, columns, 3, h, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = x.reshape(3, stripes, h, tokens, d)
        lepe = self.get_v(v.mT.reshape(stripes, dim, rows, columns))
        x = attention(q, k, v) + lepe.reshape(stripes, h, d, tokens).mT  # (stripes, h, tokens, d)
        x = x.reshape(batch, down, across, h, rows, columns, d).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(batch, n, m, dim)


def stripe_widths(length: int, width: int) -> list[int]:
    """Of stripes ``width`` wide, laid side by side and centred over ``length`` tokens, what of each
    lies on the tokens: all of it but for the outer ones where ``width`` does not divide."""
    outside = -length % width
    widths = [width] * ((length + outside) // width)
    widths[0] -= outside // 2
    widths[-1] -= outside - outside // 2
    return widths


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _check_stages(embed_dim: int, **sizes: Sequence[int]) -> None:
    for name, value in sizes.items():
        whole = isinstance(value, (list, tuple)) and all(type(n) is int and n > 0 for n in value)
        if not whole or len(value) != 4:
            raise UserError(
                f"{name} is {value!r}; it is four whole numbers from 1, one of each stage, such as "
                "[2, 4, 8, 16]."
            )
    for number, heads in enumerate(sizes["heads"]):
        width = embed_dim << number
        if number < 3 and heads % 2:
            raise UserError(
                f"heads is {list(sizes['heads'])}; half of a stage's have vertical stripes and half "
                f"horizontal ones, so that of stage {number + 1} is even."
            )
        if width % heads:
            raise UserError(
                f"embed_dim {embed_dim} makes stage {number + 1} {width} wide, which cannot be "
                f"shared out among {heads} heads; it is a multiple of them."
            )
