"""The projection head."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dino_kit import heads
from dino_kit.errors import UserError
from dino_kit.heads import DINOHead

HEADS = ["head_plain", "head_bn", "head_free_g", "head_one_layer"]


@pytest.mark.parametrize("name", HEADS)
def test_head_golden(golden, name):
    arrays = golden(name)
    config = json.loads(str(arrays["config"]))
    head = DINOHead(**config)
    state = {
        key.removeprefix("state/"): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith("state/")
    }
    assert list(head.state_dict()) == list(state)
    fresh = {key: value.clone() for key, value in head.state_dict().items()}
    head.load_state_dict(state)
    # The statistics are those after the forward pass: start it from a new network's.
    buffers = {key for key, _ in head.named_buffers()}
    head.load_state_dict({key: fresh[key] for key in buffers}, strict=False)
    y = head.train()(torch.from_numpy(arrays["x"]))
    torch.testing.assert_close(y, torch.from_numpy(arrays["y"]), rtol=1e-5, atol=1e-5)
    for key, buffer in head.named_buffers():
        torch.testing.assert_close(buffer, state[key], rtol=1e-5, atol=1e-5)


def test_every_golden_head_is_tested(golden):
    assert golden.names("head_") == sorted(HEADS)


def test_parameters_come_in_the_published_order():
    names = [name for name, _ in DINOHead(6, 9, hidden_dim=5, bottleneck_dim=4).named_parameters()]
    assert names == [
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]


def test_initial_weights():
    torch.manual_seed(0)
    head = DINOHead(64, 4096, hidden_dim=512, bottleneck_dim=100)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()
    v = head.last_layer.weight_v
    assert v.abs().max().item() == pytest.approx(0.1, rel=0.01)  # uniform, ± 1/sqrt(in_features)
    assert v.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert head.last_layer.weight_g.eq(1).all()
    with torch.no_grad():
        norms = head.last_layer(torch.eye(100)).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(4096), rtol=0, atol=1e-6)


def test_logits_are_cosines_times_the_prototypes_norms():
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden_dim=5, bottleneck_dim=4)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2.0)
    x = torch.randn(3, 6)
    bottleneck = head.mlp(x).unsqueeze(1)
    cosines = nn.functional.cosine_similarity(bottleneck, head.last_layer.weight_v, dim=-1)
    expected = cosines * head.last_layer.weight_g.squeeze(1)
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_every_parameter_that_is_not_frozen(frozen):
    head = DINOHead(6, 9, use_bn=True, norm_last_layer=frozen, hidden_dim=5, bottleneck_dim=4)
    (head(torch.randn(8, 6)) * torch.randn(8, 9)).sum().backward()
    for name, parameter in head.named_parameters():
        if frozen and name == "last_layer.weight_g":
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad is not None, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_taken_in_float32_under_autocast(dtype):
    head = DINOHead(64, 50, hidden_dim=128, bottleneck_dim=96)
    inputs = []
    head.last_layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", dtype=dtype):
        logits = head(torch.randn(4, 64))
    assert logits.dtype == dtype and inputs[0].dtype == torch.float32
    torch.testing.assert_close(inputs[0].norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    weight = nn.functional.normalize(head.last_layer.weight_v)
    # Rounded once: a norm of half precision would be off by more than a product's sum is.
    exact = inputs[0].to(dtype).double() @ weight.to(dtype).double().T
    torch.testing.assert_close(logits.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 5 * 7, 1 << 18])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_norm_in_parts_is_that_of_pytorch(monkeypatch, at_once, frozen, dtype):
    monkeypatch.setattr(heads, "_IN_CACHE", at_once)
    torch.manual_seed(0)
    layer = heads.WeightNormLinear(7, 33)
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2.0)
    layer.weight_g.requires_grad_(not frozen)
    x, gradient = torch.randn(4, 7, requires_grad=True), torch.randn(4, 33).to(dtype)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        ours = layer(x)
        weight = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
        theirs = nn.functional.linear(x, weight)
    bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(ours, theirs, **bound)
    pairs = zip(*(torch.autograd.grad(y, wanted, gradient) for y in (ours, theirs)), strict=True)
    for found, expected in pairs:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **bound)


def test_a_frozen_backbone_or_last_layer_asks_for_no_gradient():
    layer = heads.WeightNormLinear(7, 33)
    layer(torch.randn(4, 7)).sum().backward()
    assert layer.weight_v.grad is not None
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(4, 7, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and not layer(torch.randn(4, 7)).requires_grad


def test_gradients_may_be_part_of_a_graph_but_not_be_differentiated():
    layer, x = heads.WeightNormLinear(7, 33), torch.randn(4, 7, requires_grad=True)
    wanted = x, layer.weight_v
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    found = torch.autograd.grad(layer(x).square().sum(), wanted, create_graph=True)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


def test_of_no_rows_there_are_no_logits_and_gradients_of_zero():
    layer, x = heads.WeightNormLinear(7, 33), torch.empty(0, 7, requires_grad=True)
    logits = layer(x)
    assert logits.shape == (0, 33)
    logits.sum().backward()
    assert x.grad.shape == (0, 7) and not layer.weight_v.grad.any()


def test_shapes_are_known_on_a_device_without_autocast():
    head = DINOHead(6, 9, hidden_dim=5, bottleneck_dim=4).to("meta")
    assert head(torch.empty(3, 6, device="meta")).shape == (3, 9)


def test_a_head_without_layers_is_refused():
    with pytest.raises(UserError, match="nlayers is 1 or more"):
        DINOHead(6, 9, nlayers=0)
