"""What a step says of a run's health: how teacher and student answer, and how their views spread.

A teacher's answer to a crop is a distribution over the prototypes. Two entropies tell what it is
worth: that of one answer, on average, and that of the average answer. Their difference is what an
answer tells about the crop, in nats; where every crop gets the same answer it is zero, be that
answer spread over all prototypes or concentrated on one.

Legend: B images of a micro-batch, K prototypes, D width of an embedding, n embeddings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kit import distributed
from dino_kit.geometry import effective_rank, spread, view_retrieval


class Answers:
    """Distributions over the prototypes, summed up batch by batch on the device.

    All processes see equally many.
    """

    def __init__(self):
        self._total: Tensor | None = None  # (K,)
        self._entropy: Tensor | None = None  # ()
        self._count = 0

    @property
    def prototypes(self) -> int:
        """K."""
        return self._total.numel()

    @torch.no_grad()
    def add(self, probabilities: Tensor) -> None:
        """Take ``(..., K)``, rows summing to 1."""
        rows = probabilities.flatten(0, -2)
        total, own = rows.sum(dim=0), _entropy(rows).sum()
        first = self._total is None
        self._total = total if first else self._total + total
        self._entropy = own if first else self._entropy + own
        self._count += len(rows)

    def entropy(self) -> Tensor:
        """The mean entropy of an answer, in nats: ``()``, of all processes."""
        return distributed.all_reduce_mean(self._entropy) / self._count

    def entropy_of_mean(self) -> Tensor:
        """The entropy of the mean answer, in nats: ``()``, of all processes."""
        return _entropy(distributed.all_reduce_mean(self._total) / self._count)


class Watch:
    """One step under observation: told of what happens in it, it says what that amounts to."""

    def __init__(self):
        self.teacher, self.student = Answers(), Answers()
        self._embeddings: Tensor | None = None

    def saw_teacher(self, targets: Tensor, embeddings: Tensor) -> None:
        """Take the step's targets (2, B, K) and the backbone's embeddings (2, B, D)."""
        self.teacher.add(targets)
        self._embeddings = embeddings.float()

    @torch.no_grad()
    def saw_student(self, logits: Tensor, temperature: float) -> None:
        """Take the student's logits (2, B, K) for the global crops of a micro-batch."""
        self.student.add((logits.float() / temperature).softmax(dim=-1))

    @torch.no_grad()
    def measures(self, loss: Tensor) -> dict[str, Tensor]:
        """Scalars by name, the same on every process, which all have to call it.

        ``loss`` (), of this process, is that of the targets seen.

        - ``loss_ratio``: loss / ln K; 1 where student and teacher answer evenly.
        - ``teacher_entropy``: of an answer, in nats; at most ln K.
        - ``kl``: KL(teacher‖student), in nats: what is left of the loss without that entropy.
        - ``prototypes_used``: exp of the entropy of the teacher's mean answer; 1 to K.
        - ``teacher_information``, ``student_information``: what an answer tells about its crop, in
          nats.
        - ``spread``, ``effective_rank``, ``view_retrieval``: of the teacher's embeddings.
        """
        loss = distributed.all_reduce_mean(loss)
        entropy, of_mean = self.teacher.entropy(), self.teacher.entropy_of_mean()
        views = distributed.all_gather(self._embeddings, dim=1)  # (2, n/2, D)
        views = F.normalize(views, dim=-1)
        return {
            "loss_ratio": loss / math.log(self.teacher.prototypes),
            "teacher_entropy": entropy,
            "kl": loss - entropy,
            "prototypes_used": of_mean.exp(),
            "teacher_information": of_mean - entropy,
            "student_information": self.student.entropy_of_mean() - self.student.entropy(),
            "spread": spread(views.flatten(0, 1)),
            "effective_rank": effective_rank(views.flatten(0, 1)),
            "view_retrieval": view_retrieval(*views),
        }


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)

