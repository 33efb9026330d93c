"""ResMLP: published numbers, other grids of patches than its own, and stochastic depth."""

from __future__ import annotations

import json

import pytest
import torch

from dino_kit.backbones.resmlp import ResMLP

TINY = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3}


def tiny(**options) -> ResMLP:
    """A small network whose biases, scales and affine maps are not at their first values."""
    torch.manual_seed(0)
    network = ResMLP(**{**TINY, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def from_golden(arrays) -> ResMLP:
    config = json.loads(str(arrays["config"]))
    config["image_size"] = config.pop("img_size")
    network = ResMLP(**config)
    state = {
        key.removeprefix("state/"): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith("state/")
    }
    assert list(network.state_dict()) == list(state)
    assert [name for name, _ in network.named_parameters()] == list(state)
    network.load_state_dict(state)
    return network


@torch.no_grad()
def test_resmlp_golden(golden):
    arrays = golden("resmlp")
    network, images = from_golden(arrays), torch.from_numpy(arrays["images"])
    expected = torch.from_numpy(arrays["pooled"])
    features = network.forward_features(images)
    for got in (network(images), features.pooled, features.patches.mean(dim=1)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
