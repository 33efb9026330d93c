"""The pair of networks and their pass over crops of several sizes."""

from __future__ import annotations

import pytest
import torch

from dino_kit.backbones.stochastic_depth import draw_keep
from dino_kit.backbones.vit import VisionTransformer
from dino_kit.heads import DINOHead
from dino_kit.student_teacher import build_student_teacher


def pair(use_bn=False, rate=0.0, norm_last_layer=True):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    head = {"in_dim": 24, "out_dim": 32, "use_bn": use_bn, "hidden_dim": 20, "bottleneck_dim": 12}
    return build_student_teacher(
        VisionTransformer(**sizes, drop_path_rate=rate),
        DINOHead(**head, norm_last_layer=norm_last_layer),
        VisionTransformer(**sizes),
        DINOHead(**head),
    )


def crops(batch=3, global_crops=2, local_crops=4):
    torch.manual_seed(1)
    return [torch.randn(global_crops, batch, 3, 16, 16), torch.randn(local_crops, batch, 3, 8, 8)]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_logits_come_crop_by_crop(rate):
    network = pair(rate=rate).student
    groups = crops()
    keep = draw_keep(0, 0, torch.arange(3), 6, network.backbone.drop_path_rates)
    logits = network(groups, list(keep.split([2, 4], dim=1)) if rate else None)
    assert logits.shape == (6, 3, 32)
    views = [view for group in groups for view in group]
    for view, images in enumerate(views):
        features = network.backbone(images, keep[:, view] if rate else None)
        torch.testing.assert_close(logits[view], network.head(features), rtol=1e-5, atol=1e-6)


def test_the_backbone_runs_once_per_size_and_the_head_once():
    network = pair().student
    seen = {"backbone": [], "head": []}
    network.backbone.register_forward_hook(lambda m, x, y: seen["backbone"].append(len(y)))
    network.head.register_forward_hook(lambda m, x, y: seen["head"].append(len(y)))
    network(crops())
    assert seen == {"backbone": [6, 12], "head": [18]}


def test_a_batch_norm_in_the_head_mixes_crops_of_all_sizes():
    network = pair(use_bn=True).student
    hidden = []
    network.head.mlp[0].register_forward_hook(lambda m, x, y: hidden.append(y))
    network(crops())
    torch.testing.assert_close(network.head.mlp[1].running_mean, 0.1 * hidden[0].mean(0))


def test_global_crops_alone():
    student, teacher = pair()
    assert teacher(crops()[:1]).shape == student(crops()[:1]).shape == (2, 3, 32)


@pytest.mark.parametrize("use_bn", [False, True])
def test_the_teacher_starts_as_the_student_and_gets_no_gradients(use_bn):
    student, teacher = pair(use_bn, norm_last_layer=False)
    assert list(student.state_dict()) == list(teacher.state_dict())
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name
    pointers = {value.data_ptr() for value in student.state_dict().values()}
    assert not pointers & {value.data_ptr() for value in teacher.state_dict().values()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not teacher(crops()[:1]).requires_grad


def test_both_networks_train_and_keep_their_own_statistics():
    student, teacher = pair(use_bn=True)
    assert all(module.training for net in (student, teacher) for module in net.modules())
    student(crops())
    assert not torch.equal(student.head.mlp[1].running_mean, teacher.head.mlp[1].running_mean)
    assert teacher.head.mlp[1].num_batches_tracked == 0


def test_gradients_reach_every_trained_parameter():
    student = pair(use_bn=True, norm_last_layer=False).student
    logits = student(crops())
    (logits * torch.randn_like(logits)).sum().backward()
    assert not [name for name, p in student.named_parameters() if p.grad is None]
