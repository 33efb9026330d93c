"""ResMLP: patches mixed by one matrix instead of by attention; published names of its weights.

Source: Touvron et al. 2021, "ResMLP: Feedforward networks for image classification with
data-efficient training" (arXiv:2105.03404), with the first weights of its published code.

Without attention nothing is left that normalisation would have to hold together, and an affine map,
a learnt scale and shift of each channel, takes the place of every norm (section 2):

    Aff(x) = α x + β                                                   α, β (D,)

A block is two residual sublayers: one lets patches see each other, for every channel alike, the other
lets channels see each other, for every patch alike. Legend as below; x is (N, D), of one image:

    x ← x + γ₁ (A Aff(x) + b)                                          A (N, N), b (N,)
    x ← x + γ₂ (GELU(Aff(x) W₁ + b₁) W₂ + b₂)                          γ (D,), LayerScale

MLP-Mixer (Tolstikhin et al. 2021), for contrast, has a LayerNorm for Aff, no γ, and between patches
an MLP of two layers, x ← x + V₂ GELU(V₁ LN(x)), where here one matrix does. So the rows of A can be
shown: row i is what each patch adds to patch i, whatever the image. The feature is the mean of
Aff(x) over the patches.

A is made for one grid of patches. How other grids are met, which multi-crop needs, is ours:

    A' = U A D,   b' = U b

where D resamples tokens of the images' grid to the native one and U back, each row of both summing
to one, exact at the native size (:class:`TokenMixing`, :mod:`~dino_kit.backbones.grids`).

Legend: B batch, C channels, H and W pixels, N patches of the native grid, M of the images' grid,
A (N, N) the matrix, D width, L = 2 * depth residual branches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.backbones.grids import Grid, carried, resampling
from dino_kit.backbones.interface import Features
from dino_kit.backbones.layers import (
    Mlp,
    PatchEmbed,
    check_sizes,
    init_linear_layers,
    patch_grid,
    run_block,
)
from dino_kit.backbones.maps import WithoutSelfAttention
from dino_kit.backbones.stochastic_depth import add_branch, kept_rows
from dino_kit.config.architectures import MLP_GRID, MLP_GRIDS
from dino_kit.errors import UserError


class ResMLP(WithoutSelfAttention):
    """Images ``(B, C, H, W)``, sides multiples of the patch size, to their features ``(B, D)``.

    Any such sides will do, by one of two rules; both leave images of ``image_size`` as they are.

    Args:
        image_size: side in pixels whose grid of patches the token mixing is made for.
        patch_size: side of a patch in pixels.
        in_chans: C, channels of an image.
        embed_dim: D, width of a token.
        depth: number of blocks.
        mlp_ratio: width of a block's hidden layer, as a multiple of D.
        drop_path_rate: every block's rate of stochastic depth.
        init_scale: the first value of LayerScale; None for :func:`first_scale` of the depth.
        mlp_grid: the rule for other sizes: ``"mix"`` carries the token mixing over to the images'
            grid, ``"resize"`` resizes the images to ``image_size``.

    Raises:
        UserError: the sizes do not fit together, or there is no such rule.
    """

    num_prefix_tokens = 0
    checkpoint_activations = False  # see run_block

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        init_scale: float | None = None,
        mlp_grid: str = MLP_GRID,
    ):
        super().__init__()
        check_sizes(
            drop_path_rate,
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
        )
        if mlp_grid not in MLP_GRIDS:
            raise UserError(f"mlp_grid is {mlp_grid!r}; it is one of {', '.join(MLP_GRIDS)}.")
        self.image_size, self.patch_size, self.in_chans = image_size, patch_size, in_chans
        self.embed_dim, self.depth, self.mlp_grid = embed_dim, depth, mlp_grid
        # One rate for all, as in the published code, where a ViT's grows with the depth.
        self.drop_path_rates = (float(drop_path_rate),) * (2 * depth)

        side = image_size // patch_size
        self.grid = (side, side)  # the native one
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        hidden = int(embed_dim * mlp_ratio)
        scale = first_scale(depth) if init_scale is None else init_scale
        self.blocks = nn.ModuleList(
            Block(embed_dim, self.grid, hidden, scale) for _ in range(depth)
        )
        self.norm = Affine(embed_dim)
        init_linear_layers(self)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The means of the normalised patches, ``(B, D)``.

        ``keep`` (L, B), bool, on the host, says which residual branches each sample keeps (see
        :func:`~dino_kit.backbones.stochastic_depth.draw_keep`); None keeps all, unscaled.
        """
        x, grid = self._tokens(images)
        kept = [None] * (2 * self.depth) if keep is None else kept_rows(keep, x.device)
        for index, block in enumerate(self.blocks):
            branches = slice(2 * index, 2 * index + 2)
            rates = self.drop_path_rates[branches]
            x = run_block(block, self.checkpoint_activations, x, grid, kept[branches], rates)
        return self.norm(x).mean(dim=1)

    def forward_features(self, images: Tensor) -> Features:
        """The mean of the patches, the patches and their grid, normalised.

        Where images are resized, the grid is that of the resized images.
        """
        x, grid = self._tokens(images)
        for block in self.blocks:
            x = block(x, grid)
        x = self.norm(x)
        return Features(x.mean(dim=1), x, grid)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Outputs of the last ``n`` blocks, first to last, normalised, each ``(B, M, D)``."""
        x, grid = self._tokens(images)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, grid)
            if index >= self.depth - n:
                outputs.append(self.norm(x))
        return outputs

    def get_last_mixing(self, grid: Grid) -> Tensor:
        """The last block's token mixing on a grid ``(h, w)``, (M, M) with M = h·w; signed.

        Row i is what each patch adds to patch i, before LayerScale.

        Raises:
            UserError: images are resized, so that no other grid than the native one occurs.
        """
        if self.mlp_grid == "resize" and grid != self.grid:
            raise UserError(
                f"With mlp_grid resize tokens are mixed on {self.grid[0]} × {self.grid[1]} patches "
                f"only, and not on {grid[0]} × {grid[1]}."
            )
        return self.blocks[-1].attn.on_grid(grid)[0]

    def _tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Patch embeddings (B, M, D), and their grid."""
        grid = patch_grid(images, self.in_chans, self.patch_size)
        if self.mlp_grid == "resize" and grid != self.grid:
            grid = self.grid
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        # Under autocast, too, what the blocks add to keeps the weights' precision.
        return self.patch_embed(images).to(self.norm.alpha.dtype), grid


