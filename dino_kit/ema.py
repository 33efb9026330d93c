"""The teacher's weights: an exponential moving average of the student's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def update(
    teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], momentum: float
) -> None:
    """In place: ``teacher = momentum * teacher + (1 - momentum) * student``, tensor by tensor.

    Both iterables give the same parameters in the same order. Written as an interpolation, which
    is one pass over the weights and leaves a teacher that equals its student exactly as it is.
    Source: Caron et al. 2021, section 3.1, "Teacher network".

    Raises:
        RuntimeError: the numbers of tensors differ.
    """
    torch._foreach_lerp_(list(teacher_params), list(student_params), 1.0 - momentum)
