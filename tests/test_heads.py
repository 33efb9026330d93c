"""The projection head."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

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
    norms = head.last_layer.weight().norm(dim=1)
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
        weight = head.last_layer.weight()
    assert logits.dtype == dtype
    assert weight.dtype == inputs[0].dtype == torch.float32
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(50), rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs[0].norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


def test_a_head_without_layers_is_refused():
    with pytest.raises(UserError, match="nlayers is 1 or more"):
        DINOHead(6, 9, nlayers=0)
