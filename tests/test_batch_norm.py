"""Batch norm of our own is PyTorch's of all rows; whole runs of two processes are in test_equal_runs."""

from __future__ import annotations

import copy

import pytest
import torch
from processes import run_together
from timm.layers import BatchNormAct2d
from torch import nn

from dino_kit import distributed
from dino_kit.batch_norm import SharedBatchNorm, synchronised
from dino_kit.errors import UserError
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


def test_a_channel_of_little_variance_does_not_show_how_sums_are_rounded():
    """Maps of attention are such channels: nearly level, and of a hundred thousand values."""
    x = 0.7 + 3e-4 * torch.randn(128, 2, 17, 17, generator=torch.Generator().manual_seed(0))
    found = SharedBatchNorm.like(nn.BatchNorm2d(2))(x)
    torch.testing.assert_close(found, nn.BatchNorm2d(2).double()(x.double()).float(), rtol=0, atol=3e-5)


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


# Of two processes, rows of each: as stochastic depth leaves them.
ROWS = [(3, 3), (5, 2), (4, 0), (0, 0)]
KINDS = [
    (nn.BatchNorm1d(3), (3,)),
    (nn.BatchNorm1d(3, momentum=None), (3, 4)),
    (nn.BatchNorm2d(3, eps=1e-3), (3, 4, 5)),
    (nn.BatchNorm2d(3, affine=False), (3, 1, 1)),
    (nn.BatchNorm3d(3, track_running_stats=False), (3, 2, 2, 2)),
    (BatchNormAct2d(3), (3, 4, 5)),
]


def test_two_processes_with_other_numbers_of_rows_have_the_statistics_of_all():
    run_together("-c", "import sys; sys.path.insert(0, 'tests'); import test_batch_norm as t; t.shared()")


def shared() -> None:
    distributed.start(torch.device("cpu"))
    torch.manual_seed(0)
    for rows in ROWS:
        for kind, shape in KINDS:
            theirs = copy.deepcopy(kind).double()
            for parameter in theirs.parameters():
                nn.init.normal_(parameter)
            assert_as_on_one_process(theirs, rows, torch.randn(sum(rows), *shape).double())
    distributed.stop()


def assert_as_on_one_process(theirs: nn.Module, rows: tuple[int, int], whole: torch.Tensor) -> None:
    rank = distributed.rank()
    # In a network, as norms are found there.
    ours = synchronised(nn.Sequential(copy.deepcopy(theirs)), torch.device("cpu"))[0]
    assert isinstance(ours, SharedBatchNorm)
    before = copy.deepcopy(ours.state_dict())
    x = whole.split(rows)[rank].clone().requires_grad_()
    y = whole.clone().requires_grad_()
    ours(x).sigmoid().square().sum().backward()
    if not len(whole):
        assert x.grad.shape == x.shape
        torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
        assert all(parameter.grad.eq(0).all() for parameter in ours.parameters())
        return
    theirs(y).sigmoid().square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad.split(rows)[rank])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(distributed.all_reduce_sum(one.grad), other.grad)


def test_a_norm_that_does_more_is_not_replaced():
    class WithActivation(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.Conv2d(3, 4, 1), WithActivation(4))
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError, match="^A WithActivation, .* cannot be synchronised over"):
            synchronised(network, torch.device(device))
