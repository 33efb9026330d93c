"""What some of timm's models can do besides, and how those that are made for one size meet others.

Legend: B batch, A heads, N patches, P prefix tokens, T = P+N, D width, M patches of a grid.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from timm.models import beit
from torch import Tensor, nn

from dino_kit.backbones.grids import Grid, carried
from dino_kit.backbones.layers import block_index, patch_grid
from dino_kit.backbones.libraries.any_grid import TokenMixings
from dino_kit.backbones.libraries.kernel_maps import fused_attentions, map_of
from dino_kit.backbones.libraries.timm_backbone import TimmBackbone
from dino_kit.backbones.libraries.wrapped import resized_positions

# Those whose tokens all attend to each other, where their blocks are the usual ones.
_ATTENDING = {"VisionTransformer", "VisionTransformerRelPos", "NaFlexVit", "Eva"}


def kind_of(model: nn.Module) -> type[TimmBackbone]:
    """The class by which a model of timm is read."""
    families = {family.__name__ for family in type(model).__mro__}
    if "MlpMixer" in families:
        return TokenMixer if _matrices(model) is None else MatrixMixer
    if "Cait" in families:
        return Cait
    if "Xcit" in families:
        return Xcit
    if "Beit" in families:
        return Beit
    if families & _ATTENDING and all(_has_one_map(block) for block in model.blocks):
        return SelfAttending
    return TimmBackbone


def _has_one_map(block: nn.Module) -> bool:
    """Not where attentions stand side by side, or one is the difference of two."""
    names = [type(module).__name__ for module in fused_attentions(block)]
    return len(names) == 1 and "Diff" not in names[0]


class SelfAttending(TimmBackbone):
    """A model whose tokens all attend to each other in every block."""

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, A, T, T)``; prefix tokens first."""
        return self.get_selfattention(images, -1)

    def get_selfattention(self, images: Tensor, block: int) -> Tensor:
        """The same of any block, counted from 0, or from the end as -1, -2, …"""
        self.keep_all()
        blocks = self.model.blocks
        chosen = blocks[block_index(block, len(blocks))]
        return map_of(chosen, lambda: self._encode(images))


class Beit(SelfAttending):
    """BEiT, whose table of relative positions is interpolated for other grids than its own."""

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        model.patch_embed.strict_img_size = False
        for block in model.blocks:
            block.attn.__class__ = _AnyWindow
        super().__init__(model, name, image_size, in_chans)

    def encode(self, images: Tensor) -> Tensor:
        grid = patch_grid(images, self.in_chans, self.model.patch_embed.patch_size[0])
        for block in self.model.blocks:
            block.attn.grid = grid
        return super().encode(images)


class _AnyWindow(beit.Attention):
    """Attention whose window is whatever ``grid`` the images have."""

    grid: Grid

    def _get_rel_pos_bias(self) -> Tensor:
        """``(1, A, T, T)``."""
        native = tuple(self.window_size)
        if self.grid == native:
            return super()._get_rel_pos_bias()
        table = self.relative_position_bias_table  # (distances + 3, A)
        # The last three rows are from and to the class token, and of it to itself.
        table = torch.cat((table[-3:], table[:-3]))[None]
        was, now = (tuple(2 * side - 1 for side in grid) for grid in (native, self.grid))
        table = resized_positions(table, was, now, prefix=3)[0]
        table = torch.cat((table[3:], table[:3]))
        return table[_relative_index(self.grid, table.device)].permute(2, 0, 1)[None]


@lru_cache(maxsize=32)
def _relative_index(grid: Grid, device: torch.device) -> Tensor:
    """For each pair of tokens its row of the table, (T, T)."""
    with torch.inference_mode(False):
        return beit.gen_relative_position_index(grid).to(device)


class _ClassAttending(TimmBackbone):
    """A model in whose last blocks the class token alone attends."""

    class_blocks: str

    def get_last_classattention(self, images: Tensor) -> Tensor:
        """The last block's attention after the softmax, ``(B, A, T)``; the class token first."""
        self.keep_all()
        block = getattr(self.model, self.class_blocks)[-1]
        return map_of(block, lambda: self._encode(images))[:, :, 0]


class Xcit(_ClassAttending):
    """XCiT, whose other blocks attend over channels, and have no map of patches."""

    class_blocks = "cls_attn_blocks"


class Cait(_ClassAttending):
    """CaiT at any size: its positions are interpolated.

    Its other blocks mix their heads' maps before and after the softmax; they have no map each.
    """

    class_blocks = "blocks_token_only"

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        model.patch_embed.strict_img_size = False
        super().__init__(model, name, image_size, in_chans)

    def encode(self, images: Tensor) -> Tensor:
        model = self.model
        grid = patch_grid(images, self.in_chans, model.patch_embed.patch_size[0])
        x = model.patch_embed(images)  # (B, N, D)
        x = x + resized_positions(model.pos_embed, model.patch_embed.grid_size, grid, prefix=0)
        x = model.blocks(x)
        token = model.cls_token.expand(len(x), -1, -1)
        for block in model.blocks_token_only:
            token = block(x, token)  # (B, 1, D)
        return model.norm(torch.cat((token, x), dim=1))


class TokenMixer(TimmBackbone):
    """MLP-Mixer, ResMLP and gMLP on any grid of patches.

    A Mixer mixes patches by two layers with a GELU between them, and so by no one matrix.
    """

    def __init__(self, model: nn.Module, name: str, image_size: int, in_chans: int):
        model.stem.strict_img_size = False
        mixings = _matrices(model) or [block.mlp_tokens for block in model.blocks]
        self._mixings = TokenMixings(mixings, tuple(model.stem.grid_size))
        super().__init__(model, name, image_size, in_chans)

    def encode(self, images: Tensor) -> Tensor:
        self._mixings.grid = patch_grid(images, self.in_chans, self.model.stem.patch_size[0])
        return super().encode(images)


class MatrixMixer(TokenMixer):
    """ResMLP and gMLP, which mix patches by one matrix in each block."""

    def get_last_mixing(self, grid: Grid) -> Tensor:
        """The last block's matrix for patches of a ``grid``, ``(M, M)``, signed.

        Of a gMLP what it gives is a gate of the patch, not an addition to it.
        """
        return carried(_matrices(self.model)[-1].weight, self._mixings.native, grid)


def _matrices(model: nn.Module) -> list[nn.Linear] | None:
    """The linear layer of each block that mixes patches; None where it takes two."""
    if hasattr(model.blocks[0], "linear_tokens"):
        return [block.linear_tokens for block in model.blocks]
    if hasattr(model.blocks[0], "mlp_tokens"):
        return None
    return [block.mlp_channels.gate.proj for block in model.blocks]
