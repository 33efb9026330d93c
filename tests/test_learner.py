"""The optimiser step: all or nothing, and the same however its images are split."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from dino_kit import sharding
from dino_kit.backbones.build import create_backbone
from dino_kit.heads import DINOHead
from dino_kit.objectives.centering import CENTERINGS
from dino_kit.student_teacher import build_student_teacher
from dino_kit.training import optim
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.plan import plan_epochs
from dino_kit.training.precision import LossScale

IMAGES, PROTOTYPES = 16, 32


ARCHITECTURES = {
    "vit": {"num_heads": 2},
    "vit, registers": {"num_heads": 2, "num_register_tokens": 3, "layer_scale": 0.1},
    "resmlp": {},
    "resmlp, resized": {"mlp_grid": "resize"},
    "deepvit": {"num_heads": 2, "reattention_blocks": 2},
}


def learner(
    centering="center", optimizer="adamw", drop_path_rate=0.3, use_bn=False, arch="vit", **options
):
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "image_size": 16, "embed_dim": 24, "depth": 3, **ARCHITECTURES[arch]}
    arch = arch.partition(",")[0]
    backbone = create_backbone(arch, drop_path_rate=drop_path_rate, **sizes)
    head = {"use_bn": use_bn, "hidden_dim": 32, "bottleneck_dim": 16}
    student, teacher = build_student_teacher(
        backbone,
        DINOHead(24, PROTOTYPES, norm_last_layer=False, **head),
        create_backbone(arch, **sizes),
        DINOHead(24, PROTOTYPES, **head),
    )
    plan = plan_epochs(
        epochs=3, steps_per_epoch=2, lr=0.01, min_lr=1e-6, warmup_epochs=1, weight_decay=0.04,
        weight_decay_end=0.4, momentum=0.9, warmup_teacher_temp=0.04, teacher_temp=0.07,
        warmup_teacher_temp_epochs=2, freeze_last_layer=1,
    )  # fmt: skip
    return Learner(
        student,
        teacher,
        CENTERINGS[centering](PROTOTYPES),
        optim.build_optimizer(optimizer, optim.parameter_groups(student)),
        plan,
        seed=3,
        **options,
    )


def batch(step: int, images: int = IMAGES) -> MicroBatch:
    numbers = torch.Generator().manual_seed(step)
    groups = [torch.randn(v, images, 3, s, s, generator=numbers) for v, s in ((2, 16), (3, 8))]
    return MicroBatch(groups, torch.arange(images))


def split(whole: MicroBatch, sizes: list[int]) -> list[MicroBatch]:
    groups = zip(*(group.split(sizes, dim=1) for group in whole.groups), strict=True)
    return [
        MicroBatch(list(parts), places)
        for parts, places in zip(groups, whole.places.split(sizes), strict=True)
    ]


def everything(one: Learner) -> dict:
    return copy.deepcopy(one.state_dict())


def assert_same(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_close(name: str, one: torch.Tensor, other: torch.Tensor, width: int = 24) -> None:
    if name.endswith("attn.qkv.bias"):  # the key's part has no true gradient
        one, other = (torch.cat((x[:width], x[2 * width :])) for x in (one, other))
    one, other = one.double(), other.double()
    assert (one - other).norm() <= 1e-4 * other.norm() + 1e-12, name


@pytest.mark.parametrize(
    "arch, centering",
    [("vit", "center"), ("vit", "sinkhorn"), ("vit, registers", "center"), ("resmlp", "center"),
     ("resmlp, resized", "center")],
)
@pytest.mark.parametrize("sizes", [[8, 8], [6, 5, 5], [1] * IMAGES])
def test_accumulation_is_the_same_run(arch, centering, sizes):
    whole, parts = learner(centering, arch=arch), learner(centering, arch=arch)
    for step in range(6):
        a = whole.step(step, [batch(step)])
        b = parts.step(step, split(batch(step), sizes))
        assert a.measured["loss"].item() == pytest.approx(b.measured["loss"].item(), abs=1e-5)
    for network in ("student", "teacher"):
        own, other = whole.state_dict()[network], parts.state_dict()[network]
        for name in own:
            assert_close(name, other[name], own[name])
    torch.testing.assert_close(
        whole.state_dict()["dino_loss"]["center"], parts.state_dict()["dino_loss"]["center"]
    )


class Parallel:
    """A student that notes whether its gradients are to be summed up over the processes."""

    def __init__(self, student):
        self.student, self.local, self.summed = student, False, []

    def __call__(self, *inputs):
        self.summed.append(not self.local)
        return self.student(*inputs)

    @contextlib.contextmanager
    def no_sync(self):
        self.local = True
        yield
        self.local = False


@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_are_summed_over_the_processes_once_in_a_step(monkeypatch, sharded):
    """Each micro-batch's would give the same, and take the time of as many sums."""
    one, told = learner(), []
    one.is_sharded = sharded
    monkeypatch.setattr(sharding, "sum_gradients", lambda network, now: told.append(now))
    one.parallel_student = parallel = Parallel(one.student)
    for step, sizes in enumerate(([IMAGES], [6, 5, 5])):
        assert one.step(step, split(batch(step), sizes)).committed
    assert (told if sharded else parallel.summed) == [True, False, False, True]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_on_two_crop_sizes_moves_every_parameter_of_the_backbone(arch):
    one = learner(arch=arch, drop_path_rate=0.0)
    before = {name: p.clone() for name, p in one.student.backbone.named_parameters()}
    for step in range(2):  # the rate is zero in the first
        assert one.step(step, [batch(step)]).committed
    for name, parameter in one.student.backbone.named_parameters():
        assert (parameter != before[name]).any() == parameter.requires_grad, name


