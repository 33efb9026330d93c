"""One test of all backbones: each family is built, trained, written down and read alike.

A new family is a row or two of ``ROWS``, at a width that is quick, and one of ``COUNTS`` if its
authors tell its size. The first row of a family runs among the quick tests, the others among the slow.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_kit import weights
from dino_kit.assemble import build_learner
from dino_kit.backbones import products
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.interface import Backbone, HasSelfAttention
from dino_kit.config import fields
from dino_kit.config.train import TrainConfig
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.optim import split_by_decay

CPU = torch.device("cpu")


class Row(NamedTuple):
    """A backbone as a command line has it."""

    arch: str
    flags: Mapping[str, Any] = MappingProxyType({})
    options: tuple[str, ...] = ()  # words of --arch_options
    sizes: tuple[int, int, int] = (32, 16, 48)  # global and local crops, and another
    patch: int = 8  # pixels of the side that a patch, or a place of the last map, stands for
    prefix: int = 0
    has_depth: bool = True  # stochastic depth of its own

    @property
    def config(self) -> TrainConfig:
        own = {"arch": self.arch, **self.flags}
        if self.options:
            own["arch_options"] = list(self.options)
        crops = {"global_crops_size": self.sizes[0], "local_crops_size": self.sizes[1]}
        head = {"out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
        plan = {"drop_path_rate": 0.3, "batch_size_per_gpu": 4, "total_batch_size": 4, "epochs": 2,
                "warmup_epochs": 1, "warmup_teacher_temp_epochs": 0, "lr": 0.1}  # fmt: skip
        read = {**own, **crops, **head, **plan, "data_path": "x", "output_dir": "y"}
        return fields.create(TrainConfig, read)


def _sized(patch_size: int = 8, **sizes: int) -> dict[str, Any]:
    return {"patch_size": patch_size, "embed_dim": 24, "depth": 2, **sizes}


_BY_32 = {"sizes": (64, 32, 96), "patch": 32}  # what halves an image five times
_BY_16 = {"sizes": (64, 32, 96), "patch": 16}
_BY_14 = {"sizes": (56, 28, 84), "patch": 14}
_VIT = ("embed_dim=32", "depth=2", "num_heads=2")
_STAGES = ("embed_dim=24", "depths=[1,2]", "num_heads=[2,4]", "window_size=4")
_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_HF_STAGES = {"depths": [1, 2], "image_size": 32, "patch_size": 4}
# What stands in the folder of an hf:NAME below.
CONFIGURATIONS = {
    "vit": _HF,
    "deit": _HF,
    "dinov2": _HF,
    "dinov2_with_registers": {**_HF, "num_register_tokens": 4},
    "dinov3_vit": {**_HF, "num_register_tokens": 4},
    "beit": {**_HF, "use_relative_position_bias": True},
    "swin": {**_HF_STAGES, "embed_dim": 12, "num_heads": [2, 4], "window_size": 4},
    "convnext": {**_HF_STAGES, "hidden_sizes": [8, 16], "num_stages": 2},
}
ROWS = {
    "own vit": [
        Row("vit", _sized(num_heads=2), prefix=1),
        Row("vit", _sized(num_heads=2), ("num_register_tokens=4", "layer_scale=0.1"), prefix=5),
    ],
    "own deepvit": [
        Row("deepvit", _sized(num_heads=2, reattention_blocks=1), prefix=1),
        Row("deepvit", _sized(num_heads=2), prefix=1),
    ],
    "own resmlp": [
        Row("resmlp", _sized()),
        Row("resmlp", {**_sized(), "mlp_grid": "resize"}),
    ],
    "own t2t_vit": [Row("t2t_vit", {"embed_dim": 24, "depth": 2, "num_heads": 2}, **_BY_16, prefix=1)],
    "own cswin": [
        Row("cswin", {"embed_dim": 8}, ("depths=[1,1,2,1]", "heads=[2,2,4,4]"), **_BY_32),
    ],
    "torchvision": [
        Row("torchvision:resnet18", **_BY_32, has_depth=False),
        Row("resnet50", **_BY_32, has_depth=False),
        Row("torchvision:swin_t", **_BY_32),
        Row("torchvision:convnext_tiny", **_BY_32),
        Row("torchvision:vit_b_32", **_BY_32, prefix=1, has_depth=False),
    ],
    "timm": [
        Row("timm:deit_tiny_patch16_224", options=_VIT, **_BY_16, prefix=1),
        Row("timm:deit_tiny_distilled_patch16_224", options=_VIT, **_BY_16, prefix=2),
        Row("timm:swin_tiny_patch4_window7_224", options=_STAGES, **{**_BY_32, "patch": 8}),
        Row("timm:swinv2_tiny_window8_256", options=_STAGES, **{**_BY_32, "patch": 8}),
        Row("timm:pvt_v2_b0", options=("depths=[1,1,1,1]", "embed_dims=[8,16,40,64]"), **_BY_32),
        Row("xcit_nano_12_p16", options=_VIT, **_BY_16, prefix=1),
        Row("timm:cait_xxs24_224", options=_VIT, **_BY_16, prefix=1),
        Row("timm:convnext_atto", options=("depths=[1,1,1,1]", "dims=[8,8,16,16]"), **_BY_32),
        Row("timm:resnet10t", **_BY_32),
        Row("timm:mixer_s32_224", **_BY_32),
        Row("timm:gmlp_ti16_224", **_BY_16),
        Row("timm:resmlp_12_224", **_BY_16),
        Row("timm:eva02_tiny_patch14_224", options=_VIT, **_BY_14, prefix=1),
        Row("timm:vit_small_patch14_dinov2", options=_VIT, **_BY_14, prefix=1),
        Row("timm:vit_small_patch16_dinov3", options=_VIT, **_BY_16, prefix=5),
    ],
    "hf": [
        Row("hf:vit", prefix=1),
        Row("hf:deit", prefix=2),
        Row("hf:dinov2", prefix=1),
        Row("hf:dinov2_with_registers", prefix=5),
        Row("hf:dinov3_vit", prefix=5),
        Row("hf:beit", prefix=1),
        Row("hf:swin"),
        Row("hf:convnext"),
    ],
    "python": [
        Row(
            "python:vit_pytorch.vit:ViT",
            options=(
                "patch_size=8", "dim=16", "depth=2", "heads=2", "dim_head=8", "mlp_dim=32",
                "num_classes=1", "without=mlp_head", "tokens=transformer",
            ),
            sizes=(32, 16, 24),  # it has positions for images as large as its own, and no larger
            prefix=1,
            has_depth=False,
        ),
    ],
}  # fmt: skip
# Parameters that the pooled feature depends on, and that no gradient need reach, with the reason.
UNREACHED: dict[str, tuple[str, ...]] = {}
_NEEDS = {"hf": "transformers", "python": "vit_pytorch"}  # optional packages


def _cases() -> list[Any]:
    return [
        pytest.param(
            row,
            id=f"{row.arch} {number}" if number and row.arch == rows[number - 1].arch else row.arch,
            marks=[
                *([pytest.mark.slow] if number else []),
                pytest.mark.skipif(
                    family in _NEEDS and importlib.util.find_spec(_NEEDS[family]) is None,
                    reason=f"needs {_NEEDS.get(family)}",
                ),
            ],
        )
        for family, rows in ROWS.items()
        for number, row in enumerate(rows)
    ]


every_row = pytest.mark.parametrize("row", _cases())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with the folders that the rows of hf name."""
    for kind, said in CONFIGURATIONS.items():
        (tmp_path / kind).mkdir()
        text = json.dumps({"model_type": kind, **said})
        (tmp_path / kind / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def learner(here, row) -> Learner:
    return build_learner(row.config, 3, CPU, "fp32")


def _images(size: int, images: int = 3) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(size)
    return torch.randn(images, 3, size, size, generator=numbers)


def _batch(row: Row, step: int) -> MicroBatch:
    numbers = torch.Generator().manual_seed(step)
    groups = [torch.randn(2, 4, 3, size, size, generator=numbers) for size in row.sizes[:2]]
    return MicroBatch(groups, torch.arange(4))


@every_row
def test_shapes_at_three_sizes(row, learner):
    backbone = learner.student.backbone.eval()
    assert isinstance(backbone, Backbone)
    assert (backbone.patch_size, backbone.num_prefix_tokens) == (row.patch, row.prefix)
    width = backbone.embed_dim
    for size in row.sizes:
        images = _images(size)
        with torch.no_grad():
            pooled, patches, (h, w) = backbone.forward_features(images)
            layers = backbone.get_intermediate_layers(images, backbone.depth)
            assert pooled.shape == (3, width)
            assert patches.shape == (3, h * w, width) and h == w
            assert [layer.shape for layer in layers] == [(3, row.prefix + h * w, width)] * backbone.depth
            torch.testing.assert_close(backbone(images), pooled, atol=1e-5, rtol=1e-4)
            if isinstance(backbone, HasSelfAttention):
                maps = backbone.get_last_selfattention(images)
                assert maps.shape[2:] == (row.prefix + h * w, row.prefix + h * w)
                torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))
        # Another image is another feature.
        assert torch.isfinite(pooled).all()
        assert torch.pdist(pooled).min() > 1e-6 * pooled.norm(dim=1).max()


