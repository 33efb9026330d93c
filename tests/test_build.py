"""Backbones by name."""

from __future__ import annotations

import pytest
import torch

from dino_kit.backbones.build import BACKBONES, create_backbone
from dino_kit.backbones.interface import Backbone, HasSelfAttention
from dino_kit.config import architectures
from dino_kit.errors import UserError

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3)],
)
def test_published_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        network = create_backbone(name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_table_builds_what_the_configuration_calls_buildable():
    assert set(BACKBONES) == set(architectures.BUILDABLE)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_keeps_the_interface(name):
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
    network = create_backbone(name, **small)
    assert isinstance(network, Backbone) and isinstance(network, HasSelfAttention)
    images = torch.randn(2, 3, 32, 16)
    features = network.forward_features(images)
    assert network(images).shape == features.pooled.shape == (2, network.embed_dim)
    assert features.grid == (4, 2) and features.patches.shape == (2, 8, 24)
    tokens = network.num_prefix_tokens + 8
    layers = network.get_intermediate_layers(images, n=2)
    assert [layer.shape for layer in layers] == 2 * [(2, tokens, network.embed_dim)]
    assert network.get_last_selfattention(images).shape == (2, 2, tokens, tokens)
    keep = torch.ones(len(network.drop_path_rates), 2, dtype=torch.bool)
    torch.testing.assert_close(network(images, keep), network(images))


def test_options_go_before_the_sizes_of_the_name():
    network = create_backbone("vit_tiny", patch_size=8, image_size=32, in_chans=5, depth=2)
    assert (network.patch_size, network.in_chans) == (8, 5)
    assert (network.embed_dim, network.depth, network.num_heads) == (192, 2, 3)


def test_the_older_name_of_vit_small():
    with torch.device("meta"):
        assert create_backbone("deit_small").embed_dim == 384


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit_smal", {}, "vit_small"),
        ("resnet50", {}, "vit_base"),
        ("vit_tiny", {"patchsize": 8}, "in_chans.*did you mean patch_size"),
        ("vit", {}, "embed_dim, depth, num_heads missing"),
        ("vit", {"embed_dim": 24, "depth": 2}, "num_heads missing"),
        ("vit", {**SIZES, "image_size": 30}, "patch_size"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, said):
    with pytest.raises(UserError, match=said):
        create_backbone(name, **options)
