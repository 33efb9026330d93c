"""T2T-ViT: its equations by hand, its authors' numbers, what is fixed in it, its weights and runs."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import Stopped, assert_same_run, metrics, pictures, result, stop_after, train  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

import dino_kit
from dino_kit import cli
from dino_kit.assemble import untrained_backbone
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.interface import Backbone, HasSelfAttention
from dino_kit.backbones.recognition import recognize
from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.backbones.t2t import Performer, T2TViT, TokensToToken, sinusoids
from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError
from dino_kit.training import optim
from dino_kit.weights import load

TINY = {"image_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0,
        "token_dim": 8}  # fmt: skip
FIXED = ["pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"]


def tiny(**options) -> T2TViT:
    """Weights that are not the first ones; what is fixed is as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = T2TViT(**{**TINY, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def images(*size: int, count: int = 2) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(sum(size))
    return torch.randn(count, 3, *(size or (32, 32)), generator=numbers)


# The model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_t2t_golden(golden, dtype, tolerance):
    """Numbers that the authors' code computed in float64, by the names that it gives its tensors."""
    arrays = {name: torch.from_numpy(value) for name, value in golden("t2t").items()}
    state = {
        name.removeprefix("state/"): value
        for name, value in arrays.items()
        if name.startswith("state/")
    }
    network = T2TViT(**TINY)
    torch.testing.assert_close(network.pos_embed.data, state["pos_embed"])
    network.load_state_dict(state)
    network.to(dtype)

    def same(found, name):
        expected = arrays[name].to(dtype)
        scale = expected.abs().max().item() if name.startswith("gradient/") else 1.0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)

    pooled = network(arrays["images"].to(dtype))
    same(pooled, "pooled")
    same(network.get_last_selfattention(arrays["images"].to(dtype)), "maps")
    same(network.tokens_to_token(arrays["larger images"].to(dtype)), "larger patches")
    pooled.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert {f"gradient/{name}" for name in gradients} == {
        name for name in arrays if name.startswith("gradient/")
    }
    for name, gradient in gradients.items():
        same(gradient, f"gradient/{name}")


def test_a_performer_is_what_the_equations_say():
    torch.manual_seed(0)
    layer, (dim, e, m, t) = Performer(10, 6, 1e-5).double(), (10, 6, 3, 5)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, t, dim, dtype=torch.float64)

    def phi(y):
        rows = [(layer.w[i] @ y - y @ y / 2).exp() / m**0.5 for i in range(m)]
        return torch.stack(rows)

    for image, found in zip(x, layer(x), strict=True):
        kqv = layer.norm1(image) @ layer.kqv.weight.T + layer.kqv.bias
        k, q, v = kqv[:, :e], kqv[:, e : 2 * e], kqv[:, 2 * e :]
        for i in range(t):
            weights = torch.stack([phi(q[i]) @ phi(k[j]) for j in range(t)])
            attended = (weights[:, None] * v).sum(0) / (weights.sum() + 1e-8)
            y = v[i] + attended @ layer.proj.weight.T + layer.proj.bias
            z = torch.nn.functional.gelu(layer.mlp[0](layer.norm2(y)))
            torch.testing.assert_close(found[i], y + layer.mlp[2](z), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", ["published", "of softmax"])
def test_which_kernel_the_random_features_estimate(length):
    torch.manual_seed(0)
    q, other = (0.1 * torch.randn(64, dtype=torch.float64) for _ in range(2))
    k, found = (q + other) / 2, []
    for _ in range(300):
        layer = Performer(1, 64, 1e-5).double()
        with torch.no_grad():
            layer.w.mul_(1.0 if length == "published" else 2**0.5)
        found.append(layer.random_features(q) @ layer.random_features(k))
    expected = (-(q - k).square().sum() / 4 if length == "published" else q @ k).exp()
    assert torch.stack(found).mean().item() == pytest.approx(expected.item(), rel=0.05)


def test_a_soft_split_lists_what_surrounds_a_place():
    """The first: of place (1, 2) the 7 × 7 pixels from (2, 6) on; at the border zeros."""
    seen = []
    network = TokensToToken(3, 8, 24, 1e-5)
    network.attention1.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    network.attention2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    network.project.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    batch = images(32, 48)
    assert network(batch).shape == (2, 6, 24)
    first, second, third = seen
    assert first.shape == (2, 8 * 12, 49 * 3)
    assert torch.equal(first[:, 12 + 2], batch[:, :, 2:9, 6:13].flatten(1))
    assert not first[:, 0].unflatten(1, (3, 7, 7))[:, :, :2].any()
    # Place (1, 1) of 4 × 6: rows 1 to 3, columns 1 to 3 of the 8 × 12 before.
    before = network.attention1(first).unflatten(1, (8, 12))
    expected = before[:, 1:4, 1:4].flatten(1, 2).mT.flatten(1)  # by channel, then by place
    assert second.shape == (2, 4 * 6, 72) and third.shape == (2, 2 * 3, 72)
    torch.testing.assert_close(second[:, 6 + 1], expected)


def test_positions_are_sines_and_cosines_of_the_patches_numbers():
    table = sinusoids(5, 7)
    for position in range(5):
        for channel in range(7):
            angle = position / 10000 ** (2 * (channel // 2) / 7)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[position, channel].item() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (16, 16), (48, 16), (64, 80)])
def test_any_size_that_is_a_multiple_of_16(size):
    network, batch = tiny().eval(), images(*size)
    features = network.forward_features(batch)
    grid = (size[0] // 16, size[1] // 16)
    assert features.grid == grid and features.patches.shape == (2, grid[0] * grid[1], 24)
    torch.testing.assert_close(features.pooled, network(batch))
    tokens = 1 + grid[0] * grid[1]
    maps = network.get_last_selfattention(batch)
    assert maps.shape == (2, 3, tokens, tokens)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, tokens))


@pytest.mark.parametrize("size", [(33, 32), (32, 24), (8, 8)])
def test_other_sizes_are_refused(size):
    with pytest.raises(UserError, match="cannot be cut into patches of 16 × 16; resize or crop"):
        tiny()(images(*size))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"token_dim": 7}, "token_dim is 7; it is even"),
        ({"token_dim": 0}, "token_dim is 0; it is a whole number from 1"),
        ({"image_size": 40}, "image_size 40 is not a multiple of patch_size 16"),
        ({"num_heads": 5}, "embed_dim 24 cannot be shared out among 5 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(**options)


def test_it_is_what_the_interface_says():
    network = tiny(drop_path_rate=0.3)
    assert isinstance(network, Backbone) and isinstance(network, HasSelfAttention)
    assert (network.embed_dim, network.patch_size, network.num_prefix_tokens) == (24, 16, 1)
    assert (network.depth, network.num_heads) == (2, 3)
    # The T2T process has no branch that could be dropped.
    assert network.drop_path_rates == pytest.approx((0.0, 0.0, 0.3, 0.3))
    assert network.no_weight_decay() <= {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize("size", [32, 16])
def test_gradients_reach_every_parameter_but_what_is_fixed(size):
    network = tiny()
    network(images(size, size)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == FIXED
    for name, parameter in network.named_parameters():
        assert name in FIXED or parameter.grad.any(), name


def test_what_is_kept_from_weight_decay():
    holder = torch.nn.Module()
    holder.backbone = tiny()
    decayed, others = (set(half) for half in optim.split_by_decay(holder))
    assert "backbone.cls_token" in others and "backbone.tokens_to_token.project.weight" in decayed
    assert not {f"backbone.{name}" for name in FIXED} & (decayed | others)


def test_checkpointed_activations_are_the_same_and_fewer():
    kept, gradients = {}, {}
    for twice in (False, True):
        network, sizes = tiny(), []
        network.checkpoint_activations = twice
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            pooled = network(images())
        pooled.square().sum().backward()
        kept[twice] = sum(sizes)
        gradients[twice] = [p.grad for p in network.parameters() if p.requires_grad]
    assert kept[True] < kept[False] / 4
    for one, other in zip(gradients[False], gradients[True], strict=True):
        assert torch.equal(one, other)


def test_its_tensors_have_the_names_of_the_published_code():
    found = set(tiny(depth=1).state_dict())
    performer = ["norm1", "kqv", "proj", "norm2", "mlp.0", "mlp.2"]
    linear = [f"tokens_to_token.attention{i}.{part}" for i in (1, 2) for part in performer]
    block = ["norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"]
    linear += ["tokens_to_token.project", *(f"blocks.0.{part}" for part in block), "norm"]
    expected = {f"{part}.{kind}" for part in linear for kind in ("weight", "bias")}
    assert found == expected | {*FIXED, "cls_token", "blocks.0.attn.qkv.weight"}


# What is fixed


def test_random_features_are_orthogonal_and_of_the_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        return T2TViT(**TINY).tokens_to_token

    one, same, other = drawn(0), drawn(0), drawn(1)
    for name in ("attention1", "attention2"):
        w = getattr(one, name).w
        torch.testing.assert_close(w @ w.mT, 4 * torch.eye(4))
        assert torch.equal(w, getattr(same, name).w)
        assert not torch.equal(w, getattr(other, name).w)
    assert not torch.equal(one.attention1.w, one.attention2.w)


def test_first_weights_are_the_published_codes():
    torch.manual_seed(0)
    network = T2TViT(**{**TINY, "embed_dim": 48})
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name not in FIXED:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
    assert torch.equal(network.pos_embed[0], sinusoids(5, 48))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exponentials_are_in_float32_under_autocast(dtype):
    """A query that lies as ω does: fp16 has no room for the feature, bfloat16 no digits."""
    torch.manual_seed(0)
    layer = Performer(10, 64, 1e-5)
    q = (layer.w[:1] * torch.linspace(0.7, 1, 20)[:, None]).expand(2, 20, 64)
    k, v = q.flip(1).contiguous(), torch.randn(2, 20, 64)
    expected = layer.attend(q, k, v)
    assert layer.random_features(q).max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype=dtype):
        found = layer.attend(q, k, v)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype):
    network = T2TViT(**TINY)
    keep = draw_keep(0, 0, torch.arange(2), 1, [0.5] * 4).flatten(1)
    for kept in (None, keep):
        with torch.autocast("cpu", dtype=dtype):
            half = network(images(16, 32), kept)
        half.float().sum().backward()
        torch.testing.assert_close(half.float(), network(images(16, 32), kept), rtol=0, atol=0.05)


# Names, flags and files


@pytest.mark.parametrize(
    "name, millions, multiplications",
    [
        ("t2t_vit_7", 4.3, 1.1),
        ("t2t_vit_10", 5.9, 1.5),
        ("t2t_vit_12", 6.9, 1.8),
        ("t2t_vit_14", 21.5, 4.8),
        ("t2t_vit_19", 39.2, 8.5),
        ("t2t_vit_24", 64.1, 13.8),
    ],
)
def test_numbers_of_parameters_and_of_multiplications(name, millions, multiplications, monkeypatch):
    """Published with a classifier of 1000 classes, and in billions for an image of 224 × 224.

    Counted by PyTorch's FlopCounterMode: products of matrices, half of whose operations are
    additions.
    """
    # It knows no device without numbers, on which nothing is computed and all is counted.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        network = create_backbone(name)
        batch = torch.empty(1, 3, 224, 224)
    count = sum(p.numel() for p in network.parameters()) + 1000 * (network.embed_dim + 1)
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.forward_features(batch)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiplications, rel=0.1)


