"""Which patches are like the whole image: what every backbone can show, with or without attention.

Legend: C channels, H and W pixels, N = h·w patches, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.backbones.frozen import frozen


def patch_similarity(backbone: nn.Module, image: Tensor) -> Tensor:
    """The cosine similarity of each patch's feature to the pooled one, ``(h, w)``, on the CPU.

    Args:
        backbone: one with ``forward_features``; it runs in eval mode and float32.
        image: ``(C, H, W)``, normalised, on the backbone's device; its sides are multiples of the
            patch size.
    """
    with frozen(backbone, image.device):
        pooled, patches, grid = backbone.forward_features(image[None])
        similarity = F.cosine_similarity(patches[0], pooled, dim=-1)  # (N,)
    return similarity.float().cpu().unflatten(0, grid)
