"""The vision transformer and its stochastic depth."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from dino_kit.backbones import attention
from dino_kit.backbones.interface import Backbone, Features, HasSelfAttention
from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.backbones.vit import VisionTransformer
from dino_kit.errors import UserError
from dino_kit.training.optim import parameter_groups

TINY = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}


def tiny(**options) -> VisionTransformer:
    """A small network whose biases and norms are not at their trivial initial values."""
    torch.manual_seed(0)
    network = VisionTransformer(**{**TINY, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


# The options of DINOv2's published weights.
RICH = {"num_register_tokens": 3, "layer_scale": 0.3}
BOTH = pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "registers"])


def from_golden(arrays) -> VisionTransformer:
    config = json.loads(str(arrays["config"]))
    renamed = {"img_size": "image_size", "layer_norm_eps": "norm_eps"}
    network = VisionTransformer(**{renamed.get(key, key): v for key, v in config.items()})
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
def test_vit_golden(golden):
    arrays = golden("vit")
    network = from_golden(arrays)
    cases = sorted(key.split("/")[0] for key in arrays if key.endswith("/images"))
    for case in cases:
        images = torch.from_numpy(arrays[f"{case}/images"])
        layers = network.get_intermediate_layers(images, n=2)
        got = {
            "cls": network(images),
            "last_selfattention": network.get_last_selfattention(images),
            "intermediate0": layers[0],
            "intermediate1": layers[1],
        }
        for name, value in got.items():
            expected = torch.from_numpy(arrays[f"{case}/{name}"])
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=f"{case}/{name}")
    assert cases


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (32, 12)])
def test_features_are_the_parts_of_the_last_layer(size, options):
    network = tiny(**options)
    images = torch.randn(2, 3, *size)
    features = network.forward_features(images)
    (last,) = network.get_intermediate_layers(images)
    assert isinstance(features, Features)
    assert features.grid == (size[0] // 4, size[1] // 4)
    torch.testing.assert_close(features.pooled, network(images))
    patches = features.grid[0] * features.grid[1]
    prefix = network.num_prefix_tokens
    assert last.shape == (2, prefix + patches, 24)
    torch.testing.assert_close(features.pooled, last[:, 0])
    torch.testing.assert_close(features.patches, last[:, -patches:])


def test_it_is_what_the_interface_says():
    network = tiny()
    assert isinstance(network, Backbone) and isinstance(network, HasSelfAttention)
    assert (network.embed_dim, network.patch_size, network.num_prefix_tokens) == (24, 4, 1)
    assert (network.depth, network.num_heads) == (3, 2)
    assert isinstance(tiny(**RICH), HasSelfAttention) and tiny(**RICH).num_prefix_tokens == 4


@torch.no_grad()
@pytest.mark.parametrize("registers, scale", [(0, None), (4, None), (0, 0.3), (4, 0.3)])
def test_it_is_what_timm_computes(registers, scale):
    network = tiny(num_register_tokens=registers, layer_scale=scale)
    network.pos_embed[:, :1] = 0  # which timm, as those who use registers, leaves out
    state = {key.replace("register_tokens", "reg_token"): v for key, v in network.state_dict().items()}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    other = timm.models.VisionTransformer(
        16, 4, num_classes=0, global_pool="token", embed_dim=24, depth=3, num_heads=2,
        init_values=scale, reg_tokens=registers, no_embed_class=True,
    ).eval()  # fmt: skip
    other.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    (last,) = network.get_intermediate_layers(images)
    torch.testing.assert_close(last, other.forward_features(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(images), other(images), rtol=1e-5, atol=1e-5)


def test_registers_follow_the_class_token_and_have_no_position():
    plain, network = tiny(), tiny(num_register_tokens=5)
    network.load_state_dict({**network.state_dict(), **plain.state_dict()})
    images = torch.randn(2, 3, 8, 12)
    tokens, registers = network._tokens(images), network.register_tokens
    assert registers.shape == (1, 5, 24)
    assert torch.equal(tokens[:, 1:6], registers.expand(2, -1, -1))
    assert torch.equal(torch.cat((tokens[:, :1], tokens[:, 6:]), dim=1), plain._tokens(images))
    assert not torch.allclose(network(images), plain(images), atol=1e-3)


@torch.no_grad()
def test_layer_scale_multiplies_each_channel_of_both_branches():
    """So a network whose last layers of the branches are multiplied is the same."""
    network, plain = tiny(layer_scale=0.3), tiny()
    state = network.state_dict()
    for name in plain.state_dict():
        part, _, kind = name.rpartition(".")
        for branch, scale in (("attn.proj", "ls1"), ("mlp.fc2", "ls2")):
            if part.endswith(branch):
                gamma = network.get_parameter(f"{part.removesuffix(branch)}{scale}.gamma")
                state[name] = gamma.view(-1, *[1] * (state[name].ndim - 1)) * state[name]
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    images = torch.randn(2, 3, 16, 8)
    torch.testing.assert_close(network(images), plain(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(images), tiny()(images), atol=1e-3)


def test_the_options_add_to_a_network_and_change_nothing_else_of_its_first_weights():
    networks = {}
    for name, options in (("plain", {}), ("rich", RICH)):
        torch.manual_seed(0)
        networks[name] = VisionTransformer(**TINY, **options).state_dict()
    added = {name for name in networks["rich"] if name not in networks["plain"]}
    assert added == {
        "register_tokens", *(f"blocks.{block}.ls{n}.gamma" for block in range(3) for n in (1, 2))
    }
    for name, tensor in networks["plain"].items():
        assert torch.equal(networks["rich"][name], tensor), name
    assert networks["rich"]["register_tokens"].std() == pytest.approx(0.02, rel=0.3)
    assert all((networks["rich"][name] == 0.3).all() for name in added - {"register_tokens"})


def test_registers_decay_and_layer_scale_does_not():
    network = tiny(**RICH)
    decayed, others = ({id(p) for p in g["params"]} for g in parameter_groups(network))
    tokens = {id(network.cls_token), id(network.pos_embed), id(network.register_tokens)}
    assert tokens <= decayed
    gammas = {id(p) for name, p in network.named_parameters() if name.endswith("gamma")}
    assert len(gammas) == 6 and gammas <= others


@BOTH
@pytest.mark.parametrize("size", [16, 8])
def test_gradients_reach_every_parameter(size, options):
    network = tiny(**options)
    network(torch.randn(2, 3, size, size)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_any_number_of_channels(channels):
    network = tiny(in_chans=channels)
    assert network(torch.randn(2, channels, 16, 8)).shape == (2, 24)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype, options):
    network = VisionTransformer(**TINY, **options)
    images = torch.randn(2, 3, 8, 16)
    keep = draw_keep(0, 0, torch.arange(2), 1, [0.5] * 6).flatten(1)
    for kept in (None, keep):
        with torch.autocast("cpu", dtype=dtype):
            half = network(images, kept)
        half.float().sum().backward()
        torch.testing.assert_close(half.float(), network(images, kept), rtol=0, atol=0.05)


def test_the_same_input_gives_the_same_bits():
    network, images = tiny(), torch.randn(3, 3, 8, 8)
    assert torch.equal(network(images), network(images))


@BOTH
@pytest.mark.parametrize("half", [False, True])
def test_training_stores_no_attention_map(half, options):
    network = tiny(**options)
    shapes = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        network(torch.randn(2, 3, 16, 16))
    tokens = network.num_prefix_tokens + 4 * 4
    assert shapes and not [shape for shape in shapes if shape[-2:] == (tokens, tokens)]


def test_training_stores_the_hidden_layer_once():
    network, stored = tiny(depth=1), set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: stored.add((t.data_ptr(), t.numel())) or t, lambda t: t
    ):
        network.blocks[0].mlp(torch.randn(5, 7, 24, requires_grad=True))
    assert [size for _, size in stored].count(5 * 7 * 96) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_is_two_linear_layers_around_a_gelu(dtype):
    mlp = tiny().blocks[0].mlp
    x = torch.randn(3, 5, 24, requires_grad=True)
    results = []
    for forward in (mlp, lambda x: mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))):
        mlp.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = forward(x)
        y.float().square().mean().backward()
        results.append([y, x.grad.clone(), *(p.grad.clone() for p in mlp.parameters())])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 2, -1, -2, -3])
def test_maps_are_computed_of_the_one_block_that_is_asked_for(block):
    network = tiny()
    fused, calls = [], []
    for index, one in enumerate(network.blocks):
        original = one.attn.attention
        one.attn.attention = lambda x, i=index, f=original: (calls.append(i), f(x))[1]
        one.register_forward_hook(lambda *_, i=index: fused.append(i))
    maps = network.get_selfattention(torch.randn(2, 3, 8, 16), block)
    assert calls == [block % 3] and fused == list(range(block % 3))
    assert maps.shape == (2, 2, 9, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 9))


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("size", [(16, 16), (4, 4), (8, 24), (36, 20)])
def test_maps_are_the_softmax_of_queries_and_keys(size, options):
    network, images = tiny(qkv_bias=True, **options), torch.randn(2, 3, *size)
    given = {}
    for index, block in enumerate(network.blocks):
        block.norm1.register_forward_hook(lambda m, i, y, index=index: given.update({index: y}))
    network.forward_features(images)
    for index, block in enumerate(network.blocks):
        q, k, _ = block.attn.qkv(given[index]).double().chunk(3, dim=-1)  # (B, T, D)
        q, k = (one.unflatten(-1, (2, 12)).transpose(1, 2) for one in (q, k))  # (B, h, T, d)
        scores = (q @ k.transpose(-2, -1) / 12**0.5).exp()
        expected = scores / scores.sum(dim=-1, keepdim=True)
        for number in (index, index - 3):
            maps = network.get_selfattention(images, number)
            torch.testing.assert_close(maps.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(network.get_last_selfattention(images), maps)


@pytest.mark.parametrize("block", [3, 12, -4])
def test_a_block_that_there_is_not_is_refused(block):
    said = f"^There is no block {block}; in a network of depth 3 they are 0 to 2, .* -1 to -3.$"
    with pytest.raises(UserError, match=said):
        tiny().get_selfattention(torch.randn(1, 3, 8, 8), block)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 16, 18), "16 × 16"),
        ((1, 3, 15, 12), "16 × 12"),
        ((1, 3, 2, 16), "4 × 16"),
        ((1, 1, 16, 16), "in_chans"),
        ((3, 16, 16), "in_chans"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, said):
    network = tiny()
    for method in (network, network.forward_features, network.get_last_selfattention):
        with pytest.raises(UserError, match=said):
            method(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"image_size": 30}, "the nearest that is: 32"),
        ({"depth": 0}, "depth is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"num_register_tokens": -1}, "num_register_tokens is -1; it is a whole number from 0"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0; it is a number above 0, or None"),
        ({"layer_scale": float("nan")}, "layer_scale is nan"),
        ({"layer_scale": float("inf")}, "layer_scale is inf"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        VisionTransformer(**{**TINY, **options})


def test_rates_grow_linearly_over_the_blocks():
    rates = tiny(drop_path_rate=0.3).drop_path_rates
    assert rates == pytest.approx((0.0, 0.0, 0.15, 0.15, 0.3, 0.3))
    assert not any(tiny().drop_path_rates)
    with torch.device("meta"):
        assert VisionTransformer(**TINY, drop_path_rate=0.3).drop_path_rates == rates


def masked_forward(network, images, keep):
    """Stochastic depth by its formula: compute everything, multiply by the mask."""
    x = network._tokens(images)
    for index, block in enumerate(network.blocks):
        for branch, (norm, module, scaled) in enumerate(
            [(block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2)]
        ):
            number = 2 * index + branch
            mask = keep[number].float().view(-1, 1, 1)
            x = x + scaled(module(norm(x))) / (1 - network.drop_path_rates[number]) * mask
    return network.norm(x)[:, 0]


@BOTH
def test_skipping_dropped_samples_equals_masking_them(options):
    network = tiny(drop_path_rate=0.6, **options)
    images = torch.randn(8, 3, 16, 16)
    keep = draw_keep(0, 3, torch.arange(8), 1, network.drop_path_rates).flatten(1)
    assert keep.any(1).all() and not keep[2:].all(1).any()
    results = []
    for forward in (network, lambda *args: masked_forward(network, *args)):
        network.zero_grad()
        y = forward(images, keep)
        y.square().mean().backward()
        results.append([y, *(p.grad.clone() for p in network.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0][0], network(images), atol=1e-3)


def test_the_last_block_is_computed_for_the_class_token_alone():
    network, seen = tiny(), []
    for block in network.blocks:
        block.attn.proj.register_forward_hook(lambda m, inputs, y: seen.append(y.shape[1]))
        block.mlp.register_forward_hook(lambda m, inputs, y: seen.append(y.shape[1]))
    network(torch.randn(2, 3, 16, 16))
    assert seen == [17, 17, 17, 17, 1, 1]


@BOTH
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_class_token_alone_is_that_of_all_tokens_and_so_are_gradients(qkv_bias, options):
    network, images = tiny(qkv_bias=qkv_bias, **options), torch.randn(3, 3, 16, 16)
    results = []
    for forward in (network, lambda x: network.forward_features(x).pooled):
        network.zero_grad()
        y = forward(images)
        y.square().mean().backward()
        results.append([y, *(p.grad.clone() for p in network.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_dropped_samples_are_not_computed():
    network = tiny(drop_path_rate=0.6)
    seen = []
    for block in network.blocks:
        for module in (block.attn, block.mlp):
            module.register_forward_hook(lambda m, inputs, output: seen.append(len(inputs[0])))
    keep = draw_keep(1, 0, torch.arange(8), 1, network.drop_path_rates).flatten(1)
    network(torch.randn(8, 3, 16, 16), keep)
    assert seen == keep.sum(1).tolist()
    assert sum(seen) < keep.numel()


def test_a_branch_that_nobody_keeps_gets_a_gradient_of_zero():
    """None instead would skip its weight decay, and stall data-parallel training."""
    network = tiny(drop_path_rate=0.5)
    keep = torch.ones(6, 2, dtype=torch.bool)
    keep[4:] = False
    network(torch.randn(2, 3, 16, 16), keep).square().sum().backward()
    for name, parameter in network.blocks[2].named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


RATES = [0.0, 0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    "parts", [[range(12)], [range(6), range(6, 12)], [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]]
)
def test_a_draw_depends_on_the_place_alone(parts):
    whole = draw_keep(3, 7, torch.arange(12), 5, RATES)
    assert whole.shape == (4, 5, 12) and whole.dtype == torch.bool
    assert whole.device.type == "cpu"
    for places in parts:
        part = draw_keep(3, 7, torch.tensor(list(places)), 5, RATES)
        assert torch.equal(part, whole[:, :, list(places)])
    assert torch.equal(draw_keep(3, 7, torch.arange(12), 2, RATES), whole[:, :2])


def test_draws_differ_by_seed_step_place_view_and_branch():
    def draw(seed, step):
        return draw_keep(seed, step, torch.arange(64), 4, [0.5] * 6)

    first = draw(0, 0)
    assert torch.equal(first, draw(0, 0))
    for other in (
        draw(1, 0),
        draw(0, 1),
        first.roll(1, 0),
        first.roll(1, 1),
        first.roll(1, 2),
    ):
        assert 0.4 < (first == other).float().mean() < 0.6


def test_branches_are_dropped_at_their_rates():
    keep = draw_keep(0, 0, torch.arange(4000), 10, RATES)
    assert keep[0].all()
    shares = keep.float().mean((1, 2))
    torch.testing.assert_close(shares, 1 - torch.tensor(RATES), rtol=0, atol=0.01)


def test_maps_without_a_gradient_are_made_in_parts_and_are_the_same(monkeypatch):
    numbers = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 17, 8, generator=numbers) for _ in range(2))
    expected = (q @ k.mT * 8**-0.5).softmax(dim=-1)
    for at_once in (1, 2 * 3 * 17 * 5, 1 << 21):
        monkeypatch.setattr(attention, "_ROWS_AT_ONCE", at_once)
        torch.testing.assert_close(attention.attention_maps(q, k), expected, rtol=0, atol=1e-6)
    learning = q.requires_grad_()
    maps = attention.attention_maps(learning, k)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(maps.square().sum(), learning)
    assert gradient.abs().sum() > 0
