"""Tokens of one grid of patches as those of another.

Both axes are resampled by themselves. A coarser grid takes the mean of what each of its patches
covers, a finer one interpolates between the patches' centres. So no weight is negative, each new
patch's weights sum to one, a mirrored picture gives mirrored tokens, and an axis that keeps its
length keeps its values exactly.

Legend: m source and n target patches of an axis, h × w source and h' × w' target patches of an
image, D width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]


class Resampling(NamedTuple):
    """Between two grids, axis by axis; as one matrix, the Kronecker product of the two."""

    rows: Tensor  # (h', h)
    columns: Tensor  # (w', w)

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens ``(..., h·w, D)``, row by row, to ``(..., h'·w', D)``."""
        (rows, h), (columns, w) = self.rows.shape, self.columns.shape
        leading, width = x.shape[:-2], x.shape[-1]
        x = self.rows @ x.reshape(*leading, h, w * width)
        x = self.columns @ x.reshape(*leading, rows, w, width)
        return x.reshape(*leading, rows * columns, width)

    def transposed(self) -> Resampling:
        """The transposed matrix, which resamples sums, not means, back to the source grid."""
        return Resampling(self.rows.T, self.columns.T)

    def operations(self) -> int:
        """Multiplications that one channel of one image costs."""
        (rows, h), (columns, w) = self.rows.shape, self.columns.shape
        return rows * w * (h + columns)


def resampling(
    source: Grid, target: Grid, device: torch.device | str = "cpu", dtype=torch.float32
) -> Resampling:
    """From tokens of the grid ``source`` to those of ``target``; each is (down, across)."""
    rows, columns = (
        _axis(m, n, torch.device(device), dtype) for m, n in zip(source, target, strict=True)
    )
    return Resampling(rows, columns)


def carried(matrix: Tensor, source: Grid, target: Grid) -> Tensor:
    """``U A D``: what mixes patches of ``source`` by ``matrix`` A, for patches of ``target``.

    D resamples tokens from ``target`` to ``source``, and U back.
    """
    like = {"device": matrix.device, "dtype": matrix.dtype}
    up, down = resampling(source, target, **like), resampling(target, source, **like)
    return down.transposed()(up(matrix).mT).mT


# Not of any module, so neither in its state nor in a copy of it, and for each device by itself.
@lru_cache(maxsize=256)
def _axis(source: int, target: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix ``(n, m)`` of an axis; patches fill it from end to end on both grids."""
    # What is first needed by an evaluator must serve a training step too.
    with torch.inference_mode(False), torch.no_grad():
        ends = torch.arange(target + 1, dtype=torch.float64, device="cpu") * source / target
        first = torch.arange(source, dtype=torch.float64, device="cpu")  # where patches begin
        if target < source:
            shared = torch.minimum(ends[1:, None], first + 1) - torch.maximum(ends[:-1, None], first)
            weights = shared.clamp(min=0)
        else:
            centres = (ends[:-1] + ends[1:]) / 2 - 0.5
            distance = centres.clamp(0, source - 1)[:, None] - first
            weights = (1 - distance.abs()).clamp(min=0)
        weights = weights + weights.flip(0, 1)  # equal in a mirror to the last bit
        return (weights / weights.sum(dim=1, keepdim=True)).to(device, dtype)
