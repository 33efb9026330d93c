"""``python:PACKAGE.MODULE:CALLABLE``: models that come by no name of ours."""

from __future__ import annotations

import sys
from collections import namedtuple

import pytest
import torch
from refusals import refusal
from torch import nn

import dino_kit
from dino_kit import log
from dino_kit.backbones import maps
from dino_kit.backbones.build import create_backbone, require_sizes
from dino_kit.backbones.interface import Backbone
from dino_kit.errors import UserError

_MODULE = '''
from torch import nn
import torch


class Net(nn.Module):
    def __init__(self, width=8, gives="map", img_size=32, channels=3, drop_path=0.0):
        super().__init__()
        self.made_for, self.rate, self.gives = img_size, drop_path, gives
        self.stem = nn.Conv2d(channels, width, 8, 8)
        self.mix = nn.Conv2d(width, width, 1)
        self.cls = nn.Parameter(torch.ones(1, 1, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.mix(self.stem(x))
        tokens = x.flatten(2).mT
        pooled = tokens.mean(1) * self.cls[:, 0]
        behind = torch.cat((self.cls.expand(len(x), -1, -1), tokens), 1)
        return {
            "map": lambda: x, "tokens": lambda: tokens, "behind": lambda: behind,
            "pooled": lambda: self.head(pooled), "pair": lambda: (pooled, tokens),
            "names": lambda: {"pooled": pooled, "patches": x},
            "states": lambda: {"last_hidden_state": behind, "pooler_output": pooled},
            "odd": lambda: torch.cat((behind, behind[:, :1]), 1), "text": lambda: "none",
            "many": lambda: (x, x, x), "flat": lambda: x.mean(),
        }[self.gives]()


def net(**options):
    model = Net(**options)
    model.head = nn.Identity()
    return model


def broken():
    return 1 / 0


def nothing():
    return 3


class Registers(Net):
    num_prefix_tokens = 2


def with_interface(image_size=32):
    from dino_kit import create_backbone
    return create_backbone("vit", embed_dim=8, depth=1, num_heads=2, patch_size=8,
                           image_size=image_size)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working folder, imported by nobody yet."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield name
    sys.modules.pop(name, None)


def said(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(log, "notice", told.append)
    return told


@pytest.mark.parametrize(
    ("gives", "prefix"),
    [("map", 0), ("tokens", 0), ("behind", 1), ("pair", 0), ("names", 0), ("states", 1)],
)
def test_what_a_model_gives_out_is_read_by_its_shape_or_name(module, gives, prefix):
    torch.manual_seed(0)
    backbone = create_backbone(f"python:{module}:net", image_size=32, gives=gives)
    assert isinstance(backbone, Backbone)
    assert (backbone.num_prefix_tokens, backbone.patch_size, backbone.embed_dim) == (prefix, 8, 8)
    net = backbone.model
    for height, width in ((32, 32), (16, 16), (16, 48)):
        images = torch.randn(2, 3, height, width)
        tokens = net.mix(net.stem(images)).flatten(2).mT
        features = backbone.forward_features(images)
        assert features.grid == (height // 8, width // 8)
        torch.testing.assert_close(features.patches, tokens)
        pooled = net.cls[:, 0].expand(2, -1) if prefix else tokens.mean(1)
        torch.testing.assert_close(features.pooled, pooled)
        torch.testing.assert_close(backbone(images), pooled)
        (output,) = backbone.get_intermediate_layers(images)
        assert output.shape == (2, prefix + tokens.shape[1], 8)
    assert "gives the outputs of its last 1 blocks" in refusal(
        backbone.get_intermediate_layers, images, 2
    )


def test_a_pooled_feature_alone_is_said_and_patches_are_refused(module, monkeypatch):
    told = said(monkeypatch)
    backbone = create_backbone(f"python:{module}:net", gives="pooled")
    assert len(told) == 1 and "gives no patches" in told[0]
    images = torch.randn(2, 3, 32, 32)
    assert backbone(images).shape == (2, 8)
    assert "gives no patches" in refusal(backbone.forward_features, images)
    assert maps.available(backbone) == ()
    (output,) = backbone.get_intermediate_layers(images)
    torch.testing.assert_close(output[:, 0], backbone(images))
    assert backbone.num_prefix_tokens == 1


def test_a_part_can_be_left_out_and_another_one_give_the_tokens(module):
    options = {"gives": "pooled", "image_size": 32}
    name = f"python:{module}:Net"
    assert create_backbone(name, **options).embed_dim == 5
    backbone = create_backbone(name, **options, without="head", tokens="mix")
    images = torch.randn(2, 3, 16, 16)
    features = backbone.forward_features(images)
    assert features.pooled.shape == (2, 8) and features.grid == (2, 2)
    torch.testing.assert_close(features.patches, backbone.model.mix(backbone.model.stem(images)).flatten(2).mT)
    assert not any(name.startswith("head") for name in backbone.state_dict())
    assert "has no part 'hed'; it has stem, mix, head" in refusal(
        create_backbone, name, **options, without=["hed"]
    )
    assert "has no part 'mx'" in refusal(create_backbone, name, **options, tokens="mx")


def test_size_channels_and_rate_go_by_the_signature_s_own_names(module):
    name = f"python:{module}:net"
    backbone = create_backbone(f"python:{module}:Net", image_size=16, in_chans=2, drop_path_rate=0.3)
    assert (backbone.model.made_for, backbone.model.rate) == (16, 0.3)
    assert backbone(torch.randn(1, 2, 16, 16)).shape == (1, 8)
    # A function that takes anything is given nothing that it does not name.
    assert create_backbone(name, image_size=16).model.made_for == 32
    assert create_backbone(f"python:{module}:Net").image_size == 32
    assert "takes no images of 32 pixels a side with 2 channels" in refusal(
        create_backbone, name, image_size=32, in_chans=2
    )


def test_what_the_pooled_feature_does_not_need_is_not_trained_and_said(module, monkeypatch):
    told = said(monkeypatch)
    backbone = create_backbone(f"python:{module}:Net", gives="tokens")
    still = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert still == {"model.cls", "model.head.weight", "model.head.bias"}
    assert "does not depend on cls, head.weight, head.bias" in told[0]


def test_a_model_that_has_the_interface_is_taken_as_it_is(module):
    backbone = create_backbone(f"python:{module}:with_interface", image_size=16)
    assert type(backbone).__name__ == "VisionTransformer"
    assert backbone.forward_features(torch.randn(1, 3, 16, 16)).grid == (2, 2)


def test_prefix_tokens_that_the_model_says_are_believed(module):
    backbone = create_backbone(f"python:{module}:Registers", gives="odd", image_size=24)
    assert backbone.num_prefix_tokens == 2
    assert backbone.forward_features(torch.randn(1, 3, 24, 24)).grid == (3, 3)


@pytest.mark.parametrize(
    ("call", "options", "sentence"),
    [
        ("nett", {}, None),
        ("broken", {}, "fails: ZeroDivisionError: division by zero ("),
        ("nothing", {}, "returns int, and a torch.nn.Module is needed"),
        ("Net", {"depth": 3}, "cannot be called with img_size, channels, drop_path, depth: got an"),
        ("net", {"gives": "odd"}, "gives 18 tokens for 32 × 32 pixels, which are no grid"),
        ("net", {"gives": "text"}, "gives out str, which no rule reads"),
        ("net", {"gives": "many"}, "gives out tuple, which no rule reads"),
        ("net", {"gives": "flat"}, "which no rule reads"),
    ],
)
def test_what_does_not_fit_is_refused(module, call, options, sentence):
    if sentence is None:
        with pytest.raises(UserError, match="has no callable nett; did you mean net"):
            create_backbone(f"python:{module}:{call}", image_size=32)
    else:
        assert sentence in refusal(create_backbone, f"python:{module}:{call}", image_size=32, **options)


def test_a_module_that_is_not_there_or_fails_is_refused(tmp_path, monkeypatch):
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'" in refusal(
        create_backbone, "python:no_such_module:Net"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "it_fails_at_once.py").write_text("x = 1\nraise KeyError('this')\n")
    sentence = refusal(create_backbone, "python:it_fails_at_once:Net")
    assert "KeyError: 'this' (" in sentence and "it_fails_at_once.py, line 2)" in sentence


def test_a_file_in_the_working_folder_hides_no_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "colorsys.py").write_text("raise SystemExit('it ran')\n")
    sys.modules.pop("colorsys", None)
    assert "has no callable Net" in refusal(create_backbone, "python:colorsys:Net")


Saved = namedtuple("Saved", "path backbone")


@pytest.fixture
def saved(module, tmp_path):
    """A checkpoint that says it is of a callable."""
    torch.manual_seed(0)
    backbone = create_backbone(f"python:{module}:net", image_size=32, gives="map", width=16)
    config = {"arch": f"python:{module}:net", "arch_options": ["gives=map", "width=16"],
              "global_crops_size": 32, "in_chans": 3}  # fmt: skip
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"teacher": state, "config": config}, path)
    sys.modules.pop(module)
    return Saved(path, backbone)


def test_a_checkpoint_is_read_when_the_callable_is_given_again(saved, module):
    again = dino_kit.load_backbone(saved.path, arch=f"python:{module}:net")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), saved.backbone.eval()(images))


def test_a_checkpoint_alone_imports_nothing(saved, module):
    assert f"give --arch python:{module}:net" in refusal(dino_kit.load_backbone, saved.path)
    assert module not in sys.modules
    assert "contradicts" in refusal(
        dino_kit.load_backbone, saved.path, arch=f"python:{module}:broken"
    )
    assert module not in sys.modules


# vit-pytorch

_VIT = {"patch_size": 8, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 32}


def test_a_vit_of_vit_pytorch_gives_pooled_feature_and_patches():
    pytest.importorskip("vit_pytorch")
    backbone = create_backbone(
        "python:vit_pytorch.vit:ViT", image_size=32, num_classes=1, without="mlp_head",
        tokens="transformer", **_VIT,
    ).eval()  # fmt: skip
    assert (backbone.num_prefix_tokens, backbone.embed_dim, backbone.patch_size) == (1, 16, 8)
    images = torch.randn(2, 3, 32, 32)
    (output,) = backbone.get_intermediate_layers(images)
    torch.testing.assert_close(output[:, 0], backbone(images))
    assert all(p.requires_grad for p in backbone.parameters())
    assert "takes no images of 40 pixels a side; near it, it takes 16, 24, 32" in refusal(
        require_sizes, backbone, [32, 16, 40]
    )


def test_a_simple_vit_of_vit_pytorch_is_of_one_size():
    pytest.importorskip("vit_pytorch")
    backbone = create_backbone(
        "python:vit_pytorch:SimpleViT", image_size=32, in_chans=4, num_classes=1,
        without="linear_head", tokens="transformer", **_VIT,
    )  # fmt: skip
    images = torch.randn(2, 4, 32, 32)
    features = backbone.forward_features(images)
    torch.testing.assert_close(features.pooled, features.patches.mean(1))
    require_sizes(backbone, [32])
    assert "takes no images of 16 pixels a side; near it, it takes 32; --local" in refusal(
        require_sizes, backbone, [32, 16], "; --local_crops_number 0 does without local crops"
    )
    assert not isinstance(backbone.model.linear_head, nn.Linear)
