"""Blocks that are computed twice, and blocks that are compiled: the same numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_learner import ARCHITECTURES, assert_close, batch, learner

from dino_kit.errors import UserError
from dino_kit.training import compiling


def two_steps(one) -> dict:
    for step in range(3):  # the rate is zero in the first
        assert one.step(step, [batch(step)]).committed
    return one.state_dict()["student"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_computed_twice_give_the_same_run(arch, precision):
    plain, twice = (learner(arch=arch, precision=precision) for _ in range(2))
    twice.student.backbone.checkpoint_activations = True
    calls = []
    # The second pass may stop before the block's end, at the last that is needed.
    twice.student.backbone.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, got = two_steps(plain), two_steps(twice)
    assert len(calls) == 3 * 2 * 2  # steps, crop sizes, passes
    for name, tensor in expected.items():
        assert_close(name, got[name], tensor)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_computed_twice_keep_no_activations(arch):
    def kept(twice: bool) -> int:
        backbone, stored = learner(arch=arch).student.backbone, {}
        backbone.checkpoint_activations = twice
        own = {parameter.data_ptr() for parameter in backbone.parameters()}

        def store(tensor):
            if tensor.data_ptr() not in own:
                stored[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            result = backbone(torch.randn(4, 3, 16, 16))
        assert result.requires_grad
        return sum(stored.values())

    assert kept(True) < kept(False) / 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("arch", ["vit", "vit, registers"])
def test_compiled_blocks_give_the_same_run_under_the_same_names(arch):
    plain, compiled = (learner(arch=arch) for _ in range(2))
    for network in (compiled.student, compiled.teacher):
        compiling.compile_blocks(network.backbone, torch.device("cpu"))
    expected, got = two_steps(plain), two_steps(compiled)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert_close(name, got[name], tensor)


def test_without_a_compiler_one_sentence_says_so(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("No working C++ compiler found\nand a long report")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"--compile .* \(No working C\+\+ compiler found\); .*off"):
        compiling.compile_blocks(learner().student.backbone, torch.device("cpu"))
