"""Where attention goes through all blocks together: attention rollout.

One block's map says from which of its inputs a token takes, and those are mixtures of patches
already. Rollout follows the mixing from the first block on. Source: Abnar and Zuidema 2020,
"Quantifying attention flow in transformers" (arXiv:2005.00928), section 3:

    mixing of block l     A_l = (mean over heads of W_l + I) / 2, rows scaled to sum to 1
    rollout to block l    Ã_l = A_l Ã_{l-1},  Ã_0 = A_0                                  (equation 1)

W_l are the block's attention maps, and I stands for its skip connection, which is counted like its
attention; MLPs, values and norms are left out, so it tells a route and no share of the result.

Legend: C channels, H and W pixels, N = h·w patches, P prefix tokens (the class token first),
T = P+N, L blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from dino_kit.evaluators.attention import grid_of, looking, require_attention


def rollout(backbone: nn.Module, image: Tensor, tokens: int = 1) -> Tensor:
    """From where the last block's first ``tokens`` tokens have come, the class token alone at first.

    The product is taken from its left, Ã = ((A_{L-1} A_{L-2}) …) A_0, of the rows that are asked
    for, and one block's maps are held at a time. Each block's are computed by themselves, and those
    before it run again, so it costs about L/2 passes of the network.

    Args:
        backbone: one with ``get_selfattention`` and ``depth``; it runs in eval mode and float32.
        image: ``(C, H, W)``, normalised, on the backbone's device; its sides are multiples of the
            patch size.
        tokens: how many tokens, T for all.

    Returns:
        ``(tokens, T)`` float32 on the CPU, from 0; rows sum to 1.

    Raises:
        UserError: no self-attention; an image that does not fit the backbone, or of so many
            patches that their maps do not fit into memory.
    """
    require_attention(backbone)
    flow = None
    with looking(backbone, image):
        for block in reversed(range(backbone.depth)):
            mixing = backbone.get_selfattention(image[None], block)[0].float().mean(dim=0) / 2
            mixing.diagonal().add_(0.5)
            mixing /= mixing.sum(dim=1, keepdim=True)  # (T, T)
            flow = mixing[:tokens] if flow is None else flow @ mixing  # (tokens, T)
        return flow.cpu()


def rollout_map(backbone: nn.Module, image: Tensor) -> Tensor:
    """What has come to the class token from each patch, ``(h, w)``; else as :func:`rollout`.

    It sums to at most 1: the rest has come from the prefix tokens.
    """
    (row,) = rollout(backbone, image)
    return row[backbone.num_prefix_tokens :].unflatten(0, grid_of(backbone, image))