def config(**changes):
    sizes = {"arch": "t2t_vit", "embed_dim": 24, "depth": 2, "num_heads": 2, **changes}
    crops = {"global_crops_size": 32, "local_crops_size": 16}
    return TrainConfig(data_path="digits", output_dir="x", **{**crops, **sizes})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"patch_size": 8},
            "--arch t2t_vit has patches of its own, so --patch_size cannot be given",
        ),
        (
            {"global_crops_size": 40},
            "--global_crops_size 40 is not a multiple of .* 16; .* 32 and 48",
        ),
        ({"local_crops_size": 8}, "--local_crops_size 8 is not a multiple of .* 16; .* is 16"),
        ({"reattention_blocks": 1}, "--arch t2t_vit has no use for --reattention_blocks"),
        ({"num_heads": None}, "--arch t2t_vit needs its sizes: --num_heads missing."),
        ({"arch": "t2t_vit_7"}, "t2t_vit_7 has sizes of its own, .*; use --arch t2t_vit to choose"),
    ],
)
def test_flags_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config(**changes)
    assert config(patch_size=16, mlp_ratio=2.0).known_patch_size == 16


GIVEN = dict.fromkeys(
    ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "mlp_grid",
     "arch_options")
)  # fmt: skip


def test_what_no_tensor_shows_and_what_contradicts_one():
    state = tiny().state_dict()
    with pytest.raises(
        UserError, match="heads of it is not known: .* 24 and depth 2; give --num_h"
    ):
        recognize(state, {}, None, GIVEN, "it")
    found = recognize(state, {}, None, {**GIVEN, "num_heads": 3, "patch_size": 16}, "it")
    assert found == ("t2t_vit", "t2t_vit", {**TINY, "in_chans": 3})
    with pytest.raises(UserError, match="--patch_size 8 contradicts it, .* have patch_size 16"):
        recognize(state, {}, None, {**GIVEN, "num_heads": 3, "patch_size": 8}, "it")
    with pytest.raises(UserError, match="--arch vit contradicts it, whose tensors .* a T2T-ViT"):
        recognize(state, {}, "vit", {**GIVEN, "num_heads": 3}, "it")
    with pytest.raises(UserError, match="--arch t2t_vit_7 contradicts it: t2t_vit_7 has embed_dim"):
        recognize(state, {}, "t2t_vit_7", {**GIVEN, "num_heads": 3}, "it")
    with pytest.raises(UserError, match="--num_heads 8 contradicts it, which is of 4 heads"):
        with torch.device("meta"):
            state = create_backbone("t2t_vit_7").state_dict()
        recognize(state, {}, None, {**GIVEN, "num_heads": 8}, "it")


