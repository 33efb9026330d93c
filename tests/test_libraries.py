"""Models of other libraries: what wrapping makes of them, and torchvision's."""

from __future__ import annotations

import pytest
import torch
from refusals import refusal
from torch import nn

from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.interface import Backbone, Features, HasSelfAttention
from dino_kit.backbones.libraries import sizes
from dino_kit.backbones.libraries.wrapped import LibraryBackbone, see_channels
from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.errors import UserError
from dino_kit.training.optim import split_by_decay


class DropPath(nn.Module):
    """As libraries have it."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        raise AssertionError("it draws from a generator")


class Net(nn.Module):
    """Two branches by one module of stochastic depth, one by another; in windows of half an image."""

    def __init__(self, rates=(0.5, 0.25)):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.drop = DropPath(rates[0])
        self.drop_in_windows = DropPath(rates[1])
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.table = nn.Parameter(torch.ones(3, 2))

    def no_weight_decay(self):
        return {"tab*"}  # timm gives patterns, too

    def forward(self, x):
        if x.shape[2] % 8:
            raise AssertionError(f"{x.shape[2]} is no multiple of 8")
        x = self.norm(self.stem(x)).flatten(2).mT  # (B, N, D)
        x = x + self.drop(self.dropout(self.layers[0](x)))
        x = x + self.drop(self.layers[1](x)) * self.scale
        windows = x.unflatten(1, (2, -1)).flatten(0, 1)
        return x + self.drop_in_windows(self.layers[2](windows)).unflatten(0, (-1, 2)).flatten(1, 2)


class Wrapped(LibraryBackbone):
    depth = 1

    def read(self, images):
        x = self.model(images)
        return Features(x.mean(1), x, (images.shape[2] // 4, images.shape[3] // 4))

    def get_intermediate_layers(self, images, n=1):
        self.keep_all()
        return [self.model(images)]


@pytest.fixture
def wrapped():
    torch.manual_seed(0)
    return Wrapped(Net(), "a net", image_size=16, in_chans=3)


def test_a_wrapped_model_is_a_backbone(wrapped):
    assert isinstance(wrapped, Backbone)
    assert (wrapped.embed_dim, wrapped.patch_size, wrapped.num_prefix_tokens) == (8, 4, 0)
    assert len(wrapped.blocks) == 3


def test_its_tensors_are_called_as_the_library_calls_them(wrapped):
    state = wrapped.state_dict()
    assert set(state) == set(wrapped.model.state_dict())
    other = nn.Sequential(Wrapped(Net(), "a net", 16, 3))
    other.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert all(map(torch.equal, other.state_dict().values(), state.values()))
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({})


def test_stochastic_depth_is_what_is_handed_in(wrapped):
    """One row for each branch, in the order of their calls; kept ones are scaled."""
    assert wrapped.drop_path_rates == (0.5, 0.5, 0.25)
    wrapped.eval()
    images = torch.randn(4, 3, 16, 16)
    keep = draw_keep(0, 0, torch.arange(4), 1, wrapped.drop_path_rates)[:, 0]  # (L, B)
    assert 0 < keep.sum() < keep.numel()
    found = wrapped(images, keep)
    factors = keep.float() / (1 - torch.tensor(wrapped.drop_path_rates))[:, None]
    net = wrapped.model
    x = net.norm(net.stem(images)).flatten(2).mT
    for layer, factor in zip(net.layers, factors, strict=True):
        x = x + factor[:, None, None] * layer(x)
    torch.testing.assert_close(found, x.mean(1))
    # And nothing of it stays.
    assert not torch.equal(wrapped(images), found)
    torch.testing.assert_close(wrapped(images), wrapped.forward_features(images).pooled)


def test_no_number_is_drawn_from_a_generator(wrapped):
    images, keep = torch.randn(2, 3, 16, 16), torch.ones(3, 2, dtype=torch.bool)
    before = torch.get_rng_state()
    assert torch.equal(wrapped.train()(images, keep), wrapped(images, keep))
    assert torch.equal(torch.get_rng_state(), before)


def test_computing_again_changes_no_gradient_and_no_statistics(wrapped):
    images = torch.randn(4, 3, 16, 16)
    keeps = draw_keep(0, 0, torch.arange(4), 2, wrapped.drop_path_rates).unbind(1)
    found = []
    for again in (False, True):
        wrapped.checkpoint_activations = again
        wrapped.model.norm.reset_running_stats()
        wrapped.zero_grad()
        # Two sizes of crops before one backward pass, each with draws of its own.
        sum(wrapped(images, keep).square().sum() for keep in keeps).backward()
        found.append([p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
                     + [wrapped.model.norm.running_mean.clone()])  # fmt: skip
    for plain, computed_again in zip(*found, strict=True):
        torch.testing.assert_close(plain, computed_again, rtol=0, atol=0)


def test_vectors_of_any_shape_and_what_the_authors_exempt_do_not_decay(wrapped):
    network = nn.Module()
    network.backbone = wrapped
    decayed, others = split_by_decay(network)
    assert set(decayed) == {
        f"backbone.model.{name}.weight" for name in ("stem", "layers.0", "layers.1", "layers.2")
    }
    assert {"backbone.model.scale", "backbone.model.table"} < set(others)


def test_sizes_that_do_not_pass_are_told_with_those_near_that_do(wrapped):
    wrapped.require_sizes([8, 16, 96])
    with pytest.raises(UserError) as error:
        wrapped.require_sizes([16, 20], "; a way out")
    assert str(error.value) == (
        "a net takes no images of 20 pixels a side; near it, it takes 8, 16, 24, 32; a way out."
    )
    with pytest.raises(UserError, match="a net takes no images of 12 pixels .*: 12 is no multiple"):
        Wrapped(Net(), "a net", image_size=12, in_chans=3)


def test_a_global_size_that_is_refused_is_told_with_those_near_it_that_are_not():
    sentence = refusal(create_backbone, "vit_b_32", image_size=100)
    assert sentence == (
        "torchvision:vit_b_32 takes no images of 100 pixels a side; near it, it takes 32, 64, 96, 128, "
        "160, 192, 224."
    )
    # Where the size is not to blame, what is.
    sentence = refusal(create_backbone, "vit_b_32", image_size=100, depth=3)
    assert "unexpected keyword argument 'depth'" in sentence
    sentence = refusal(sizes.built, lambda _: create_backbone("nothing"), "it", 96)
    assert sentence.startswith("--arch is 'nothing'")


def test_other_channels_get_a_first_convolution_of_their_own():
    net = Net()
    see_channels(net, 5)
    assert Wrapped(net, "a net", 16, 5)(torch.randn(2, 5, 16, 16)).shape == (2, 8)
    with pytest.raises(UserError, match="begins with no convolution"):
        see_channels(nn.Linear(3, 3), 5)


# torchvision

# Name, side, D, patch, depth.
MODELS = [
    ("resnet18", 64, 512, 32, 2),
    ("convnext_tiny", 64, 768, 32, 3),
    ("swin_t", 64, 768, 32, 2),
    ("vit_b_32", 64, 768, 32, 12),
    ("densenet121", 64, 1024, 32, 1),
    ("shufflenet_v2_x0_5", 64, 1024, 32, 3),
    ("mobilenet_v3_small", 64, 576, 32, 1),
    ("squeezenet1_0", 64, 512, 21, 2),
    ("vgg11", 64, 512, 32, 1),
    ("regnet_y_400mf", 64, 440, 32, 6),
    ("mnasnet0_5", 64, 1280, 32, 3),
    ("efficientnet_b0", 64, 1280, 32, 1),
    ("googlenet", 64, 1024, 32, 1),
    ("inception_v3", 96, 2048, 96, 1),
    ("maxvit_t", 224, 512, 32, 1),
]


@pytest.mark.parametrize(
    ("name", "side", "width", "patch", "depth"),
    [pytest.param(*row, marks=[] if n < 4 else pytest.mark.slow) for n, row in enumerate(MODELS)],
    ids=[row[0] for row in MODELS],
)
def test_a_model_of_torchvision(name, side, width, patch, depth):
    backbone = create_backbone(f"torchvision:{name}", image_size=side).eval()
    assert (backbone.embed_dim, backbone.patch_size, backbone.depth) == (width, patch, depth)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        pooled, patches, grid = backbone.forward_features(images)
        layers = backbone.get_intermediate_layers(images, depth)
    assert pooled.shape == (2, width) and patches.shape == (2, grid[0] * grid[1], width)
    prefix = backbone.num_prefix_tokens
    assert [layer.shape for layer in layers] == [(2, prefix + grid[0] * grid[1], width)] * depth
    torch.testing.assert_close(layers[-1][:, prefix:], patches)
    with pytest.raises(UserError, match=f"its last {depth} blocks, and {depth + 1} are"):
        backbone.get_intermediate_layers(images, depth + 1)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_t", "vit_b_32"])
def test_its_pooled_feature_is_what_the_library_classifies_by(name):
    from torchvision import models

    torch.manual_seed(0)
    backbone = create_backbone(f"torchvision:{name}", image_size=64).eval()
    size = {"image_size": 64} if "vit" in name else {}
    plain = models.get_model(name, weights=None, **size).eval()
    plain.load_state_dict(backbone.state_dict(), strict=False)
    last = [module for module in plain.modules() if isinstance(module, nn.Linear)][-1]
    seen = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain(images)
        torch.testing.assert_close(backbone(images), seen[0])


def test_attention_of_torchvisions_vit_is_the_softmax_by_hand():
    backbone = create_backbone("vit_b_32", image_size=64).eval().double()
    with torch.no_grad():
        for size, grid in ((64, 4), (96, 9)):
            images = torch.randn(2, 3, size, size, dtype=torch.float64)
            layer = backbone.model.encoder.layers[-1]
            x = backbone._tokens(images)
            for before in backbone.model.encoder.layers[:-1]:
                x = before(x)
            x = layer.ln_1(x)
            q, k, _ = (x @ layer.self_attention.in_proj_weight.T
                       + layer.self_attention.in_proj_bias).chunk(3, dim=-1)  # fmt: skip
            q, k = (part.unflatten(2, (12, 64)).transpose(1, 2) for part in (q, k))
            by_hand = (q @ k.mT / 8).softmax(-1)
            maps = backbone.get_last_selfattention(images)
            assert maps.shape == (2, 12, 1 + grid, 1 + grid)
            torch.testing.assert_close(maps, by_hand, rtol=0, atol=1e-6)
    assert isinstance(backbone, HasSelfAttention)
    assert not isinstance(create_backbone("resnet18", image_size=32), HasSelfAttention)
    with pytest.raises(UserError, match="There is no block 12; in a network of depth 12"):
        backbone.get_selfattention(images, 12)


def test_its_rates_of_stochastic_depth_are_the_flags():
    rates = create_backbone("swin_t", image_size=32, drop_path_rate=0.2).drop_path_rates
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and len(rates) == 24
    assert not any(create_backbone("swin_t", image_size=32).drop_path_rates)


def test_a_swins_table_of_relative_positions_does_not_decay():
    exempt = create_backbone("swin_t", image_size=32).no_weight_decay()
    assert any(name.endswith("relative_position_bias_table") for name in exempt)
    assert not any(name.endswith("qkv.weight") for name in exempt)
