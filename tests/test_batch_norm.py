"""Batch norm of our own: on one process it is PyTorch's; two are in test_equal_runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dino_kit.batch_norm import SharedBatchNorm, synchronised
from dino_kit.heads import DINOHead


@pytest.mark.parametrize("rows, offset", [(6, 0.0), (40, 1000.0)])
def test_it_is_pytorchs(rows, offset):
    torch.manual_seed(0)
    theirs = nn.BatchNorm1d(5, eps=1e-3, momentum=0.3).double()  # in single precision it loses
    for parameter in theirs.parameters():  # three digits to so large a mean
        nn.init.normal_(parameter)
    ours = SharedBatchNorm.like(copy.deepcopy(theirs).float())
    for _ in range(3):
        x = (torch.randn(rows, 5) + offset).requires_grad_()
        y = x.detach().double().requires_grad_()
        one, other = ours(x), theirs(y)
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3 if offset else 1e-5)
        for out in (one, other):
            (out * torch.arange(5)).sigmoid().sum().backward()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-4)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name].to(value), value, rtol=1e-4, atol=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours.eval()(x), nn.functional.batch_norm(
        x, ours.running_mean, ours.running_var, ours.weight, ours.bias, eps=1e-3
    ))  # fmt: skip


def test_a_heads_names_and_values_stay():
    head = DINOHead(8, 16, use_bn=True, hidden_dim=6, bottleneck_dim=4)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    named = [name for name, _ in head.named_parameters()]
    assert synchronised(head, torch.device("cpu")) is head
    assert sum(isinstance(module, SharedBatchNorm) for module in head.modules()) == 2
    assert [name for name, _ in head.named_parameters()] == named
    assert list(head.state_dict()) == list(before)
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.mlp(x).dtype == torch.bfloat16


def test_one_row_has_no_variance():
    ours = SharedBatchNorm.like(nn.BatchNorm1d(5))
    assert torch.equal(ours(torch.randn(1, 5)), torch.zeros(1, 5))
    assert torch.allclose(ours.running_var, torch.full((5,), 0.9))
