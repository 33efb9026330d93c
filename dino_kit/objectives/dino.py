"""DINO's objective: the student predicts, from every crop, the teacher's view of the other crops.

Everything here is a pure function; nothing is updated in place.

    targets = softmax((teacher - center) / teacher_temp)               # of the 2 global crops
    loss    = mean over crops t != v of  -targets[t] · log_softmax(student[v] / student_temp)
    center  = momentum * center + (1 - momentum) * mean(teacher)       # for the next step

Source: Caron et al. 2021, equations 1 to 4 and algorithm 1.

Legend: B images, V crops of each (the first 2 are the teacher's), K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dino_kit import distributed

_IN_CACHE = 1 << 18  # numbers of float32 that a core's cache holds several times: 1 MB


class DinoLoss(NamedTuple):
    """The value of a step, and the centre to go on with if the step holds."""

    loss: Tensor  # ()
    center: Tensor  # (1, K)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    center: Tensor,
    temperature: float,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
) -> DinoLoss:
    """Loss of ``student_logits`` (V, B, K) against ``teacher_logits`` (2, B, K), and next centre.

    ``center`` (1, K) is the one before the step: it is the one the loss uses. No gradient flows
    into the teacher.
    """
    targets = teacher_targets(teacher_logits, center, temperature)
    loss = cross_view_loss(student_logits, targets, student_temp)
    return DinoLoss(loss, next_center(center, teacher_logits, center_momentum))


@torch.no_grad()
def teacher_targets(teacher_logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Centred and sharpened: logits ``(2, B, K)`` to probabilities ``(2, B, K)`` in float32."""
    return (teacher_logits.float() - center).div_(temperature).softmax(dim=-1)


@torch.no_grad()
def next_center(center: Tensor, teacher_logits: Tensor, momentum: float) -> Tensor:
    """The moving average ``(1, K)`` of the mean logit, over the batches of all processes.

    Every process holds as many images as the others.
    """
    mean = teacher_logits.float().mean(dim=(0, 1)).unsqueeze(0)  # (1, K)
    return momentum * center + (1.0 - momentum) * distributed.all_reduce_mean(mean)


def cross_view_loss(student_logits: Tensor, targets: Tensor, student_temp: float) -> Tensor:
    """Mean cross-entropy, over all pairs of different crops and all images, as a scalar.

    ``student_logits`` (V, B, K), V at least 2, of any floating type; ``targets`` (2, B, K), of
    the first two crops, rows summing to 1; they get no gradient. Computed in float32.
    """
    return _CrossViewLoss.apply(student_logits, targets, student_temp)


class _CrossViewLoss(torch.autograd.Function):
    """A few rows of one crop at a time, keeping nothing but the arguments.

    The terms of one crop add up to ``-(sum of targets)·log_softmax(s)`` over the n teacher crops
    that are not the crop itself, with gradient ``n · softmax(s) - (sum of targets)`` for the scaled
    logits s, as a target sums to 1. Nothing of size (V, B, K) is stored between the passes but the
    logits themselves; the gradient is written once.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, targets: Tensor, student_temp: float) -> Tensor:
        both = targets.sum(dim=0)  # (B, K)
        total = torch.zeros((), dtype=torch.float32, device=student_logits.device)
        for crop, logits in enumerate(student_logits):
            weights, _ = _teachers(crop, targets, both)
            for part, own in _parts(logits, weights):
                scores = (part.float() / student_temp).log_softmax(dim=-1)  # (b, K)
                total -= torch.dot(scores.flatten(), own.flatten())
        ctx.save_for_backward(student_logits, targets)
        ctx.student_temp = student_temp
        return total / _pairs(student_logits)

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        student_logits, targets = ctx.saved_tensors
        both = targets.sum(dim=0)  # (B, K)
        scale = grad_loss / (_pairs(student_logits) * ctx.student_temp)
        gradient = torch.empty_like(student_logits)
        for crop, logits in enumerate(student_logits):
            weights, terms = _teachers(crop, targets, both)
            for part, own, result in _parts(logits, weights, gradient[crop]):
                p = (part.float() / ctx.student_temp).softmax(dim=-1)
                result.copy_(p.mul_(terms).sub_(own).mul_(scale))
        return gradient, None, None


def _parts(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few of the rows (B, K) of each: on a CPU as many as its cache may hold."""
    images, prototypes = rows[0].shape
    size = max(1, _IN_CACHE // prototypes) if rows[0].device.type == "cpu" else images
    return zip(*(tensor.split(size) for tensor in rows), strict=True)


def _teachers(crop: int, targets: Tensor, both: Tensor) -> tuple[Tensor, int]:
    """The sum (B, K) of the targets that ``crop`` learns from, and how many they are."""
    return (targets[1 - crop], 1) if crop < 2 else (both, 2)


def _pairs(student_logits: Tensor) -> int:
    """Cross-entropies that the loss is the mean of: two teacher crops, all other crops, images."""
    crops, images = student_logits.shape[:2]
    return 2 * (crops - 1) * images