def first_scale(depth: int) -> float:
    """LayerScale's first value for so many blocks: the deeper, the smaller.

    Source: Touvron et al. 2021, "Going deeper with image transformers", section 2, which gives
    what ResMLP's published code has for 12, 24 and 36 blocks.
    """
    if depth <= 18:
        return 0.1
    return 1e-5 if depth <= 24 else 1e-6


class Affine(nn.Module):
    """Each channel scaled and shifted, in the place of a norm; nothing is measured."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class Block(nn.Module):
    """Token mixing, then an MLP; what each adds is scaled channel by channel (LayerScale)."""

    def __init__(self, dim: int, grid: Grid, hidden: int, scale: float):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))
        self.norm1 = Affine(dim)
        self.attn = TokenMixing(grid)
        self.norm2 = Affine(dim)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, grid: Grid, kept=(None, None), rates=(0.0, 0.0)) -> Tensor:
        """``(B, M, D)`` to the same; ``kept`` and ``rates`` of its two branches as add_branch's."""

        def mixed(y: Tensor) -> Tensor:
            return self.gamma_1 * self.attn(self.norm1(y), grid)

        x = add_branch(x, mixed, kept[0], rates[0])
        return add_branch(x, lambda y: self.gamma_2 * self.mlp(self.norm2(y)), kept[1], rates[1])


class TokenMixing(nn.Linear):
    """``A x + b`` over the patches, for every channel alike; A and b are of one, native grid.

    On another grid it is ``U (A (D x) + b)``, where D resamples tokens from that grid to the native
    one and U back (:mod:`~dino_kit.backbones.grids`). As rows of both sum to one, what holds of
    every patch alike stays as it is, and at the native grid both are the identity.
    """

    def __init__(self, grid: Grid):
        super().__init__(grid[0] * grid[1], grid[0] * grid[1])
        self.grid = grid

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens ``(B, M, D)`` of ``grid`` to the same."""
        if grid == self.grid:
            return F.linear(x.mT, self.weight, self.bias).mT
        if self._forming_is_cheaper(len(x) * x.shape[2], grid):
            return F.linear(x.mT, *self.on_grid(grid)).mT
        down, up = self._resamplings(grid)
        return up(F.linear(down(x).mT, self.weight, self.bias).mT)

    def on_grid(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """``A' = U A D`` (M, M) and ``b' = U b`` (M,), which do the same on ``grid``."""
        if grid == self.grid:
            return self.weight, self.bias
        _, up = self._resamplings(grid)
        # In the weights' own precision: this is little work, and done before any image is seen.
        with torch.autocast(self.weight.device.type, enabled=False):
            return carried(self.weight, self.grid, grid), up(self.bias[:, None])[:, 0]

    def _resamplings(self, grid: Grid):
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        return resampling(grid, self.grid, **like), resampling(self.grid, grid, **like)

    def _forming_is_cheaper(self, channels: int, grid: Grid) -> bool:
        """By multiplications, for so many channels of all images together."""
        down, up = self._resamplings(grid)
        native, ours = self.in_features, grid[0] * grid[1]
        formed = native * up.operations() + ours * down.operations() + channels * ours**2
        return formed <= channels * (down.operations() + native**2 + up.operations())
