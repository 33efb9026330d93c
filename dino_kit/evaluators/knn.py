"""Weighted nearest-neighbour classification of frozen features.

Source: Caron et al. 2021, section 4.1 (k-NN), with the vote of Wu et al. 2018, "Unsupervised
feature learning via non-parametric instance discrimination": each of the k nearest images of the
bank adds exp(similarity / temperature) to its class.

Legend: n images of the bank, m queries, D width, k neighbours, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kit import log
from dino_kit.errors import UserError
from dino_kit.search import nearest

TOP = 5
_QUERIES = 4096  # searched at once
_VOTES = 1 << 22  # held at once

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def nearest_by_faiss(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What :func:`dino_kit.search.nearest` returns, by faiss, equal up to ties; float32, CPU.

    On macOS it is that search: there PyTorch and faiss each bring an OpenMP of their own, and a
    process that uses both can crash.
    """
    if sys.platform == "darwin":
        return nearest(bank, queries, k)
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        # The flat index's own search, on the arrays in place: an index would copy the bank.
        similarity, index = faiss.knn(
            queries.contiguous().numpy(),
            bank.contiguous().numpy(),
            k,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
    finally:
        faiss.omp_set_num_threads(threads)
    return torch.from_numpy(similarity), torch.from_numpy(index)


def vote(
    similarity: Tensor, neighbour_labels: Tensor, num_classes: int, temperature: float
) -> Tensor:
    """The classes with most votes, best first; among equal votes the lower class first.

    Args:
        similarity: (m, k), cosine similarities to the neighbours.
        neighbour_labels: (m, k), int64, their classes, from 0 to ``num_classes - 1``.
        num_classes: C.
        temperature: divides the similarities before the exponential; above 0.

    Returns:
        (m, min(5, C)) class indices.
    """
    k = similarity.shape[1]
    ((_, ranked),) = _votes(similarity, neighbour_labels, num_classes, temperature, [k])
    return ranked


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    *,
    search: Search = nearest_by_faiss,
    advance: Callable[[int], object] = lambda queries: None,
) -> dict[int, dict[str, float | None]]:
    """Classify ``test`` by its neighbours in ``train``, for every value of k from one search.

    Args:
        train, test: (n, D) and (m, D) features; they are L2-normalised here.
        train_labels, test_labels: (n,) and (m,) classes, int64, from 0 on.
        ks: numbers of neighbours; one above n is clipped to n, with a notice.
        temperature: of the vote, above 0.
        search: finds the neighbours, as :func:`dino_kit.search.nearest` does.
        advance: called with the number of queries done since the last call.

    Returns:
        For every k used, in rising order, ``top1`` and ``top5`` in percent; ``top5`` counts
        min(5, k) classes as the reference does, and is None where there are fewer than five.

    Raises:
        UserError: features and labels do not fit together, or features are not finite.
    """
    _check(train, train_labels, "bank")
    _check(test, test_labels, "queries")
    if train.shape[1] != test.shape[1]:
        raise UserError(
            f"The bank's features are {train.shape[1]} wide and the queries' {test.shape[1]}; both "
            "have to come from the same backbone."
        )
    if temperature <= 0 or not ks or min(ks) < 1:
        raise UserError(
            f"k-NN got k {list(ks)} at temperature {temperature}; k counts neighbours, from 1, and "
            "the temperature is above 0."
        )
    ks = _clipped(ks, len(train))
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    train, test = (F.normalize(x.float().cpu(), dim=1) for x in (train, test))
    train_labels, test_labels = train_labels.long().cpu(), test_labels.long().cpu()

    first, five = dict.fromkeys(ks, 0), dict.fromkeys(ks, 0)
    for start in range(0, len(test), _QUERIES):
        part = slice(start, start + _QUERIES)
        similarity, index = search(train, test[part], ks[-1])
        labels, truth = train_labels[index], test_labels[part]
        for rows in torch.arange(len(truth)).split(max(1, _VOTES // num_classes)):
            votes = _votes(similarity[rows], labels[rows], num_classes, temperature, ks)
            for k, ranked in votes:
                hit = ranked == truth[rows, None]  # (rows, min(5, C))
                first[k] += int(hit[:, 0].sum())
                five[k] += int(hit[:, :k].sum())
        advance(len(truth))
    return {
        k: {
            "top1": 100.0 * first[k] / len(test),
            "top5": 100.0 * five[k] / len(test) if num_classes >= TOP else None,
        }
        for k in ks
    }


def _votes(
    similarity: Tensor,
    labels: Tensor,
    num_classes: int,
    temperature: float,
    ks: Sequence[int],
) -> Iterator[tuple[int, Tensor]]:
    """For each of the rising ``ks``: k and the classes ranked by the first k neighbours' votes.

    Each neighbour is counted once for all values of k, into sums (m, C).
    """
    similarity = similarity.double()
    # Subtracting a row's largest changes no rank, and a low temperature cannot overflow.
    weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    sums = weights.new_zeros(len(weights), num_classes)
    done = 0
    for k in ks:
        sums.scatter_add_(1, labels[:, done:k], weights[:, done:k])
        yield k, _ranked(sums, min(TOP, num_classes))
        done = k


def _ranked(sums: Tensor, top: int) -> Tensor:
    # argmax, unlike topk, promises the first of equal maxima.
    sums = sums.clone()
    best = []
    for _ in range(top):
        best.append(sums.argmax(dim=1, keepdim=True))
        sums.scatter_(1, best[-1], -1.0)  # below any sum of votes
    return torch.cat(best, dim=1)


def _clipped(ks: Sequence[int], n: int) -> list[int]:
    if max(ks) > n:
        above = ", ".join(str(k) for k in sorted(set(ks)) if k > n)
        log.notice(f"k {above} is more than the bank's {n} images; k is {n} instead.")
    return sorted({min(k, n) for k in ks})


def _check(features: Tensor, labels: Tensor, name: str) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise UserError(
            f"The {name} have features of shape {tuple(features.shape)} and labels of shape "
            f"{tuple(labels.shape)}; k-NN takes (images, width) and (images,), one image or more."
        )
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise UserError(f"The {name} have labels that are no class numbers 0, 1, 2 ….")
    if not bool(features.isfinite().all()):
        raise UserError(
            f"The {name} have features that are not finite; the checkpoint's weights are likely "
            "broken."
        )
