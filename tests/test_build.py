"""Backbones by name."""

from __future__ import annotations

import re

import pytest
import torch

from dino_kit.backbones.build import BACKBONES, create_backbone
from dino_kit.backbones.interface import (
    Backbone,
    HasReAttention,
    HasSelfAttention,
    HasTokenMixing,
)
from dino_kit.config import architectures
from dino_kit.errors import NoSelfAttention, UserError

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8), ("vit_large", 303.3)],
)
def test_published_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        network = create_backbone(name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("patch_size", [8, 14, 16, 32])
@pytest.mark.parametrize(
    ("name", "millions", "hidden"), [("vit_huge", 631, 5120), ("vit_giant", 1840, 8192)]
)
def test_published_numbers_of_parameters_of_the_largest(name, millions, hidden, patch_size):
    with torch.device("meta"):
        network = create_backbone(name, patch_size=patch_size)
    assert network.image_size % patch_size == 0 and network.patch_size == patch_size
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert {block.mlp.fc1.out_features for block in network.blocks} == {hidden}


@pytest.mark.parametrize(
    ("name", "options", "millions", "scale"),
    [
        ("resmlp_s12", {}, 15, 0.1),
        ("resmlp_s24", {}, 30, 1e-5),
        ("resmlp_s36", {}, 45, 1e-6),
        ("resmlp_b24", {}, 116, 1e-6),
        ("resmlp_b24", {"patch_size": 8}, 129, 1e-6),
    ],
)
def test_published_numbers_of_parameters_and_first_scales_of_resmlps(
    name, options, millions, scale
):
    """Published with a classifier of 1,000 classes, in whole millions."""
    with torch.device("meta"):
        network = create_backbone(name, **options)
    classifier = 1000 * (network.embed_dim + 1)
    assert round((sum(p.numel() for p in network.parameters()) + classifier) / 1e6) == millions
    narrow = create_backbone(name, embed_dim=8, image_size=32, **options)
    assert narrow.blocks[-1].gamma_2.unique().item() == pytest.approx(scale)


def test_the_table_builds_what_the_configuration_calls_buildable():
    assert set(BACKBONES) == set(architectures.BUILDABLE)


# What has stages is no two blocks deep; its own tests try the same.
OF_BLOCKS = [name for name in BACKBONES if architectures.family_of(name) is not architectures.CSWIN]


def small(name: str, **options):
    """The architecture of that name, two blocks deep, with weights that are not its first."""
    family = architectures.family_of(name)
    own = {} if "resmlp" in name else {"num_heads": 2}
    if "deepvit" in name:
        own["reattention_blocks"] = 1
    if family.takes_patch_size:
        own["patch_size"] = 8
    image_size = 4 * (family.patch_size or 8)
    sizes = {"embed_dim": 24, "depth": 2, "image_size": image_size, **own}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_backbone(name, **{**sizes, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("grid", [(4, 4), (4, 2), (1, 1), (5, 8)])
@pytest.mark.parametrize("name", OF_BLOCKS)
def test_every_backbone_keeps_the_interface(name, grid):
    network = small(name)
    assert isinstance(network, Backbone)
    images = torch.randn(2, 3, *(side * network.patch_size for side in grid))
    patches = grid[0] * grid[1]
    features = network.forward_features(images)
    assert network(images).shape == features.pooled.shape == (2, network.embed_dim)
    torch.testing.assert_close(network(images), features.pooled)
    assert features.grid == grid and features.patches.shape == (2, patches, 24)
    prefix = network.num_prefix_tokens
    layers = network.get_intermediate_layers(images, n=2)
    assert [layer.shape for layer in layers] == 2 * [(2, prefix + patches, network.embed_dim)]
    torch.testing.assert_close(layers[-1][:, prefix:], features.patches)
    if prefix:
        torch.testing.assert_close(layers[-1][:, 0], features.pooled)
    else:
        torch.testing.assert_close(features.patches.mean(dim=1), features.pooled)
    assert isinstance(network, HasSelfAttention | HasTokenMixing | HasReAttention)
    if isinstance(network, HasSelfAttention):
        tokens = prefix + patches
        last = network.get_last_selfattention(images)
        assert network.depth == 2 and last.shape == (2, 2, tokens, tokens)
        torch.testing.assert_close(network.get_selfattention(images, -1), last)
        assert network.get_selfattention(images, 0).shape == last.shape
    if isinstance(network, HasReAttention):
        tokens = prefix + patches
        assert network.get_last_reattention(images).shape == (2, 2, tokens, tokens)
    if isinstance(network, HasTokenMixing):
        assert network.get_last_mixing(features.grid).shape == (patches, patches)


@pytest.mark.parametrize("side", [4, 2])
@pytest.mark.parametrize("name", OF_BLOCKS)
def test_every_backbone_drops_the_branches_that_it_is_told_to(name, side):
    network = small(name, drop_path_rate=0.5)
    assert len(network.drop_path_rates) == 4 and network.drop_path_rates[-2:] == (0.5, 0.5)
    images = torch.randn(3, 3, side * network.patch_size, side * network.patch_size)
    keep = torch.ones(4, 3, dtype=torch.bool)
    torch.testing.assert_close(small(name)(images, keep), small(name)(images))
    keep[:, 1] = False  # the second image passes through no block
    dropped = network(images, keep)
    for block in network.blocks:
        block.forward = lambda x, *arguments: x
    torch.testing.assert_close(dropped[1], network(images)[1])
    assert not torch.allclose(dropped[0], network(images)[0], atol=1e-3)
    dropped.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_a_vision_transformer_takes_registers_and_layer_scale():
    network = small("vit_tiny", num_register_tokens=4, layer_scale=1e-5)
    images = torch.randn(2, 3, 16, 24)
    assert network.num_prefix_tokens == 5
    assert network.forward_features(images).patches.shape == (2, 6, 24)
    assert network.get_last_selfattention(images).shape == (2, 2, 11, 11)
    (layer,) = network.get_intermediate_layers(images)
    assert layer.shape == (2, 11, 24)
    torch.testing.assert_close(network(images), layer[:, 0])
    with pytest.raises(UserError, match="deepvit has no option 'num_register_tokens'"):
        create_backbone("deepvit", **SIZES, num_register_tokens=4)


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
        ("resnet-50", {}, "did you mean resnet50"),
        ("torchvision:resnet5", {}, "did you mean resnet50"),
        ("torchvision:resnet50", {"depth": 3}, "torchvision:resnet50 cannot be built so: .*depth"),
        ("torchvision:resnet50", {"weights": "DEFAULT"}, "is about weights"),
        ("vit_tiny", {"patchsize": 8}, "in_chans.*did you mean patch_size"),
        ("vit", {}, "embed_dim, depth, num_heads missing"),
        ("vit", {"embed_dim": 24, "depth": 2}, "num_heads missing"),
        ("vit", {**SIZES, "image_size": 30}, "patch_size"),
        ("vit", {**SIZES, "mlp_grid": "mix"}, "vit has no option 'mlp_grid'"),
        ("resmlp_12", {}, "did you mean resmlp_s12"),
        ("resmlp", {"embed_dim": 24}, "The sizes of resmlp are given one by one; depth missing"),
        ("resmlp_s12", {"num_heads": 3}, "resmlp_s12 has no option 'num_heads'; it has image_size"),
        ("resmlp_s12", {"init_scal": 3}, "did you mean init_scale"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, said):
    with pytest.raises(UserError, match=said):
        create_backbone(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resmlp", {"embed_dim": 8, "depth": 1},
         "ResMLP has no self-attention among all of its tokens; --maps mixing shows rows of its last "
         "token mixing, and --maps similarity shows the similarity of each patch"),
        ("deepvit", {"embed_dim": 8, "depth": 1, "num_heads": 2},
         "DeepViT mixes and normalises its maps after the softmax, so that they are no "
         "self-attention; --maps reattention shows"),
        ("resnet18", {}, "torchvision:resnet18 has no self-attention among all of its tokens; --maps "
                         "similarity shows"),
    ],
)  # fmt: skip
def test_who_asks_for_attention_that_is_not_there_is_told_what_is(name, options, said):
    backbone = create_backbone(name, image_size=32, **options)
    for attribute in ("get_last_selfattention", "get_selfattention"):
        with pytest.raises(NoSelfAttention, match=re.escape(said)):
            getattr(backbone, attribute)
        assert not hasattr(backbone, attribute)
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        backbone.attention  # noqa: B018
