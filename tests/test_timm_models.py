"""timm's models: what each family's own way asks for; every model alike is tested elsewhere."""

from __future__ import annotations

import copy
import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusals import refusal
from test_attention_command import save_image
from timm.layers import GatedMlp
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn

from dino_kit import cli, weights
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.grids import resampling
from dino_kit.backbones.interface import (
    Backbone,
    HasClassAttention,
    HasSelfAttention,
    HasTokenMixing,
)
from dino_kit.backbones.libraries.timm_kinds import kind_of
from dino_kit.backbones.maps import available
from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.batch_norm import synchronised
from dino_kit.errors import UserError
from dino_kit.evaluators.attention import attention_maps, classattention_maps, to_tensor
from dino_kit.evaluators.rollout import rollout
from dino_kit.figures import colour_table, heat
from dino_kit.training.compiling import compile_blocks
from dino_kit.training.optim import split_by_decay

# By family: a name, its native side here, options that make it small, and its prefix tokens.
VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 64, VIT, 1),
    "deit": ("deit_tiny_distilled_patch16_224", 64, VIT, 2),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 70, VIT, 5),
    "dinov3": ("vit_small_patch16_dinov3", 64, {**VIT, "num_heads": 2}, 5),
    "naflex": ("naflexvit_base_patch16_gap", 64, {**VIT, "class_token": True}, 5),
    "eva02": ("eva02_tiny_patch14_224", 70, VIT, 1),
    "beit": ("beit_base_patch16_224", 64, VIT, 1),
    "swin": (
        "swin_tiny_patch4_window7_224", 64,
        {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}, 0,
    ),
    "swinv2": (
        "swinv2_tiny_window8_256", 64,
        {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}, 0,
    ),
    "pvt": (
        "pvt_v2_b0", 64,
        {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2)}, 0,
    ),
    "xcit": ("xcit_nano_12_p16_224", 64, VIT, 1),
    "cait": ("cait_xxs24_224", 64, VIT, 1),
    "convnext": ("convnext_atto", 64, {"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 2)}, 0),
    "resnet": ("resnet18", 64, {}, 0),
    "mixer": ("mixer_s32_224", 64, {}, 0),
    "gmlp": ("gmlp_ti16_224", 64, {"block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp}, 0),
    "resmlp": ("resmlp_12_224", 64, {"block_layer": ResBlock, "norm_layer": Affine}, 0),
}  # fmt: skip
# An older version of timm has no DINOv3, and no NaFlexViT.
FAMILIES = {family: row for family, row in FAMILIES.items() if row[0] in timm.list_models()}
ATTENDING = [f for f in ("vit", "deit", "dinov2", "dinov3", "naflex", "eva02", "beit") if f in FAMILIES]
MIXING = ["mixer", "gmlp", "resmlp"]
CLASS_ATTENDING = ["xcit", "cait"]


def built(family: str, **options) -> nn.Module:
    """A small model of a family whose parameters are not at their first values."""
    name, side, small, _ = FAMILIES[family]
    torch.manual_seed(0)
    if family in MIXING:  # whose names take no other sizes
        model = mixer(family, **options)
        backbone = kind_of(model)(model, f"timm:{name}", side, 3)
    else:
        backbone = create_backbone(f"timm:{name}", **{"image_size": side, **small, **options})
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def mixer(family: str, **options) -> nn.Module:
    _, side, small, _ = FAMILIES[family]
    return MlpMixer(0, side, embed_dim=16, num_blocks=2, mlp_ratio=2, **small, **options)


def plain(family: str, state) -> nn.Module:
    """timm's own model of the same size, asked for nothing that the backbone asks for."""
    name, side, small, _ = FAMILIES[family]
    if family in MIXING:
        model = mixer(family)
        model.load_state_dict(state)
        return model.eval()
    size = {} if family in ("pvt", "convnext", "resnet") else {"img_size": side}
    model = timm.create_model(name, num_classes=0, **size, **small)
    model.load_state_dict(state)
    return model.eval()


def pictures(side: int, count: int = 2, **like) -> torch.Tensor:
    return torch.randn(
        count, 3, side, side, generator=torch.Generator().manual_seed(side), **like
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_its_own_size_it_gives_what_timm_gives(family):
    """Bit for bit, by timm's own names of the tensors."""
    backbone = built(family).eval()
    model = plain(family, backbone.state_dict())
    images = pictures(backbone.image_size)
    found, expected = backbone.encode(images), model.forward_features(images)
    assert torch.equal(found, expected)
    if family in ("vit", "deit", "dinov2", "xcit", "cait") or not backbone.num_prefix_tokens:
        assert torch.equal(backbone(images), model(images))
    else:  # timm's classifier takes the mean of the patches, and DINO the class token
        norm = model.fc_norm
        torch.testing.assert_close(backbone(images), norm(expected)[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_crops_of_other_sizes_pass(family):
    _, side, _, prefix = FAMILIES[family]
    backbone = built(family).eval()
    patch = backbone.patch_size
    sizes = [70, 42] if patch == 14 else [96, 32]
    backbone.require_sizes([side, *sizes])
    assert backbone.num_prefix_tokens == prefix
    assert isinstance(backbone, Backbone)
    for size in sizes:
        images = pictures(size)
        pooled, patches, grid = backbone.forward_features(images)
        assert grid == (size // patch,) * 2
        assert patches.shape == (2, grid[0] * grid[1], backbone.embed_dim)
        for each in (pooled, patches):
            assert each.isfinite().all() and not torch.allclose(each[0], each[1])
        torch.testing.assert_close(backbone(images), pooled)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
@torch.no_grad()
def test_windows_that_do_not_divide_a_grid_are_filled_up(family):
    """As their authors do: of 224 pixels the last stage is one window, of 96 a part of one."""
    small = {"depths": (1, 1, 1, 2), "num_heads": (1, 1, 1, 1), "window_size": 7}
    backbone = built(family, image_size=224, **small).eval()
    for size, side in ((224, 7), (96, 3), (64, 2), (252, 8)):
        pooled, patches, grid = backbone.forward_features(pictures(size))
        assert grid == (side, side) and patches.isfinite().all() and pooled.isfinite().all()
    name = FAMILIES[family][0]
    model = timm.create_model(name, num_classes=0, img_size=224, embed_dim=8, **small).eval()
    model.load_state_dict(backbone.state_dict())
    assert torch.equal(backbone(pictures(224)), model(pictures(224)))


@torch.no_grad()
def test_an_image_need_not_be_square():
    for family in ("vit", "eva02", "beit", "xcit", "cait", "gmlp", "swin"):
        backbone = built(family).eval()
        rows, columns = (56, 98) if family == "eva02" else (64, 96)
        grid = backbone.forward_features(torch.randn(2, 3, rows, columns)).grid
        assert grid == (rows // backbone.patch_size, columns // backbone.patch_size), family


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_earlier_blocks_end_as_the_last_one_does(family):
    """As though the model had no blocks after it."""
    backbone = built(family).eval()
    images = pictures(backbone.image_size)
    layers = backbone.get_intermediate_layers(images, backbone.depth)
    _, patches, _ = backbone.forward_features(images)
    assert len(layers) == backbone.depth >= 2
    torch.testing.assert_close(layers[-1][:, backbone.num_prefix_tokens :], patches)
    again = backbone.get_intermediate_layers(images, backbone.depth)
    assert all(map(torch.equal, layers, again)) and not torch.equal(layers[0], layers[-1])
    if family in ATTENDING:
        expected = backbone.model.forward_intermediates(
            images, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        norm = backbone.model.fc_norm
        for layer, parts in zip(layers, expected, strict=True):
            # Older versions of timm give no prefix tokens of a BEiT.
            patches, prefix = parts if isinstance(parts, tuple) else (parts, None)
            tokens = patches if prefix is None else torch.cat((prefix, patches), dim=1)
            torch.testing.assert_close(layer[:, -tokens.shape[1] :], norm(tokens))
    sentence = refusal(backbone.get_intermediate_layers, images, backbone.depth + 1)
    assert f"its last {backbone.depth} blocks" in sentence


# Attention


def by_hand(attention: nn.Module, x: torch.Tensor, rope, bias) -> torch.Tensor:
    """softmax(Q Kᵀ / √d + bias) of tokens, from the weights."""
    from timm.layers import apply_rot_embed_cat

    heads, prefix = attention.num_heads, getattr(attention, "num_prefix_tokens", 0)
    if attention.qkv is not None:
        weight, offset = attention.qkv.weight, attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            q_bias = attention.q_bias
            offset = torch.cat((q_bias, torch.zeros_like(q_bias), attention.v_bias))
        q, k, _ = nn.functional.linear(x, weight, offset).chunk(3, dim=-1)
    else:
        q, k = attention.q_proj(x), attention.k_proj(x)
    q, k = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        half = {"half": True} if getattr(attention, "rotate_half", False) else {}
        q, k = (
            torch.cat((y[:, :, :prefix], apply_rot_embed_cat(y[:, :, prefix:], rope, **half)), 2)
            for y in (q, k)
        )
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(dim=-1)


@pytest.mark.parametrize("family", ATTENDING)
@torch.no_grad()
def test_attention_is_the_softmax_by_hand(family):
    """Of any block, at any size, with queries and keys as that block has them."""
    options = {"qk_norm": True} if family == "vit" else {}
    backbone = built(family, **options).eval()
    assert isinstance(backbone, HasSelfAttention)
    assert all(block.attn.fused_attn for block in backbone.model.blocks)
    for size in (backbone.image_size, 84 if backbone.patch_size == 14 else 96):
        images = pictures(size)
        for block in (-1, 0, 1):
            chosen, seen = backbone.model.blocks[block].attn, []
            hook = chosen.register_forward_pre_hook(
                lambda _, arguments, options: seen.append((arguments[0], options)),  # noqa: B023
                with_kwargs=True,
            )
            maps = backbone.get_selfattention(images, block)
            hook.remove()
            x, given = seen[0]
            bias = chosen._get_rel_pos_bias() if family == "beit" else 0.0
            expected = by_hand(chosen, x, given.get("rope"), bias)
            tokens = (size // backbone.patch_size) ** 2 + backbone.num_prefix_tokens
            assert maps.shape == (2, 2, tokens, tokens)
            torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)
        assert torch.equal(backbone.get_last_selfattention(images), backbone.get_selfattention(images, 2))
    assert "no block 3" in refusal(backbone.get_selfattention, images, 3)


@torch.no_grad()
def test_a_map_is_there_though_fused_attention_is_off():
    backbone = built("vit").eval()
    images = pictures(64)
    expected = backbone.get_last_selfattention(images)
    backbone.model.blocks[-1].attn.fused_attn = False
    torch.testing.assert_close(backbone.get_last_selfattention(images), expected)
    assert backbone.model.blocks[-1].attn.fused_attn is False


@pytest.mark.parametrize("family", CLASS_ATTENDING)
@torch.no_grad()
def test_class_attention_is_the_softmax_by_hand(family):
    backbone = built(family).eval()
    assert isinstance(backbone, HasClassAttention) and not isinstance(backbone, HasSelfAttention)
    block = getattr(backbone.model, backbone.class_blocks)[-1]
    seen = []
    hook = block.attn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for size in (64, 96):
        maps = backbone.get_last_classattention(pictures(size))
        x, attention = seen[-1], block.attn
        q = attention.q(x[:, :1]).unflatten(2, (2, -1)).transpose(1, 2)
        k = attention.k(x).unflatten(2, (2, -1)).transpose(1, 2)
        expected = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)[:, :, 0]
        assert maps.shape == (2, 2, 1 + (size // 16) ** 2)
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)
    hook.remove()


def test_only_those_that_have_maps_offer_them():
    for family in FAMILIES:
        backbone = built(family)
        assert isinstance(backbone, HasSelfAttention) == (family in ATTENDING), family
        assert isinstance(backbone, HasClassAttention) == (family in CLASS_ATTENDING), family
        assert isinstance(backbone, HasTokenMixing) == (family in ("gmlp", "resmlp")), family


def test_what_there_is_to_see_of_each():
    seen = {family: available(built(family)) for family in FAMILIES}
    for family, kinds in seen.items():
        expected = ("similarity",)
        if family in ATTENDING:
            expected = ("attention", "rollout", *expected)
        elif family in CLASS_ATTENDING:
            expected = ("classattention", *expected)
        elif family in ("gmlp", "resmlp"):
            expected = ("mixing", *expected)
        assert kinds == expected, family


def test_rollout_goes_through_all_blocks():
    backbone = built("deit").eval()
    image = pictures(96)[0]
    row = rollout(backbone, image)
    assert row.shape == (1, 38)
    torch.testing.assert_close(row.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("registers", [0, 2])
def test_without_a_class_token_nobody_looks_at_the_patches(registers):
    """The first token is a patch then, or a register; its row would be shown as the whole's."""
    backbone = built("vit", class_token=False, global_pool="avg", reg_tokens=registers).eval()
    assert isinstance(backbone, HasSelfAttention)
    assert available(backbone) == ("similarity",)
    sentence = refusal(attention_maps, backbone, pictures(64)[0])
    assert "has no class token, which would look at the patches; --maps similarity" in sentence
    images = pictures(64)
    with torch.no_grad():  # and what is pooled are the patches
        pooled, patches, _ = backbone.forward_features(images)
        x = backbone.model.forward_features(images)[:, registers:]
        torch.testing.assert_close(pooled, backbone.model.fc_norm(x.mean(1)))
        torch.testing.assert_close(patches, backbone.model.fc_norm(x))


def test_class_attention_is_shown_head_by_head(tmp_path, capsys):
    name, side, small, _ = FAMILIES["xcit"]
    backbone = built("xcit").eval()
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    words = [f"{key}={value}" for key, value in small.items()]
    config = {"arch": f"timm:{name}", "arch_options": words, "global_crops_size": side}
    (tmp_path / "run").mkdir()
    torch.save({"teacher": state, "config": config}, tmp_path / "run/checkpoint.pth")
    save_image(tmp_path / "photo.png", 64, 64)
    out = tmp_path / "out"
    command = ["attention", str(tmp_path / "run"), "--image_path", str(tmp_path / "photo.png"),
               "--maps", "classattention", "--output_dir", str(out)]  # fmt: skip
    assert cli.main(command) == 0
    heads = {f"classattention-{which}.png" for which in ("head0", "head1", "mean")}
    assert {path.name for path in out.iterdir()} == heads | {
        "overlay-classattention.png", "img.png", "sheet.png", "patches.npz", "attention.json",
    }  # fmt: skip
    with Image.open(tmp_path / "photo.png") as image:
        seen = to_tensor(image)
    expected = classattention_maps(backbone, seen)
    with np.load(out / "patches.npz") as arrays:
        assert arrays.files == ["classattention"] and arrays["classattention"].shape == (2, 4, 4)
        np.testing.assert_array_equal(arrays["classattention"], expected)
    with Image.open(out / "classattention-mean.png") as one:
        drawn = heat(expected.numpy().mean(axis=0), (64, 64), colour_table())
        assert np.array_equal(np.asarray(one), np.asarray(drawn))
    capsys.readouterr()
    assert cli.main(command[:5] + ["attention"]) == 2
    assert "it takes classattention or similarity here." in capsys.readouterr().err
    assert "blocks in which the class token alone attends" in refusal(
        classattention_maps, built("vit"), seen
    )


# Token mixing, and tables of relative positions, on other grids


@pytest.mark.parametrize("family", MIXING)
@torch.no_grad()
def test_token_mixing_follows_the_grid(family):
    """U f(D x) of every block's mixing, where f is timm's at the native grid."""
    backbone = built(family).eval()
    module = {
        "mixer": lambda block: block.mlp_tokens,
        "gmlp": lambda block: block.mlp_channels.gate.proj,
        "resmlp": lambda block: block.linear_tokens,
    }[family](backbone.model.blocks[0])
    calls = []
    hook = module.register_forward_hook(lambda _, arguments, x: calls.append(x))
    down, up = resampling((6, 6), (4, 4)), resampling((4, 4), (6, 6))
    backbone(pictures(96))
    hook.remove()
    x = torch.randn(2, calls[0].shape[1], 36)
    f = type(module).forward
    expected = up(f(module, down(x.mT).mT).mT).mT
    torch.testing.assert_close(module(x), expected)
    backbone(pictures(64))  # and the native grid comes back
    y = torch.randn(2, calls[0].shape[1], 16)
    assert torch.equal(module(y), f(module, y))


@pytest.mark.parametrize("family", ["gmlp", "resmlp"])
@torch.no_grad()
def test_rows_of_the_mixing_matrix_say_what_a_patch_gets(family):
    backbone = built(family).eval()
    block = backbone.model.blocks[-1]
    module = block.mlp_channels.gate.proj if family == "gmlp" else block.linear_tokens
    assert torch.equal(backbone.get_last_mixing((4, 4)), module.weight)
    backbone(pictures(96))
    matrix = backbone.get_last_mixing((6, 6))
    x = torch.randn(2, 5, 36)
    got = module(x) - module(torch.zeros_like(x))
    torch.testing.assert_close(x @ matrix.T, got, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_beits_table_of_relative_positions_fits_any_grid():
    """What holds of all distances alike, and of the class token, stays; the middle is the middle."""
    attention = built("beit").model.blocks[0].attn
    attention.relative_position_bias_table.fill_(2.0)
    attention.relative_position_bias_table[-3:] = torch.tensor([3.0, 4.0, 5.0])[:, None]
    for grid in ((6, 6), (2, 3)):
        attention.grid = grid
        bias = attention._get_rel_pos_bias()[0, 0]
        assert bias.shape == (1 + grid[0] * grid[1],) * 2
        torch.testing.assert_close(bias[1:, 1:], torch.full_like(bias[1:, 1:], 2.0))
        assert (bias[0, 1:] == 3).all() and (bias[1:, 0] == 4).all() and bias[0, 0] == 5
    distances = attention.relative_position_bias_table[:-3].view(7, 7, 2)
    distances.copy_(torch.arange(-3.0, 4.0)[:, None, None].expand(7, 7, 2))
    attention.grid = (6, 6)
    bias = attention._get_rel_pos_bias()[0, 0, 1:, 1:].view(6, 6, 6, 6)
    torch.testing.assert_close(bias, -bias.permute(2, 3, 0, 1))  # odd, as the table is
    assert (bias.diagonal(dim1=0, dim2=2).abs() < 1e-5).all()


# Training


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_all_and_computing_again_changes_none(family):
    """Stochastic depth on, two sizes of crops, batch norms moved once."""
    backbone = built(family, drop_path_rate=0.5).train()
    rates = backbone.drop_path_rates
    assert rates and max(rates) == pytest.approx(0.5)
    sizes = (backbone.image_size, 42 if backbone.patch_size == 14 else 96)
    keeps = draw_keep(0, 0, torch.arange(4), 2, rates).unbind(1)
    assert not all(keep.all() for keep in keeps)
    state = copy.deepcopy(backbone.state_dict())
    found = []
    for again in (False, True):
        backbone.load_state_dict(state)
        backbone.zero_grad()
        backbone.checkpoint_activations = again
        before = torch.get_rng_state()
        sum(
            backbone(pictures(size, 4), keep).square().sum()
            for size, keep in zip(sizes, keeps, strict=True)
        ).backward()
        assert torch.equal(torch.get_rng_state(), before), "a number was drawn"
        missing = [name for name, p in backbone.named_parameters() if p.grad is None]
        assert not missing
        found.append([p.grad.clone() for p in backbone.parameters()]
                     + [buffer.clone() for buffer in backbone.buffers()])  # fmt: skip
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_tables_and_scales_do_not_decay(family):
    network = nn.Module()
    network.backbone = built(family)
    decayed, others = split_by_decay(network)
    by_name = dict(network.named_parameters())
    assert decayed and others
    words = ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table", "logit_scale", "temperature",
             "gamma", "alpha", "beta", "ls1", "cpb_mlp", "norm", "bias")  # fmt: skip
    for name in decayed:
        # A norm's name is also that of the convolution in PVT's reduction; those have matrices.
        assert not [word for word in words if word in name], name
        assert by_name[name].squeeze().ndim >= 2
    for name in others:
        exempt = by_name[name].squeeze().ndim <= 1 or any(word in name for word in words)
        assert exempt, name


@pytest.mark.skipif("dinov3" not in FAMILIES, reason="an older timm")
def test_what_draws_numbers_in_training_is_off():
    backbone = create_backbone(
        "timm:vit_small_patch16_dinov3", image_size=32, rope_rescale_coords=2.0, patch_drop_rate=0.5,
        attn_drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5, **VIT,
    ).train()  # fmt: skip
    before = torch.get_rng_state()
    images = pictures(32)
    assert torch.equal(backbone(images), backbone(images))
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_a_copy_and_a_pickle_are_backbones_of_their_own():
    for family in FAMILIES:
        backbone = built(family).eval()
        size = 42 if backbone.patch_size == 14 else 32
        expected = backbone(pictures(size))
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            backbone(pictures(backbone.image_size))  # whose grid is another one
            assert torch.equal(other(pictures(size)), expected), family


def test_blocks_of_other_parts_are_not_compiled():
    sentence = refusal(compile_blocks, built("swin"), torch.device("cpu"))
    assert sentence.startswith("--compile compiles a block's attention and MLP, and timm:swin_tiny")


def test_a_batch_norm_with_an_activation_keeps_it_when_synchronised():
    backbone = create_backbone("timm:efficientnet_b0", image_size=32)
    names = list(backbone.state_dict())
    activations = [type(m.act) for m in backbone.modules() if hasattr(m, "act")]
    shared = synchronised(backbone, torch.device("cuda"))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())
    assert [type(m.act) for m in shared.modules() if hasattr(m, "act")] == activations
    assert list(shared.state_dict()) == names


# Published weights


@pytest.mark.parametrize(
    ("family", "head"), [("vit", "head."), ("convnext", "head.fc."), ("resnet", "fc."),
                         ("deit", "head_dist.")],
)  # fmt: skip
def test_a_bare_state_dict_of_timm_loads_without_its_classifier(family, head, tmp_path):
    name, side, small, _ = FAMILIES[family]
    size = {"img_size": side} if family in ("vit", "deit") else {}
    model = timm.create_model(name, num_classes=3, **small, **size)
    state = model.state_dict()
    assert any(key.startswith(head) for key in state)
    path = tmp_path / "weights.pth"
    words = [f"{key}={list(v) if isinstance(v, tuple) else v}" for key, v in small.items()]
    torch.save(state, path)
    loaded = weights.load(path, arch=f"timm:{name}", arch_options=words) if not size else None
    if size:  # the side is the run's to say
        torch.save({"teacher": state, "config": {"global_crops_size": side}}, path)
        loaded = weights.load(path, arch=f"timm:{name}", arch_options=words)
    found = loaded.backbone.state_dict()
    assert set(found) <= set(state) and len(found) == loaded.matched
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_a_runs_checkpoint_keeps_a_norm_that_timm_has_in_the_head(tmp_path):
    backbone = built("convnext")
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    assert "backbone.head.norm.weight" in state
    state["head.last_layer.weight"] = torch.ones(2, 2)
    name, side, small, _ = FAMILIES["convnext"]
    words = [f"{key}={list(value)}" for key, value in small.items()]
    config = {"arch": f"timm:{name}", "arch_options": words, "global_crops_size": side}
    torch.save({"teacher": state, "config": config}, tmp_path / "checkpoint.pth")
    loaded = weights.load(tmp_path / "checkpoint.pth")
    assert all(map(torch.equal, loaded.backbone.state_dict().values(), backbone.state_dict().values()))


def test_published_names_of_an_xcit_are_understood(tmp_path):
    """As its authors and the reference publish it: one matrix of q, k, v; pos_embeder."""
    name, _, small, _ = FAMILIES["xcit"]
    backbone = built("xcit", image_size=224)
    state = {}
    for key, value in backbone.state_dict().items():
        if "cls_attn_blocks" in key and ".attn.q." in key:
            others = (key.replace(".q.", f".{letter}.") for letter in "kv")
            parts = [value, *(backbone.state_dict()[other] for other in others)]
            state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not ("cls_attn_blocks" in key and (".attn.k." in key or ".attn.v." in key)):
            state[key.replace("pos_embed.", "pos_embeder.")] = value
    state["head.weight"] = torch.ones(1000, 24)
    path = tmp_path / "xcit.pth"
    torch.save(state, path)
    words = [f"{key}={value}" for key, value in small.items()]
    loaded = weights.load(path, arch="xcit_nano_12_p16", arch_options=words)
    assert loaded.architecture["name"] == f"timm:{name}"
    for key, value in backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[key], value), key
    del state["norm.weight"]
    torch.save(state, path)
    sentence = refusal(weights.load, path, arch="xcit_nano_12_p16", arch_options=words)
    assert "lacks norm.weight" in sentence


# Building


def test_what_cannot_be_built_is_said_in_a_sentence():
    def said(name, **options):
        return refusal(create_backbone, f"timm:{name}", **options)

    with pytest.raises(UserError, match="did you mean vit_small_patch16_224.$"):
        create_backbone("timm:vit_smal_patch16_224")
    for hub in ("hf-hub:timm/x", "local-dir:/tmp", "resnet18.a1_in1k"):
        with pytest.raises(UserError, match=f"timm has no model '{hub}' here"):
            create_backbone(f"timm:{hub}")
    assert "unexpected keyword argument 'depht'" in said("resnet18", depht=3)
    assert "embed_dim is a part of what its name stands for" in said("resmlp_12_224", embed_dim=8)
    assert "is about weights" in said("resnet18", pretrained=True)
    assert "takes no option num_classes" in said("resnet18", num_classes=3)
    assert "divisible by patch size" in said("vit_tiny_patch16_224", image_size=64, patch_size=15)
    assert "drop_path_rate is 2.0" in said("resnet18", drop_path_rate=2.0)
    assert "no vector" in said("vit_tiny_patch16_224", image_size=32, global_pool="", class_token=False, **VIT)


def test_a_model_without_a_grid_of_patches_says_so():
    assert "neither tokens nor a map" in refusal(create_backbone, "timm:crossvit_tiny_240")
    assert "no grid of patches" in refusal(create_backbone, "timm:pit_ti_224")


def test_sizes_that_do_not_pass_are_refused_before_a_run():
    backbone = create_backbone("timm:eva02_tiny_patch14_224", image_size=70, **VIT)
    assert "near it, it takes 42, 56, 70, 84, 98" in refusal(backbone.require_sizes, [70, 96])
    sentence = refusal(backbone, torch.zeros(1, 3, 96, 96))
    assert "takes no images of 96 × 96 pixels" in sentence
    fixed = create_backbone("timm:convit_tiny", image_size=32, **VIT, local_up_to_layer=1)
    assert "near it, it takes 32" in refusal(fixed.require_sizes, [96])
    # Of global crops, too, whether timm refuses them when it builds or when it sees them.
    for name, options in (("xcit_nano_12_p16_224", VIT), ("eva02_tiny_patch14_224", VIT)):
        step = 14 if "eva02" in name else 16
        legal = ", ".join(str(step * n) for n in range(100 // step - 3, 100 // step + 5))
        sentence = refusal(create_backbone, f"timm:{name}", image_size=100, **options)
        assert sentence == (
            f"timm:{name} takes no images of 100 pixels a side; near it, it takes {legal}, 224."
        )
    # What timm does not refuse itself, but fails of.
    assert "takes no images of 96 × 96 pixels" in refusal(fixed, torch.zeros(1, 3, 96, 96))


def test_a_size_that_is_refused_without_a_reason_is_told_without_one(monkeypatch):
    """As HaloNet's attention does, by a bare assertion."""
    backbone = built("vit")
    monkeypatch.setattr(backbone.model, "forward_features", Mock(side_effect=AssertionError()))
    sentence = refusal(backbone, torch.zeros(1, 3, 96, 80))
    assert sentence == "timm:vit_tiny_patch16_224 takes no images of 96 × 80 pixels."


@pytest.mark.parametrize("family", MIXING)
@torch.no_grad()
def test_a_mixer_by_its_name(family):
    name, side, _, _ = FAMILIES[family]
    backbone = create_backbone(f"timm:{name}", image_size=side).eval()
    assert type(backbone) is type(built(family))
    assert backbone(pictures(96)).shape == (2, backbone.embed_dim)


# Those of no family above, each by what it asks for.
OTHERS = [
    "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "densenet121", "edgenext_xx_small",
    "mobilevit_xxs", "poolformer_s12", "hrnet_w18_small", "twins_svt_small", "davit_tiny",
    "focalnet_tiny_srf", "swinv2_cr_tiny_224", "vit_tiny_r_s16_p8_224", "vit_base_patch16_siglip_224",
    "samvit_base_patch16", "vit_pe_core_tiny_patch16_384", "repvit_m0_9", "naflexvit_base_patch16_gap",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_any_name_that_builds(name):
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    backbone = create_backbone(f"timm:{name}", image_size=64).eval()
    for size in (64, 96):
        images = pictures(size)
        pooled, patches, grid = backbone.forward_features(images)
        assert pooled.shape == (2, backbone.embed_dim) and pooled.isfinite().all()
        assert patches.shape == (2, grid[0] * grid[1], backbone.embed_dim)
        layers = backbone.get_intermediate_layers(images, backbone.depth)
        torch.testing.assert_close(layers[-1][:, backbone.num_prefix_tokens :], patches)
