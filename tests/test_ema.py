"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_kit import ema


def networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)) for _ in range(2)]


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.996, 1.0])
def test_update_is_the_weighted_mean_of_every_parameter(momentum):
    teacher, student = networks()
    expected = [
        momentum * t.detach().double() + (1 - momentum) * s.detach().double()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    tensors = [p.data_ptr() for p in teacher.parameters()]
    students = [p.detach().clone() for p in student.parameters()]
    ema.update(teacher.parameters(), student.parameters(), momentum)
    for got, want in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach().double(), want, rtol=0, atol=1e-7)
    assert tensors == [p.data_ptr() for p in teacher.parameters()]
    assert all(map(torch.equal, student.parameters(), students))


def test_a_teacher_that_equals_its_student_stays_as_it_is():
    teacher, student = networks()
    teacher.load_state_dict(student.state_dict())
    for momentum in (0.0, 0.37, 0.996, 0.9995, 1.0):
        ema.update(teacher.parameters(), student.parameters(), momentum)
        assert all(map(torch.equal, teacher.parameters(), student.parameters()))


def test_networks_of_different_length_are_refused():
    teacher, student = networks()
    with pytest.raises(RuntimeError):
        ema.update(teacher.parameters(), student[:2].parameters(), 0.9)
