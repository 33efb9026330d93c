"""Attention in bfloat16 on a CPU, in products of batches of matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dino_kit.backbones import attention as module
from dino_kit.backbones.attention import attention


def arguments(queries: int, images: int = 3):
    torch.manual_seed(0)
    sizes = ((images, 2, tokens, 8) for tokens in (queries, 9, 9))
    return [torch.randn(size).bfloat16().requires_grad_() for size in sizes]


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("at_once", [1, 300, 1 << 21])
def test_it_is_attention_however_many_images_are_taken_at_once(
    queries, images, at_once, monkeypatch
):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    half = arguments(queries, images)
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    ours, expected = attention(*half), F.scaled_dot_product_attention(*exact)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=0.02, atol=0.02)
    weights = torch.randn(ours.shape)
    (ours.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for got, wanted in zip(half, exact, strict=True):
        torch.testing.assert_close(got.grad.float(), wanted.grad, rtol=0.03, atol=0.03)


def test_a_large_map_is_left_to_the_kernel(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_MAP", 80)
    expected = F.scaled_dot_product_attention(*arguments(9))
    assert torch.equal(attention(*arguments(9)), expected)


def test_float32_is_left_to_the_kernel():
    exact = [tensor.detach().float() for tensor in arguments(9)]
    assert torch.equal(attention(*exact), F.scaled_dot_product_attention(*exact))
