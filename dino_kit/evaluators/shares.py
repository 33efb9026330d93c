"""Features of a source's images, of which every process makes a share.

Legend: n images, m of them that can be used, E width of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dino_kit import distributed
from dino_kit.data.sources.source import Source, Subset
from dino_kit.evaluators.linear import LinearFeatures
from dino_kit.features import Features, LabelledFeatures, embed, labels_of, require_some
from dino_kit.weights import EvalTransform

_ROWS = 4096  # of each process, that are sent at once


def shared_features(
    features: LinearFeatures, source: Source, transform: EvalTransform, **how: Any
) -> LabelledFeatures:
    """Of this process's share; every image is in one share.

    ``how`` is the batch size, workers, device and description of :func:`dino_kit.features.embed`.

    Raises:
        UserError: an image has no label, or no process can use any of its images.
    """
    labels = labels_of(source)
    found, places, left_out = _share(features, source, transform, **how)
    return LabelledFeatures(found, labels[places], left_out)


def joined_features(
    features: nn.Module, source: Source, transform: EvalTransform, **how: Any
) -> Features:
    """Of all images, on the main process, in the order of the source; arguments likewise.

    Other processes than the main one get no features, (0, E) and (0,), but all names.

    Raises:
        UserError: no process can use any of its images.
    """
    found, places, left_out = _share(features, source, transform, **how)
    joined, places = _joined(found, places, torch.device(how["device"]))
    every = distributed.all_gather_plain(left_out)
    return Features(joined, places, {name: why for own in every for name, why in own.items()})


def _share(
    features: nn.Module, source: Source, transform: EvalTransform, **how: Any
) -> tuple[Tensor, Tensor, dict[str, str]]:
    share = range(distributed.rank(), len(source), distributed.world_size())
    found = embed(features, Subset(source, share), **transform._asdict(), **how)
    used = distributed.total(len(found.kept), torch.device(how["device"]))
    require_some(source, used, found.left_out)
    return found.features, found.kept * share.step + share.start, found.left_out


def _joined(features: Tensor, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """All processes' rows in the order of their places, on the main one; no more is kept there."""
    if distributed.world_size() == 1:
        return features, places
    most = int(distributed.all_reduce_max(torch.tensor(len(places), device=device)))
    padded = torch.full((most,), -1, device=device)
    padded[: len(places)] = places.to(device)
    all_places = distributed.all_gather(padded).view(-1, most).cpu()  # (processes, most)
    order = all_places[all_places >= 0].sort().values
    rows = torch.empty(len(order) if distributed.is_main() else 0, features.shape[1])
    for part in torch.arange(most).split(_ROWS):
        sent = torch.zeros(len(part), features.shape[1], device=device)
        mine = features[part[0] : part[-1] + 1]
        sent[: len(mine)] = mine.to(device)
        received = distributed.all_gather(sent).cpu()  # (processes * rows, E)
        if distributed.is_main():
            at = all_places[:, part].flatten()
            rows[torch.searchsorted(order, at[at >= 0])] = received[at >= 0]
    return rows, order[: len(rows)]
