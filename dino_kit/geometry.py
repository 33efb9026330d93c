"""How the embeddings of some images lie: how far apart, in how many directions, and whether two views
of an image lie together.

Legend: n unit vectors, D their width, B images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(embeddings: Tensor) -> Tensor:
    """Total variance of unit vectors ``(n, D)``: ``()``, from 0, all the same, to 1."""
    return 1.0 - embeddings.mean(dim=0).square().sum()


def effective_rank(embeddings: Tensor) -> Tensor:
    """In how many directions unit vectors ``(n, D)`` extend: ``()``, from 1 to min(n, D).

    The exponential of the entropy of the normalised singular values; not centred, so that what is
    all the same has rank 1, and not that of its noise. Source: Garrido et al. 2023, "RankMe".
    """
    tall = len(embeddings) > embeddings.shape[1]
    x = embeddings.double() if embeddings.device.type != "mps" else embeddings.cpu().double()
    gram = x.T @ x if tall else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().to(embeddings)


def view_retrieval(first: Tensor, second: Tensor) -> Tensor:
    """The share of images whose two views find each other, ``()``.

    ``first`` and ``second`` (B, D) are unit vectors; a view has found the other where it is nearer
    than that of any other image. Both directions count; chance gives 1/B.
    """
    similarity = first @ second.T  # (B, B)
    own = similarity.diagonal()
    others = similarity.masked_fill(
        torch.eye(len(own), dtype=torch.bool, device=own.device), -torch.inf
    )
    found = torch.stack((own > others.amax(dim=1), own > others.amax(dim=0)))
    return found.float().mean()