def test_a_token_transformer_of_another_kind_is_refused():
    """The published code has a second one, of softmax attention."""
    state = {name.replace("attention1.w", "attention1.attn.w"): value
             for name, value in tiny().state_dict().items()}  # fmt: skip
    sentence = "no T2T-ViT with Performers .* no tensor tokens_to_token.attention1.w with 2"
    with pytest.raises(UserError, match=sentence):
        recognize(state, {}, None, {**GIVEN, "num_heads": 3}, "it")


def test_a_published_file_is_read_as_it_is(tmp_path):
    """The averaged weights under their key, a classifier among them, for another image size."""
    network = create_backbone("t2t_vit_7", image_size=64, in_chans=2).eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state |= {"module.head.weight": torch.zeros(10, 256), "module.head.bias": torch.zeros(10)}
    torch.save({"state_dict_ema": state}, tmp_path / "published.pth.tar")
    loaded = load(tmp_path / "published.pth.tar", "state_dict_ema")
    assert loaded.architecture == {
        "name": "t2t_vit_7", "image_size": 64, "in_chans": 2, "embed_dim": 256, "depth": 7,
        "num_heads": 4, "mlp_ratio": 2.0, "token_dim": 64,
    }  # fmt: skip
    assert loaded.matched == len(network.state_dict()) == 109
    picture = images(48, 32)[:, :2]
    with torch.inference_mode():
        assert torch.equal(loaded.backbone(picture), network(picture))