def test_stochastic_depth_is_on_and_depends_on_the_step_alone():
    with_depth, without = learner(), learner(drop_path_rate=0.0)
    assert_same(with_depth.state_dict()["student"], without.state_dict()["student"])
    first = with_depth.step(0, [batch(0)]).measured["loss"]
    assert first != without.step(0, [batch(0)]).measured["loss"]
    assert first == learner().step(0, [batch(0)]).measured["loss"]
    assert first != learner().step(1, [batch(0)]).measured["loss"]


def poison_crop(step: MicroBatch) -> None:
    step.groups[0][0, 0, 0, 0, 0] = float("nan")


def poison_local_crop(step: MicroBatch) -> None:
    step.groups[1][0, 0] = float("inf")


@pytest.mark.parametrize("poison", [poison_crop, poison_local_crop])
@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(poison, centering, use_bn, optimizer):
    one = learner(centering, optimizer, use_bn=use_bn)
    for step in range(3):
        assert one.step(step, [batch(step)]).committed
    before = everything(one)
    bad = batch(3)
    poison(bad)
    outcome = one.step(3, [bad])
    assert not outcome.committed and not outcome.overflowed and outcome.measured == {}
    assert_same(one.state_dict(), before)
    assert one.step(4, [batch(4)]).committed


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    one = learner()
    one.step(0, [batch(0)])
    before = everything(one)
    weight = one.student.backbone.norm.weight
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    outcome = one.step(1, [batch(1)])
    handle.remove()
    assert not outcome.committed
    assert_same(one.state_dict(), before)


def test_an_infinite_teacher_logit_does_not_reach_the_centre():
    one = learner()
    one.step(0, [batch(0)])
    before = everything(one)
    head, forward = one.teacher.head, one.teacher.head.forward
    head.forward = lambda x: forward(x).index_fill(1, torch.tensor([0]), float("-inf"))
    assert not one.step(1, [batch(1)]).committed
    del head.forward
    assert_same(one.state_dict(), before)


def test_an_overflow_in_fp16_lowers_the_scale_and_is_no_fault():
    """The scale is put to the test in float32: fp16 itself needs a GPU."""
    one = learner()
    one.loss_scale = LossScale(scale=2.0**127)
    before = everything(one)
    outcome = one.step(0, [batch(0)])
    assert outcome.overflowed and not outcome.committed
    after = everything(one)
    assert after.pop("fp16_scaler")["scale"] == 2.0**126
    before.pop("fp16_scaler")
    assert_same(after, before)
    scaled, plain = learner(), learner()
    scaled.loss_scale = LossScale(scale=1024.0)
    scaled.step(0, [batch(0)])
    plain.step(0, [batch(0)])
    for name, weight in plain.state_dict()["student"].items():
        torch.testing.assert_close(scaled.state_dict()["student"][name], weight)
    bad = batch(1)
    poison_crop(bad)
    scale = scaled.loss_scale.scale
    assert not scaled.step(1, [bad]).overflowed and scaled.loss_scale.scale == scale


def test_the_teacher_sees_all_crops_before_the_student_sees_any():
    one, seen = learner("sinkhorn"), []
    one.teacher.head.register_forward_pre_hook(lambda *_: seen.append("teacher"))
    one.student.head.register_forward_pre_hook(lambda *_: seen.append("student"))
    one.step(0, split(batch(0), [4] * 4))
    assert seen == ["teacher"] * 4 + ["student"] * 4


def test_the_last_layer_stays_while_it_is_frozen_and_the_rest_moves():
    one = learner()
    names = [name for name, _ in one.student.named_parameters() if "last_layer" in name]
    assert len(names) == 2
    start = {name: p.detach().clone() for name, p in one.student.named_parameters()}
    # The first rate of the warm-up is zero, so the second step is the first that moves anything.
    for step in (0, 1):
        one.step(step, [batch(step)])
    moved = {n for n, p in one.student.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(start) - set(names)
    one.step(2, [batch(2)])
    assert all(not torch.equal(dict(one.student.named_parameters())[n], start[n]) for n in names)


def test_each_network_has_its_own_batch_norm_buffers_and_neither_is_ever_in_eval_mode():
    one = learner(use_bn=True)
    one.step(0, [batch(0)])
    assert one.student.training and one.teacher.training
    state = one.state_dict()
    assert "module.head.mlp.1.running_mean" in state["teacher"]  # wrapped, as in the reference
    own = state["student"]["module.head.mlp.1.running_mean"]
    assert not torch.equal(own, state["teacher"]["module.head.mlp.1.running_mean"])


def test_states_are_loaded_back():
    one, other = learner(use_bn=True), learner(use_bn=True)
    for step in range(3):
        one.step(step, [batch(step)])
    other.load_state_dict(everything(one))
    for step in (3, 4):
        one.step(step, [batch(step)])
        other.step(step, [batch(step)])
    assert_same(one.state_dict(), other.state_dict())


def test_bf16_is_close_and_its_weights_and_loss_stay_in_float32():
    half, full = learner(precision="bf16"), learner()
    for step in range(4):
        ours, exact = half.step(step, [batch(step)]), full.step(step, [batch(step)])
        assert ours.committed
        assert ours.measured["loss"].dtype == torch.float32
        if step < 2:  # later steps start from other weights
            assert ours.measured["loss"].item() == pytest.approx(
                exact.measured["loss"].item(), rel=0.01
            )
    assert ours.measured["loss"] != exact.measured["loss"]
    assert all(p.dtype == torch.float32 for p in half.student.parameters())
