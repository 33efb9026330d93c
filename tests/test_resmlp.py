"""ResMLP: published numbers, other grids of patches than its own, and stochastic depth."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from dino_kit.backbones.grids import resampling
from dino_kit.backbones.interface import Backbone, Features, HasSelfAttention, HasTokenMixing
from dino_kit.backbones.resmlp import ResMLP, TokenMixing
from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.errors import UserError

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


def test_it_is_what_the_interface_says():
    network = tiny()
    assert isinstance(network, Backbone) and isinstance(network, HasTokenMixing)
    assert not isinstance(network, HasSelfAttention)
    assert (network.embed_dim, network.patch_size, network.num_prefix_tokens) == (24, 4, 0)


# Smaller, larger, and smaller in one direction only than the native grid of 4 × 4.
SIZES = [(16, 16), (8, 8), (4, 12), (32, 24), (8, 40), (64, 64)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_features_are_the_last_layer_and_its_mean(size):
    network = tiny()
    images = torch.randn(2, 3, *size)
    features = network.forward_features(images)
    (last,) = network.get_intermediate_layers(images)
    assert isinstance(features, Features)
    assert features.grid == (size[0] // 4, size[1] // 4)
    assert torch.equal(features.patches, last)
    torch.testing.assert_close(features.pooled, last.mean(dim=1))
    torch.testing.assert_close(features.pooled, network(images))


def matrices(grid, native=(4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    """D (N, M) and U (M, N) of a grid."""
    d, u = resampling(grid, native), resampling(native, grid)
    return d(torch.eye(grid[0] * grid[1])), u(torch.eye(native[0] * native[1]))


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (8, 6), (2, 10), (16, 16)])
@pytest.mark.parametrize("images", [1, 500])
def test_token_mixing_is_carried_over_by_its_formula(grid, images):
    mixing = tiny().blocks[1].attn
    down, up = matrices(grid)
    x = torch.randn(images, grid[0] * grid[1], 3)
    expected = up @ (mixing.weight @ (down @ x) + mixing.bias[:, None])
    torch.testing.assert_close(mixing(x, grid), expected, rtol=1e-5, atol=1e-5)
    matrix, bias = mixing.on_grid(grid)
    torch.testing.assert_close(matrix, up @ mixing.weight @ down, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, up @ mixing.bias, rtol=1e-5, atol=1e-6)


def test_at_the_native_size_nothing_is_resampled(monkeypatch):
    network, images = tiny(), torch.randn(2, 3, 16, 16)
    expected = network(images)
    monkeypatch.setattr(TokenMixing, "_resamplings", lambda *arguments: pytest.fail("resampled"))
    assert torch.equal(network(images), expected)
    assert network.get_last_mixing((4, 4)) is network.blocks[-1].attn.weight


@pytest.mark.parametrize(
    "grid, images, formed",
    [((2, 2), 1, True), ((2, 2), 64, True), ((16, 16), 1, False), ((16, 16), 64, False),
     ((3, 4), 1, False), ((3, 4), 64, True)],
)  # fmt: skip
def test_the_cheaper_way_is_taken(monkeypatch, grid, images, formed):
    network, calls = tiny(embed_dim=4), []
    original = TokenMixing.on_grid
    monkeypatch.setattr(
        TokenMixing, "on_grid", lambda self, grid: (calls.append(grid), original(self, grid))[1]
    )
    network(torch.randn(images, 3, 4 * grid[0], 4 * grid[1]))
    assert calls == ([grid] * 3 if formed else [])


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_resized_images_give_the_native_grid(size):
    network = tiny(mlp_grid="resize")
    images = torch.randn(2, 3, *size)
    resized = images
    if size != (16, 16):
        resized = F.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    features = network.forward_features(images)
    assert features.grid == (4, 4)
    torch.testing.assert_close(features.pooled, tiny()(resized))
    torch.testing.assert_close(network(images), features.pooled)
    (last,) = network.get_intermediate_layers(images)
    assert torch.equal(last, features.patches)


@torch.no_grad()
def test_a_mirrored_network_sees_mirrored_crops_alike():
    """Resampling prefers no side, at no size."""
    network, mirrored = tiny(), tiny()
    for block in mirrored.blocks:
        weight = block.attn.weight.unflatten(0, (4, 4)).unflatten(2, (4, 4))
        block.attn.weight.copy_(weight.flip(1, 3).reshape(16, 16))
        block.attn.bias.copy_(block.attn.bias.unflatten(0, (4, 4)).flip(1).flatten())
    mirrored.patch_embed.proj.weight.copy_(mirrored.patch_embed.proj.weight.flip(3))
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(network(images), mirrored(images.flip(3)), rtol=1e-4, atol=1e-4)


def test_no_grid_leaves_a_trace_in_the_state():
    network = tiny()
    names = list(network.state_dict())
    network(torch.randn(1, 3, 8, 24))
    assert list(network.state_dict()) == names and not list(network.buffers())
    copy.deepcopy(network).double()(torch.randn(1, 3, 8, 24, dtype=torch.float64))


@pytest.mark.parametrize("size", [16, 8, 32])
@pytest.mark.parametrize("mlp_grid", ["mix", "resize"])
def test_gradients_reach_every_parameter(size, mlp_grid):
    network = tiny(mlp_grid=mlp_grid)
    network(torch.randn(2, 3, size, size)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_gradient_through_a_small_crop_is_that_of_the_formula():
    network, grid = tiny(), (2, 3)
    mixing = network.blocks[0].attn
    down, up = matrices(grid)
    x, seed = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    gradients = []
    for y in (mixing(x, grid), up @ (mixing.weight @ (down @ x) + mixing.bias[:, None])):
        gradients.append(torch.autograd.grad((y * seed).sum(), [mixing.weight, mixing.bias]))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 13])
def test_any_number_of_channels(channels):
    assert tiny(in_chans=channels)(torch.randn(2, channels, 16, 8)).shape == (2, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 8, 32])
def test_autocast_stays_close_to_float32(dtype, size):
    network, between = ResMLP(**TINY), set()
    for block in network.blocks:
        block.register_forward_hook(lambda block, inputs, output: between.add(output.dtype))
    images = torch.randn(2, 3, size, size)
    keep = draw_keep(0, 0, torch.arange(2), 1, [0.5] * 6).flatten(1)
    for kept in (None, keep):
        with torch.autocast("cpu", dtype=dtype):
            half = network(images, kept)
        assert between == {torch.float32}  # what is added up keeps the precision of the weights
        half.sum().backward()
        torch.testing.assert_close(half, network(images, kept), rtol=0, atol=0.05)


def test_every_block_has_the_same_rate():
    assert tiny(drop_path_rate=0.3).drop_path_rates == (0.3,) * 6
    assert not any(tiny().drop_path_rates)


@pytest.mark.parametrize("size", [16, 8])
def test_skipping_dropped_samples_equals_masking_them(size):
    network = tiny(drop_path_rate=0.5)
    images, grid = torch.randn(8, 3, size, size), (size // 4, size // 4)
    keep = draw_keep(0, 3, torch.arange(8), 1, network.drop_path_rates).flatten(1)
    assert keep.any(1).all() and not keep.all(1).any()
    x = network.patch_embed(images)
    for index, block in enumerate(network.blocks):
        mask = 2 * keep[2 * index : 2 * index + 2].float().view(2, 8, 1, 1)
        x = x + mask[0] * block.gamma_1 * block.attn(block.norm1(x), grid)
        x = x + mask[1] * block.gamma_2 * block.mlp(block.norm2(x))
    expected = network.norm(x).mean(dim=1)
    torch.testing.assert_close(network(images, keep), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, network(images), atol=1e-3)


def test_a_branch_that_nobody_keeps_gets_a_gradient_of_zero():
    network = tiny(drop_path_rate=0.5)
    keep = torch.ones(6, 2, dtype=torch.bool)
    keep[4:] = False
    network(torch.randn(2, 3, 8, 8), keep).square().sum().backward()
    for name, parameter in network.blocks[2].named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    "depth, options, scale",
    [(12, {}, 0.1), (18, {}, 0.1), (19, {}, 1e-5), (24, {}, 1e-5), (25, {}, 1e-6), (36, {}, 1e-6),
     (12, {"init_scale": 0.5}, 0.5), (12, {"init_scale": 0.0}, 0.0)],
)  # fmt: skip
def test_first_weights(depth, options, scale):
    torch.manual_seed(0)
    network = ResMLP(**{**TINY, "depth": depth}, **options)
    for name, parameter in network.named_parameters():
        if "gamma" in name:
            assert torch.equal(parameter, torch.full((24,), scale))
        elif "alpha" in name:
            assert (parameter == 1).all()
        elif "beta" in name or name.startswith("blocks") and name.endswith("bias"):
            assert not parameter.any()
        elif name.startswith("blocks"):
            assert 0.015 < parameter.std() < 0.025 and parameter.abs().max() < 2


def test_last_mixing_is_that_of_the_last_block():
    network = tiny()
    assert torch.equal(network.get_last_mixing((4, 4)), network.blocks[2].attn.weight)
    assert network.get_last_mixing((2, 5)).shape == (10, 10)
    resized = tiny(mlp_grid="resize")
    assert torch.equal(resized.get_last_mixing((4, 4)), network.get_last_mixing((4, 4)))
    with pytest.raises(UserError, match="^With mlp_grid resize .* 4 × 4 .* not on 2 × 5.$"):
        resized.get_last_mixing((2, 5))


@pytest.mark.parametrize("shape, said", [((1, 3, 16, 18), "16 × 16"), ((1, 1, 16, 16), "in_chans"),
                                         ((1, 3, 2, 16), "4 × 16")])  # fmt: skip
@pytest.mark.parametrize("mlp_grid", ["mix", "resize"])
def test_images_that_do_not_fit_are_refused(shape, said, mlp_grid):
    network = tiny(mlp_grid=mlp_grid)
    for method in (network, network.forward_features, network.get_intermediate_layers):
        with pytest.raises(UserError, match=said):
            method(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 30}, "the nearest that is: 32"),
        ({"depth": 0}, "depth is 0"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"mlp_grid": "stretch"}, "mlp_grid is 'stretch'; it is one of mix, resize."),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        ResMLP(**{**TINY, **options})