FLAGS = ["--arch", "t2t_vit", "--patch_size", 16, "--global_crops_size", 32, "--local_crops_size",
         16]  # fmt: skip


def test_it_is_pretrained_evaluated_and_looked_into(pictures, tmp_path):  # noqa: F811
    for name in ("one", "other"):
        assert train(pictures, tmp_path / name, *FLAGS, "--checkpoint_activations",
                     name == "other") == 0  # fmt: skip
    losses = [line["loss"] for line in metrics(tmp_path / "one")]
    again = [line["loss"] for line in metrics(tmp_path / "other")]
    assert len(set(losses)) > 1 and again == pytest.approx(losses, abs=1e-4)

    content = result(tmp_path / "one")
    first = untrained_backbone(fields.from_plain(TrainConfig, content["config"])).state_dict()
    for name, value in first.items():
        student, teacher = content["student"][f"module.backbone.{name}"], content["teacher"]
        teacher = teacher[f"backbone.{name}"]
        # What is fixed is of the seed, the same in both, and as it was.
        assert torch.equal(student, value) == torch.equal(teacher, value) == (name in FIXED), name
        assert torch.equal(student, teacher) == (name in FIXED), name

    backbone = dino_kit.load_backbone(tmp_path / "one")
    assert isinstance(backbone, T2TViT) and not backbone.training
    assert cli.main(["knn", str(tmp_path / "one"), "--data_path", str(pictures),
                     "--val_share", "0.5", "--nb_knn", "3"]) == 0  # fmt: skip
    record = json.loads((tmp_path / "one/knn.json").read_text("utf-8"))
    assert record["architecture"]["name"] == "t2t_vit"

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(picture)
    words = ["attention", str(tmp_path / "one"), "--image_path", str(picture)]
    assert cli.main([*words, "--image_size", "64"]) == 0
    with np.load(tmp_path / "one/attention/picture/attention.npz") as arrays:
        assert arrays["attention"].shape == (2, 4, 4)
    assert cli.main(["report", str(tmp_path / "one")]) == 0


def test_it_is_resumed_bit_for_bit(pictures, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 4)
        train(pictures, tmp_path / "parts", *FLAGS, "--save_every_steps", 3)
    for name in ("parts", "whole"):
        assert train(pictures, tmp_path / name, *FLAGS) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
