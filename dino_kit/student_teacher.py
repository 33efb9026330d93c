"""The two networks: each a backbone and a head, run on crops of several sizes.

Legend: B images, V crops of each in all, V_g of one size, C channels, S pixels of a side, D width,
K prototypes, L residual branches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class MultiCropNetwork(nn.Module):
    """A backbone, run once for each crop size, and a head, run once on all of its features.

    One pass of the head means that a batch norm in it takes its statistics over all crops.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, groups: list[Tensor], keep: list[Tensor] | None = None) -> Tensor:
        """Crops, for each size a tensor (V_g, B, C, S, S), to logits ``(V, B, K)``.

        ``keep``: for each size the residual branches (L, V_g, B), bool, on the host, that
        stochastic depth leaves; None for all.
        """
        return self.project(self.embed(groups, keep))

    def embed(self, groups: list[Tensor], keep: list[Tensor] | None = None) -> Tensor:
        """The backbone's features of all crops, ``(V, B, D)``; arguments as for the whole."""
        if keep is None:
            features = [self.backbone(crops.flatten(0, 1)) for crops in groups]
        else:
            features = [
                self.backbone(crops.flatten(0, 1), kept.flatten(1))
                for crops, kept in zip(groups, keep, strict=True)
            ]  # each (V_g * B, D), crop by crop
        return torch.cat(features).unflatten(0, (-1, groups[0].shape[1]))

    def project(self, features: Tensor) -> Tensor:
        """Features ``(V, B, D)`` to logits ``(V, B, K)``, in one pass of the head."""
        return self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])


class StudentTeacher(NamedTuple):
    student: MultiCropNetwork
    teacher: MultiCropNetwork


def build_student_teacher(
    student_backbone: nn.Module,
    student_head: nn.Module,
    teacher_backbone: nn.Module,
    teacher_head: nn.Module,
) -> StudentTeacher:
    """Pair the networks: the teacher starts as the student's copy and gets no gradients.

    Both stay in training mode: a teacher with batch norm uses its batch's statistics.
    """
    student = MultiCropNetwork(student_backbone, student_head).train()
    teacher = MultiCropNetwork(teacher_backbone, teacher_head).train()
    teacher.load_state_dict(student.state_dict())
    return StudentTeacher(student, teacher.requires_grad_(False))
