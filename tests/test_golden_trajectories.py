"""Eight optimiser steps of the reference, taken by our own step."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dino_kit.backbones.vit import VisionTransformer
from dino_kit.heads import DINOHead
from dino_kit.objectives.centering import Center
from dino_kit.student_teacher import build_student_teacher
from dino_kit.training import optim
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.plan import plan_epochs

RUNS = ["trajectory_adamw", "trajectory_adamw_free_g", "trajectory_lars_bn", "trajectory_sgd"]


def state(arrays, prefix):
    return {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def build(config, initial):
    def backbone(drop_path_rate=0.0):
        sizes = dict(config["backbone"])
        sizes.pop("qkv_bias")
        eps = sizes.pop("layer_norm_eps")
        assert eps == 1e-6
        return VisionTransformer(
            image_size=sizes.pop("img_size"), drop_path_rate=drop_path_rate, **sizes
        )

    def head(norm_last_layer):
        options = dict(config["head"]) | {"norm_last_layer": norm_last_layer}
        return DINOHead(config["backbone"]["embed_dim"], **options)

    student, teacher = build_student_teacher(
        backbone(), head(config["head"]["norm_last_layer"]), backbone(), head(True)
    )
    student.load_state_dict(initial)
    teacher.load_state_dict(initial)
    return student, teacher


def close(name, ours, theirs, backbone):
    """Equal to 1e-4 of the tensor's norm, the key third of a qkv bias left out."""
    if name.endswith("attn.qkv.bias"):
        width = backbone["embed_dim"]
        keep = np.r_[0:width, 2 * width : 3 * width]
        ours, theirs = ours[keep], theirs[keep]
    difference = torch.linalg.vector_norm((ours - theirs).double())
    assert difference <= 1e-4 * torch.linalg.vector_norm(theirs.double()) + 1e-12, name


@pytest.mark.parametrize("run", RUNS)
def test_golden_trajectory(golden, run):
    arrays = golden(run)
    config = json.loads(str(arrays["config"]))
    student, teacher = build(config, state(arrays, "init/"))
    groups = optim.parameter_groups(student)
    regularised = [name for name, p in student.named_parameters() if any(p is q for q in groups[0]["params"])]
    assert sorted(regularised) == sorted(config["regularised"])
    learner = Learner(
        student,
        teacher,
        Center(config["head"]["out_dim"]),
        optim.build_optimizer(config["optimizer"], groups),
        plan_epochs(
            epochs=config["epochs"],
            steps_per_epoch=config["steps_per_epoch"],
            lr=config["lr"],
            min_lr=config["min_lr"],
            warmup_epochs=config["warmup_epochs"],
            weight_decay=config["weight_decay"],
            weight_decay_end=config["weight_decay_end"],
            momentum=config["momentum_teacher"],
            warmup_teacher_temp=config["warmup_teacher_temp"],
            teacher_temp=config["teacher_temp"],
            warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"],
            freeze_last_layer=config["freeze_last_layer"],
        ),
        clip_grad=config["clip_grad"],
    )
    for step in range(config["epochs"] * config["steps_per_epoch"]):
        crops = [torch.from_numpy(arrays[f"step{step}/crop{i}"])
                 for i in range(2 + config["local_crops_number"])]
        views = [torch.stack(group) for group in (crops[:2], crops[2:]) if group]
        batch = MicroBatch(views, torch.arange(len(crops[0])))
        outcome = learner.step(step, [batch])
        assert outcome.committed
        assert abs(outcome.measured["loss"].item() - float(arrays[f"step{step}/loss"])) <= 1e-4
        center = learner.state_dict()["dino_loss"]["center"]
        np.testing.assert_allclose(center, arrays[f"step{step}/center"], atol=1e-4)
    for network, prefix in ((student, "final_student/"), (teacher, "final_teacher/")):
        final = state(arrays, prefix)
        own = network.state_dict()
        assert own.keys() == final.keys()
        for name, theirs in final.items():
            close(name, own[name], theirs, config["backbone"])
