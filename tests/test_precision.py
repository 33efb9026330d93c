"""Which number format a run computes in, and how the fp16 loss scale moves."""

from __future__ import annotations

import pytest
import torch

from dino_kit.errors import UserError
from dino_kit.training.precision import LossScale, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "use_fp16", "device", "expected"),
    [
        ("auto", None, CPU, "fp32"),
        ("bf16", None, CPU, "bf16"),
        ("fp32", None, CUDA, "fp32"),
        ("fp16", None, CUDA, "fp16"),
        ("auto", True, CUDA, "fp16"),
        ("auto", False, CUDA, "fp32"),
        ("fp16", True, CUDA, "fp16"),
    ],
)
def test_the_flags_decide(precision, use_fp16, device, expected):
    assert resolve_precision(precision, use_fp16, device) == expected


def test_fp16_off_a_gpu_is_fp32_with_a_notice(capsys):
    assert resolve_precision("auto", True, CPU) == "fp32"
    assert "no effect on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu_depends_on_what_it_has(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert resolve_precision("auto", None, CUDA) == ("bf16" if has_bf16 else "fp16")


def test_the_impossible_is_refused():
    with pytest.raises(UserError, match="needs a CUDA device"):
        resolve_precision("fp16", None, CPU)


def test_the_loss_scale_follows_torchs_own():
    ours = LossScale(growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflows in (False, True, False, False, False, False, True):
        weight.grad = torch.tensor([float("inf") if overflows else 1.0])
        theirs.scale(torch.zeros(1))
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflows)
        assert ours.scale == theirs.get_scale()
    assert ours.state_dict() == theirs.state_dict()
    again = LossScale()
    again.load_state_dict(theirs.state_dict())
    assert again == ours
