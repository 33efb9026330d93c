"""Sinkhorn-Knopp: teacher targets that use all prototypes equally.

Legend: B images, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dino_kit import distributed


@torch.no_grad()
def sinkhorn_knopp(teacher_logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balanced assignments: logits ``(2, B, K)`` to probabilities ``(2, B, K)`` in float32.

    Starting from ``exp(logits / temperature)``, each iteration gives all prototypes the same mass
    over the rows of both crops and all processes, then makes every row sum to 1. The iterations
    run on logarithms, so no logit, however large, over- or underflows. Source: Caron et al. 2020
    (SwAV), section 3.1; in place of centring, Oquab et al. 2023 (DINOv2), section 4.
    """
    scores = teacher_logits.float().flatten(0, 1) / temperature  # (2B, K)
    for _ in range(iterations):
        scores -= _logsumexp_of_columns(scores)
        scores -= scores.logsumexp(dim=1, keepdim=True)
    return scores.exp_().view(teacher_logits.shape)


def _logsumexp_of_columns(scores: Tensor) -> Tensor:
    """``(1, K)`` over the rows of all processes."""
    largest = distributed.all_reduce_max(scores.amax(dim=0, keepdim=True))
    sums = distributed.all_reduce_sum((scores - largest).exp_().sum(dim=0, keepdim=True))
    return sums.log_().add_(largest)
