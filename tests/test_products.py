"""Linear layers by oneDNN: the same numbers as PyTorch's own, and only where they are meant."""

import pytest
import torch
import torch.nn.functional as F

from dino_kit.backbones import products
from dino_kit.backbones.build import create_backbone


@pytest.fixture
def onednn(monkeypatch):
    """Whatever the processor, the products are oneDNN's; a list of those that were asked of it."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch comes without oneDNN")
    asked = []
    by_onednn = products._product

    def product(x, weight, bias):
        asked.append(tuple(x.shape))
        return by_onednn(x, weight, bias)

    monkeypatch.setattr(products, "_FEW", 1)
    monkeypatch.setattr(products, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "_product", product)
    return asked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 2, 3, 8), (0, 8)])
def test_values_and_gradients_are_those_of_pytorch(onednn, bias, shape):
    torch.manual_seed(0)
    layer = products.Linear(8, 6, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    wanted = [x, *layer.parameters()]
    ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(theirs)
    for found, expected in zip(
        *(torch.autograd.grad(y, wanted, gradient) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    # One way and, by the input, the other; of no numbers PyTorch makes nothing itself.
    assert len(onednn) == (2 if x.numel() else 0)


def test_rows_of_a_larger_weight(onednn):
    torch.manual_seed(0)
    weight = torch.randn(9, 8, requires_grad=True)
    x = torch.randn(2, 5, 8)[:, ::2]
    (found,) = torch.autograd.grad(products.linear(x, weight[3:6]).square().sum(), weight)
    (expected,) = torch.autograd.grad(F.linear(x, weight[3:6]).square().sum(), weight)
    torch.testing.assert_close(found, expected)
    assert onednn


def test_nothing_is_kept_where_no_gradient_is_wanted(onednn):
    layer = products.Linear(8, 6).requires_grad_(False)
    assert not layer(torch.randn(5, 8)).requires_grad
    with torch.no_grad():
        assert not products.Linear(8, 6)(torch.randn(5, 8)).requires_grad
    assert len(onednn) == 2


def test_other_precisions_and_small_products_are_left_to_pytorch(onednn, monkeypatch):
    layer, x = products.Linear(8, 6), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    monkeypatch.setattr(products, "_FEW", 5 * 8 * 6 + 1)
    layer.float()(x)
    assert not onednn


def test_a_backbone_computes_the_same(onednn, monkeypatch):
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    backbone, images = create_backbone("vit", **sizes), torch.randn(2, 3, 32, 32)

    def gradients():
        backbone.zero_grad()
        features = backbone(images)
        features.square().sum().backward()
        return [features.detach(), *(p.grad for p in backbone.parameters())]

    ours = gradients()
    assert len(onednn) > 8
    monkeypatch.setattr(products, "_prefers_onednn", lambda: False)
    for found, expected in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
