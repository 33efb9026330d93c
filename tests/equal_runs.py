"""Ten steps on fixed crops, by one process or by each of several.

``python equal_runs.py FOLDER NAME…``, started by several processes, takes those of ``RUNS`` and
``POISONED``, and writes to the folder what came of each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dino_kit import distributed
from dino_kit.assemble import build_learner
from dino_kit.config.train import TrainConfig
from dino_kit.data.loader import _parts
from dino_kit.training.learner import Learner, MicroBatch

IMAGES, STEPS, STEPS_PER_EPOCH = 64, 10, 4
PLAIN = {
    "arch": "vit", "embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4,
    "global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 2, "out_dim": 64,
    "head_hidden_dim": 32, "head_bottleneck_dim": 16, "norm_last_layer": False,
    "drop_path_rate": 0.3, "epochs": 4, "warmup_epochs": 1, "lr": 0.02, "momentum_teacher": 0.9,
    "clip_grad": 0.05, "freeze_last_layer": 1, "total_batch_size": IMAGES, "device": "cpu",
    "batch_size_per_gpu": IMAGES, "data_path": "-", "output_dir": "-",
}  # fmt: skip
SINKHORN, FSDP = {"centering": "sinkhorn"}, {"fsdp": True}
SGD, PARTS, TWICE = {"optimizer": "sgd"}, {"batch_size_per_gpu": 16}, {"checkpoint_activations": True}
# What a batch norm takes away has a gradient of rounding, which AdamW makes steps of lr.
BN = {"use_bn_in_head": True, "lr": 0.005}
DEEPVIT = {"arch": "deepvit", "reattention_blocks": 2, **SGD}
# What two processes do, by name: settings beside PLAIN, and those of the run on one process that
# it has to follow.
RUNS = {
    "centre": ({}, {}),
    "centre, accumulated": (PARTS, {}),
    "centre, sharded": (FSDP, {}),
    "centre, sharded and accumulated": (FSDP | PARTS, {}),
    "centre, sharded, activations computed twice": (FSDP | TWICE, {}),
    "Sinkhorn-Knopp": (SINKHORN, SINKHORN),
    "Sinkhorn-Knopp, sharded": (SINKHORN | FSDP, SINKHORN),
    "batch norm": (BN, BN),
    "batch norm, sharded": (BN | FSDP, BN),
    "batch norm, SGD": (BN | SGD, BN | SGD),
    "DeepViT": (DEEPVIT, DEEPVIT),
    "DeepViT, activations computed twice": (DEEPVIT | TWICE, DEEPVIT),
    "DeepViT, sharded": (DEEPVIT | FSDP, DEEPVIT),
    "LARS, sharded": ({"optimizer": "lars"} | FSDP, {"optimizer": "lars"}),
    "SGD, sharded": (SGD | FSDP, SGD),
    "ResMLP, sharded": (
        {"arch": "resmlp", "num_heads": None} | FSDP, {"arch": "resmlp", "num_heads": None}
    ),
}  # fmt: skip
QUICK = (
    "centre", "centre, sharded and accumulated", "Sinkhorn-Knopp, sharded", "batch norm, SGD",
    "DeepViT, activations computed twice", "sharded, poisoned",
)  # fmt: skip
# A step on which the last process alone gets a bad batch.
POISONED = {"plain, poisoned": {}, "sharded, poisoned": FSDP, "batch norm, poisoned": BN,
            "DeepViT, poisoned": DEEPVIT}  # fmt: skip


def learner(**settings) -> Learner:
    config = TrainConfig(**{**PLAIN, **settings})
    # A DeepViT's norm divides by how little nearly level maps deviate, and shows what single precision
    # rounds in the fourth digit of the losses.
    torch.set_default_dtype(torch.float64 if config.arch == "deepvit" else torch.float32)
    try:
        one = build_learner(config, STEPS_PER_EPOCH, torch.device("cpu"), "fp32")
    finally:
        torch.set_default_dtype(torch.float32)
    if config.arch == "deepvit":
        one.centering.center = one.centering.center.float()  # as the loss is
    return one


def batches(step: int, most: int, dtype: torch.dtype) -> list[MicroBatch]:
    """This process's micro-batches of at most ``most`` images."""
    numbers = torch.Generator().manual_seed(step)
    groups = [torch.randn(2, IMAGES, 3, s, s, generator=numbers) for s in (16, 8)]
    places = _parts(IMAGES, distributed.rank(), distributed.world_size(), most)
    return [
        MicroBatch([group[:, part].to(dtype) for group in groups], torch.from_numpy(part))
        for part in places
    ]


def dtype_of(one: Learner) -> torch.dtype:
    return next(one.student.parameters()).dtype


def follow(one: Learner, most: int = IMAGES, steps: range = range(STEPS)) -> list[float]:
    """Take the steps; returns their losses over all processes."""
    losses = []
    for step in steps:
        outcome = one.step(step, batches(step, most, dtype_of(one)))
        assert outcome.committed
        losses.append(distributed.all_reduce_mean(outcome.measured["loss"]).item())
    return losses


def poisoned_step_changes_nothing(**settings) -> bool:
    """Whether a step that is bad on the last process alone leaves all as it was, on every one."""
    one = learner(**settings)
    follow(one, steps=range(3))
    tensors = [*one.student.state_dict().values(), *one.teacher.state_dict().values()]
    tensors += [value for state in one.optimizer.state.values() for value in state.values()]
    tensors = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]
    before = [tensor.clone() for tensor in tensors]
    bad = batches(3, IMAGES, dtype_of(one))
    if distributed.rank() == distributed.world_size() - 1:
        bad[0].groups[0][0, 0] = float("nan")
    assert not one.step(3, bad).committed
    same = all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    return same and one.step(4, batches(4, IMAGES, dtype_of(one))).committed


def run(folder: Path, name: str, settings: dict) -> None:
    if name in POISONED:
        verdict = poisoned_step_changes_nothing(**settings)
        (folder / f"{name} {distributed.rank()}.txt").write_text(str(verdict))
        return
    one = learner(**settings)
    losses = follow(one, settings.get("batch_size_per_gpu", IMAGES))
    held = sum(p.numel() for p in one.student.parameters())
    if settings.get("fsdp"):
        held = sum(p.to_local().numel() for p in one.student.parameters())
    backbone = one.teacher_backbone()
    state = one.state_dict()
    if distributed.is_main():
        written = {"losses": losses, "held": held, "backbone": backbone.state_dict(), **state}
        torch.save(written, folder / f"{name}.pth")


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    for name in names:
        settings = POISONED[name] if name in POISONED else RUNS[name][0]
        run(folder, name, settings)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