@every_row
def test_gradients_reach_every_parameter_that_requires_one(row, learner):
    backbone = learner.student.backbone
    with torch.no_grad():  # away from first weights, of which some close a branch by zeros
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for size in row.sizes[:2]:
        pooled = backbone(_images(size))
        (pooled * torch.randn(pooled.shape[1], generator=torch.Generator().manual_seed(0))).sum().backward()
    wanted = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    unreached = {name for name, p in wanted.items() if p.grad is None}
    assert unreached == set(UNREACHED.get(row.arch, ()))
    assert all(p.grad.isfinite().all() for name, p in wanted.items() if name not in unreached)
    # What is a matrix is moved by it, too.
    still = [name for name, p in wanted.items() if p.squeeze().ndim > 1 and not p.grad.any()]
    assert not still


@every_row
def test_three_steps_of_training_and_a_checkpoint_of_them(row, learner, here):
    student, teacher = learner.student.state_dict(), learner.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    rates = learner.student.backbone.drop_path_rates
    assert (max(rates, default=0.0) == pytest.approx(0.3)) == row.has_depth
    assert not any(learner.teacher.backbone.drop_path_rates)

    before = {name: p.detach().clone() for name, p in learner.student.named_parameters()}
    for step in range(3, 6):  # after the epoch whose last layer is frozen
        outcome = learner.step(step, [_batch(row, step)])
        assert outcome.committed and torch.isfinite(outcome.measured["loss"])
    moved = {name for name, p in learner.student.named_parameters() if not torch.equal(p, before[name])}
    wanted = {name for name, p in learner.student.named_parameters() if p.requires_grad}
    assert moved == wanted - {f"backbone.{name}" for name in UNREACHED.get(row.arch, ())}

    state = {**learner.state_dict(), "config": fields.to_plain(row.config)}
    torch.save(state, here / "checkpoint.pth")
    given = {"arch": row.arch} if row.arch.startswith("python:") else {}
    for which, network in (("student", learner.student), ("teacher", learner.teacher)):
        loaded = weights.load(here / "checkpoint.pth", which, **given)
        own = network.backbone.state_dict()
        assert loaded.matched == len(own) == len(loaded.backbone.state_dict())
        with torch.no_grad():
            expected = network.backbone.eval()(_images(row.sizes[0]))
            assert torch.equal(loaded.backbone(_images(row.sizes[0])), expected)


