"""How long exact k-NN takes, ours and the reference's way, on the same random features.

Legend: n images of the bank, m queries, D width, k neighbours, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kit.bench.machine import Peak
from dino_kit.evaluators.knn import Search, knn, nearest_by_faiss
from dino_kit.search import nearest

FAISS, TORCH, REFERENCE = "faiss", "torch", "reference"
SEARCHES: dict[str, Search] = {FAISS: nearest_by_faiss, TORCH: nearest}
_CHUNKS = 100  # parts in which the reference takes its queries


class Features(NamedTuple):
    """Features of unit length (n, D) and (m, D), and their classes (n,) and (m,), int64."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class KnnCost:
    """What it took to classify the queries for all values of k."""

    seconds: dict[str, float]  # by way and by the clock
    core_seconds: dict[str, float]  # by way, of all threads: what other programs do matters less
    search: float  # of them, what the search by faiss took
    top1: dict[str, dict[int, float]]  # percent, by way and k
    peak_bytes: dict[str, int | None]  # by way, above the features


def random_features(
    num_train: int, num_queries: int, dim: int, num_classes: int, seed: int
) -> Features:
    """Points about a random centre for each class, as far from it that many are mistaken."""
    generator = torch.Generator().manual_seed(seed)
    # Cosines of unrelated features spread by 1 / sqrt(D); those of a class are about 1.5 times it.
    noise_std = math.sqrt(max(math.sqrt(dim) / 1.5 - 1, 0.25))

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(num_classes, (count,), generator=generator)
        noise = torch.randn(count, dim, generator=generator)
        return F.normalize(noise.mul_(noise_std).add_(centers[labels]), dim=1), labels

    centers = torch.randn(num_classes, dim, generator=generator)
    return Features(*drawn(num_train), *drawn(num_queries))


def measure_knn(
    features: Features, ks: Sequence[int], temperature: float, num_classes: int
) -> KnnCost:
    """Every way once before and once after the reference's, so that a busy moment hits them alike."""
    seconds: dict[str, list[float]] = {}
    core_seconds: dict[str, list[float]] = {}
    top1: dict[str, dict[int, float]] = {}
    peaks: dict[str, int | None] = {}
    searched: list[float] = []

    def timed(way: str, classify: Callable[[], dict[int, float]]) -> None:
        peak, began, worked = Peak(), time.perf_counter(), time.process_time()
        top1[way] = classify()
        core_seconds.setdefault(way, []).append(time.process_time() - worked)
        seconds.setdefault(way, []).append(time.perf_counter() - began)
        peaks[way] = peak.bytes()

    def ours() -> None:
        for way, search in SEARCHES.items():
            taken = []

            def clocked(bank: Tensor, queries: Tensor, k: int, search=search, taken=taken):
                began = time.perf_counter()
                found = search(bank, queries, k)
                taken.append(time.perf_counter() - began)
                return found

            timed(way, lambda clocked=clocked: {
                k: found["top1"]
                for k, found in knn(*features, ks, temperature, search=clocked).items()
            })  # fmt: skip
            if way == FAISS:
                searched.append(sum(taken))

    nearest_by_faiss(*(features.train[:1],) * 2, 1)  # loads the library
    ours()
    timed(REFERENCE, lambda: {
        k: votes_of_a_matrix_product(features, k, temperature, num_classes) for k in ks
    })  # fmt: skip
    ours()
    return KnnCost(
        *(
            {way: sum(taken) / len(taken) for way, taken in times.items()}
            for times in (seconds, core_seconds)
        ),
        sum(searched) / len(searched),
        top1,
        peaks,
    )


def votes_of_a_matrix_product(
    features: Features, k: int, temperature: float, num_classes: int
) -> float:
    """Top-1 in percent, computed as the reference does for one k, to be compared with.

    The similarities of a chunk of queries to the whole bank, its k largest, a one-hot row for each
    neighbour, all weighted and added, all classes sorted.
    """
    hits = 0
    size = max(len(features.test) // _CHUNKS, 1)
    chunks = zip(features.test.split(size), features.test_labels.split(size), strict=True)
    for queries, truth in chunks:
        similarity, index = (queries @ features.train.T).topk(k)  # (m, k)
        labels = features.train_labels[index].reshape(-1, 1)
        one_hot = torch.zeros(len(labels), num_classes).scatter_(1, labels, 1.0)
        weights = (similarity / temperature).exp().unsqueeze(-1)
        votes = (one_hot.unflatten(0, (-1, k)) * weights).sum(dim=1)  # (m, C)
        ranked = votes.sort(dim=1, descending=True).indices
        hits += int((ranked[:, 0] == truth).sum())
    return 100.0 * hits / len(features.test)
