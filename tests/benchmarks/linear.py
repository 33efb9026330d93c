"""Thirteen learning rates of a linear layer: one training after the other, and side by side.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/linear.py
    python tests/benchmarks/linear.py

The features are random, 50,000 x 384 in ten classes to learn from and 10,000 to classify: a mean
for each class and noise. One training after the other is written as one would after the
reference's ``eval_linear.py``, on the same features in memory: nn.Linear, cross-entropy, autograd,
torch.optim.SGD and a cosine epoch by epoch. It takes the same batches, by an index, and begins with
the same weights; there is no loader to wait for. Both ways classify the test features once, at the
end. Each has a few steps before, to warm up; the rounds of both take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kit.config.evaluate import LEARNING_RATES
from dino_kit.data.loader import epoch_order
from dino_kit.evaluators.linear import REFERENCE_BATCH, LinearHead
from dino_kit.evaluators.rate_grid import RateGrid

_SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="as dino-kit linear has it")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    train, test = random_features(options.images, options.dim, options.classes)
    rates = [rate * options.batch / REFERENCE_BATCH for rate in LEARNING_RATES]
    ways = {"one after the other": one_after_the_other, "side by side": side_by_side}
    for way in ways.values():
        few = train[0][: 4 * options.batch], train[1][: 4 * options.batch]
        way(few, test, rates, options.batch, 1)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    top1: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            top1[name] = way(train, test, rates, options.batch, options.epochs)
            seconds[name].append(time.perf_counter() - began)

    steps = options.epochs * -(-options.images // options.batch)
    print(f"{options.images:,} x {options.dim}, {options.classes} classes, batch {options.batch}, "
          f"{options.epochs} epochs, {torch.get_num_threads()} thread(s)")  # fmt: skip
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(
            f"{name:<21}{middle:7.2f} s ({min(taken):.2f} to {max(taken):.2f}), "
            f"{1e6 * middle / steps:,.0f} us a step of all rates, best {max(top1[name]):.2f} %"
        )
    one, other = (statistics.median(taken) for taken in seconds.values())
    print(f"ratio {one / other:.1f}")
    for rate, a, b in zip(LEARNING_RATES, *top1.values(), strict=True):
        print(f"  rate {rate:<8g}{a:.2f} and {b:.2f} %")


def random_features(images: int, dim: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """To learn from and to classify: (images, dim) and labels (images,); numbers of deviation 1."""
    generator = torch.Generator().manual_seed(_SEED)
    means = 0.13 * torch.randn(classes, dim, generator=generator)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(classes, (count,), generator=generator)
        return torch.randn(count, dim, generator=generator).add_(means[labels]), labels

    return [drawn(images), drawn(10_000)]


def one_after_the_other(train, test, rates: list[float], batch: int, epochs: int) -> list[float]:
    (features, labels), (queries, truth) = train, test
    classes, found = int(truth.max()) + 1, []
    for rate in rates:
        layer = nn.Linear(features.shape[1], classes)
        layer.load_state_dict(LinearHead(features.shape[1], classes, _SEED).linear.state_dict())
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
        for epoch in range(epochs):
            for rows in torch.from_numpy(epoch_order(_SEED, epoch, len(labels))).split(batch):
                loss = F.cross_entropy(layer(features[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
        with torch.no_grad():
            found.append(100 * (layer(queries).argmax(dim=1) == truth).double().mean().item())
    return found


def side_by_side(train, test, rates: list[float], batch: int, epochs: int) -> list[float]:
    (features, labels), (queries, truth) = train, test
    head = LinearHead(features.shape[1], int(truth.max()) + 1, _SEED)
    grid = RateGrid(head, rates, "cpu")
    everything = torch.arange(len(labels))
    grid.fit(features, labels, everything, epochs=epochs, batch_size=batch, seed=_SEED)
    return [found.top1 for found in grid.classify(queries, truth, torch.arange(len(truth)))]


if __name__ == "__main__":
    main()