@every_row
def test_the_same_seed_gives_the_same_numbers(row, learner):
    again = build_learner(row.config, 3, CPU, "fp32")
    for one in (learner, again):
        one.step(3, [_batch(row, 3)])
    ours, theirs = learner.student.state_dict(), again.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_row
def test_no_vector_decays(row, learner):
    decayed, others = split_by_decay(learner.student)
    trainable = {name for name, p in learner.student.named_parameters() if p.requires_grad}
    assert {*decayed, *others} == trainable and not decayed.keys() & others.keys()
    own = ":" not in row.config.arch
    for name, parameter in decayed.items():
        # Of our own the class token decays, as the reference's does.
        vector = parameter.ndim <= 1 if own else parameter.squeeze().ndim <= 1
        assert not vector or "last_layer" in name, name
    assert any(name.startswith("backbone.") for name in decayed)


class Count(NamedTuple):
    """What the authors print, with a classifier of 1,000 classes, of images of 224."""

    arch: str
    parameters: float  # millions
    multiply_adds: float  # thousands of millions


COUNTS = {
    "own": [
        Count("vit_small", 22.1, 4.6),
        Count("vit_tiny", 5.7, 1.3),
        Count("vit_base", 86.6, 17.5),
        Count("resmlp_s12", 15.4, 3.0),
        Count("resmlp_s24", 30.0, 6.0),
        Count("vit_large", 304.3, 61.6),
        Count("deepvit_s", 27.3, 6.2),
        Count("deepvit_l", 58.9, 12.5),
        Count("t2t_vit_7", 4.3, 1.1),
        Count("t2t_vit_14", 21.5, 4.8),
        Count("t2t_vit_24", 64.1, 13.8),
        Count("cswin_tiny", 22.3, 4.3),
        Count("cswin_small", 34.6, 6.9),
        Count("cswin_base", 77.4, 15.0),
        Count("cswin_large", 173.3, 31.5),
    ],
    "torchvision": [
        Count("resnet50", 25.6, 4.1),
        Count("swin_t", 28.3, 4.5),
        Count("convnext_tiny", 28.6, 4.5),
        Count("vit_b_16", 86.6, 17.6),
    ],
    "timm": [
        Count("xcit_small_12_p16", 26.3, 4.8),
        Count("timm:mixer_b16_224", 59.9, 12.6),
        Count("timm:gmlp_s16_224", 19.4, 4.4),
        Count("timm:swin_tiny_patch4_window7_224", 28.3, 4.5),
        Count("timm:cait_xxs24_224", 12.0, 2.5),
    ],
}


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(count, id=count.arch, marks=[pytest.mark.slow] if number else [])
        for library, counts in COUNTS.items()
        for number, count in enumerate(counts)
    ],
)
def test_parameters_and_multiply_adds_are_the_published_ones(count, monkeypatch):
    """Multiply-adds are half of what PyTorch's FlopCounterMode counts: matrix products, convolutions."""
    # Where products are fused with what follows, or go to another library, it does not see them.
    monkeypatch.setattr(products, "_prefers_onednn", lambda: False)
    # No autocast is known of the device without memory, on which all is counted and nothing computed.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        backbone = create_backbone(count.arch).eval()
        images = torch.zeros(1, 3, 224, 224)
        classifier = nn.Linear(backbone.embed_dim, 1000)
    backbone.requires_grad_(False)  # or the counter would follow what has no backward pass
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        classifier(backbone.forward_features(images).pooled)
    parameters = sum(p.numel() for part in (backbone, classifier) for p in part.parameters())
    assert parameters / 1e6 == pytest.approx(count.parameters, rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(count.multiply_adds, rel=0.1)
