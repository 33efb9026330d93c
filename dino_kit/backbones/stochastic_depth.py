"""Stochastic depth: which residual branches a view keeps, and adding only those.

What is dropped is drawn on the host, so a dropped sample costs no computation on the device.
Source: Huang et al. 2016, "Deep networks with stochastic depth", per sample.

Legend: B batch, V views of an image, L residual branches of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dino_kit.randomness import stream


def linear_rates(last: float, depth: int) -> tuple[float, ...]:
    """Rates of the ``2 * depth`` branches of ``depth`` blocks, from 0 linearly to ``last``."""
    rates = torch.linspace(0, last, depth, device="cpu").tolist()
    return tuple(rate for rate in rates for _ in range(2))


def draw_keep(
    seed: int, step: int, places: Tensor, num_views: int, rates: Sequence[float]
) -> Tensor:
    """Draw the branches that each view of each image keeps: ``(L, V, B)``, bool, on the host.

    ``places`` (B,) are the images' places in the global batch, and an image's draw depends on its
    own place alone: however a batch is split over processes and micro-batches, the union of the
    parts' draws is the draw of the whole.
    """
    wanted = places.cpu().numpy()
    rows = int(wanted.max()) + 1
    kept = np.empty((len(rates), num_views, len(wanted)), dtype=bool)
    for view in range(num_views):
        # Rows are filled in order, so the numbers of one place do not depend on how many follow.
        numbers = stream("stochastic depth", seed, step, view).random(
            (rows, len(rates)), dtype=np.float32
        )
        kept[:, view] = (numbers[wanted] >= np.asarray(rates, dtype=np.float32)).T
    return torch.from_numpy(kept)


def kept_rows(keep: Tensor, device: torch.device) -> list[Tensor]:
    """For each branch of ``keep`` (L, B) the indices of the samples that keep it, on ``device``."""
    counts = keep.sum(dim=1).tolist()
    rows = keep.nonzero()[:, 1]
    if device.type == "cuda" and not rows.is_cuda:
        rows = rows.pin_memory()  # all branches in one copy that the host does not wait for
    return list(rows.to(device, non_blocking=True).split(counts))


def add_branch(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    kept: Tensor | None,
    rate: float,
    sees: Tensor | None = None,
) -> Tensor:
    """``x + branch(x)``, or where ``kept`` says so, only on those rows and scaled by ``1/(1-rate)``.

    ``x`` (B, …); ``kept`` (b,) distinct row indices, None for no stochastic depth; ``sees`` (B, …)
    what the branch is given in place of ``x``. A branch that no row keeps still runs, on no rows:
    its weights then get a gradient of zero, not none, and so decay like those of any other step.
    """
    sees = x if sees is None else sees
    if kept is None:
        return x + branch(sees)
    scale = 1.0 / (1.0 - rate)
    if len(kept) == len(x):
        return torch.add(x, branch(sees), alpha=scale)
    update = branch(sees.index_select(0, kept))
    return x.index_add(0, kept, update.to(x.dtype), alpha=scale)
