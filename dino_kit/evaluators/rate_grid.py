"""Linear layers that differ in their learning rate, trained side by side on features in memory.

Every layer sees the same images in the same order, so a step takes one matrix product for the
logits of all of them and one for their gradients, where a layer alone is so small that a step costs
little but calls. It is the step of :func:`dino_kit.evaluators.linear.fit`, SGD with momentum 0.9 on
the mean cross-entropy, with the gradient written out: softmax less one-hot.

Legend: R rates, B images, n images of a set, E width of the features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dino_kit.data.loader import epoch_order
from dino_kit.evaluators.linear import MOMENTUM, TOP, LinearHead
from dino_kit.schedules import cosine

_LOGITS = 1 << 22  # numbers, of all rates, that are there at once when images are classified
_STEPS_BETWEEN_TELLING = 20


class Accuracy(NamedTuple):
    """How a layer classifies; ``top5`` is None below five classes."""

    top1: float  # percent
    top5: float | None  # percent
    loss: float  # mean cross-entropy; not finite where the training diverged


class RateGrid:
    """R layers that begin with the weights of ``head``, one for each of ``rates``.

    Classes come first and images last, so that a softmax runs along memory for all images at once.

    Args:
        head: its first weights; it is left as it is.
        rates: first learning rates, for the batch as it is.
        device: where to train.
    """

    def __init__(self, head: LinearHead, rates: Sequence[float], device: torch.device | str):
        weight, bias = head.linear.weight.detach().to(device), head.linear.bias.detach().to(device)
        self.shape = (weight.shape[0], len(rates))  # C, R
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device)[:, None]  # (R, 1)
        self.weight = weight[:, None].repeat(1, len(rates), 1)  # (C, R, E)
        self.bias = bias[:, None, None].repeat(1, len(rates), 1)  # (C, R, 1)
        self._velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._less = torch.tensor(-1.0, device=device)

    def logits(self, features: Tensor) -> Tensor:
        """(B, E) to (C, R, B)."""
        found = torch.addmm(self.bias.flatten(0, 1), self.weight.flatten(0, 1), features.T)
        return found.unflatten(0, self.shape)

    def step(self, features: Tensor, labels: Tensor, share: float) -> None:
        """Learn from (B, E) and (B,), each layer at ``share`` times its rate.

        Layers share no number, so one that diverges leaves the others as they would be without it.
        """
        error = self.logits(features).flatten(1).softmax(dim=0)  # (C, R * B), of each logit
        truth = labels.expand(1, len(self.rates), -1)
        error.unflatten(1, (-1, len(labels))).scatter_add_(0, truth, self._less.expand_as(truth))
        error = error.view(-1, len(labels))  # (C * R, B)
        of_weight, of_bias = (velocity.flatten(0, 1) for velocity in self._velocities)
        of_weight.addmm_(error, features, beta=MOMENTUM, alpha=1 / len(labels))
        of_bias.mul_(MOMENTUM).add_(error.mean(dim=1, keepdim=True))
        for tensor, velocity in zip((self.weight, self.bias), self._velocities, strict=True):
            tensor.addcmul_(self.rates, velocity, value=-share)

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        rows: Tensor,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        advance: Callable[..., object] = lambda rounds=1, text="": None,
    ) -> None:
        """Train on some images, in an order that ``seed`` and the epoch decide.

        The rates fall by half a cosine towards 0, epoch by epoch; the last batch of an epoch may be
        smaller.

        Args:
            features, labels: (n, E) and (n,), int64, on any device; a batch goes to the layers'.
            rows: (images,), int64, on the same, which of the n to learn from.
            advance: as :func:`dino_kit.log.progress` hands it out; a round is a step.
        """
        device, waiting = self.weight.device, 0
        for epoch in range(epochs):
            share = cosine(epoch, base=1.0, final=0.0, total_steps=epochs)
            order = torch.from_numpy(epoch_order(seed, epoch, len(rows))).to(rows.device)
            batches = rows[order].split(batch_size)
            for number, batch in enumerate(batches, 1):
                self.step(
                    features.index_select(0, batch).to(device), labels[batch].to(device), share
                )
                waiting += 1
                if number % _STEPS_BETWEEN_TELLING == 0 or number == len(batches):
                    advance(waiting, f"epoch {epoch + 1}/{epochs}")
                    waiting = 0

    def classify(self, features: Tensor, labels: Tensor, rows: Tensor) -> list[Accuracy]:
        """How each layer classifies the images ``rows``; arguments as of :meth:`fit`."""
        device, (classes, rates) = self.weight.device, self.shape
        sums = torch.zeros(3, rates, dtype=torch.float64)  # loss, first, among five
        for batch in rows.split(max(_LOGITS // (classes * rates), 1)):
            logits = self.logits(features.index_select(0, batch).to(device))  # (C, R, B)
            truth = labels[batch].to(device).expand(1, rates, -1)
            losses = logits.logsumexp(dim=0) - logits.gather(0, truth)[0]
            hits = logits.topk(min(TOP, classes), dim=0).indices == truth
            # Apple's GPUs have no float64.
            sums += torch.stack(
                [numbers.sum(dim=-1).cpu().double() for numbers in (losses, hits[0], hits.any(0))]
            )
        means = (sums / len(rows)).T.tolist()
        return [
            Accuracy(100 * first, 100 * five if classes >= TOP else None, loss)
            for loss, first, five in means
        ]

    def are_finite(self) -> list[bool]:
        """Of each layer whether all its weights are."""
        finite = self.weight.isfinite().all(dim=2) & self.bias.isfinite().all(dim=2)  # (C, R)
        return finite.all(dim=0).tolist()

    def head(self, place: int) -> LinearHead:
        """A copy of the layer of rate ``place``, on the CPU."""
        classes, width = self.shape[0], self.weight.shape[2]
        head = LinearHead(width, classes)
        state = {"linear.weight": self.weight[:, place], "linear.bias": self.bias[:, place, 0]}
        head.load_state_dict(state)
        return head
