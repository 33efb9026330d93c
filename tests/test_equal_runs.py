"""One process, accumulation, two processes and sharded networks follow the same run."""

from __future__ import annotations

from pathlib import Path

import equal_runs
import pytest
import torch
from equal_runs import IMAGES, POISONED, QUICK, RUNS, follow, learner
from processes import run_together

_ALONE: dict[str, dict] = {}
_SLOW = [name for name in (*RUNS, *POISONED) if name not in QUICK]


def each(names) -> list:
    return [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in names]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """By the name of a run, the folder in which two processes have left what they did."""
    folders: dict[tuple[str, ...], Path] = {}

    def folder_of(name: str) -> Path:
        names = tuple(_SLOW if name in _SLOW else QUICK)
        if names not in folders:
            folders[names] = tmp_path_factory.mktemp("together")
            run_together(equal_runs.__file__, str(folders[names]), *names)
        return folders[names]

    return folder_of


def alone(most: int = IMAGES, **settings) -> dict:
    key = repr((most, settings))
    if key not in _ALONE:
        one = learner(**settings)
        _ALONE[key] = {"losses": follow(one, most), **one.state_dict()}
    return _ALONE[key]


def assert_same_run(one: dict, other: dict, without_gradient=()) -> None:
    assert one["losses"] == pytest.approx(other["losses"], abs=1e-5)
    for network in ("student", "teacher"):
        assert list(one[network]) == list(other[network])
        for name, value in other[network].items():
            assert_close(f"{network} {name}", one[network][name], value, without_gradient)
    torch.testing.assert_close(one["dino_loss"]["center"], other["dino_loss"]["center"])
    moments, expected = one["optimizer"]["state"], other["optimizer"]["state"]
    assert list(moments) == list(expected)
    for number in expected:
        assert list(moments[number]) == list(expected[number])
        for name, value in expected[number].items():
            assert moments[number][name].shape == value.shape


def assert_close(name: str, one: torch.Tensor, other: torch.Tensor, without_gradient) -> None:
    assert type(one) is torch.Tensor and one.shape == other.shape, name
    if name.split()[-1] in without_gradient:
        return
    if name.endswith("attn.qkv.bias"):  # the key's part has no true gradient
        one, other = (torch.cat((x[:32], x[64:])) for x in (one, other))
    assert (one - other).float().norm() <= 1e-4 * other.float().norm() + 1e-12, name


@pytest.mark.parametrize("settings", [{}, equal_runs.SINKHORN], ids=str)
def test_accumulation_follows_the_run_at_once(settings):
    assert_same_run(alone(16, **settings), alone(**settings))


# What all rows have in common a batch norm takes away, so these have no true gradient either. The
# means follow them; under SGD, which magnifies no rounding, they stay close.
BEFORE_BATCH_NORM = ["module.backbone.norm.bias", "module.head.mlp.0.bias", "module.head.mlp.3.bias"]
MEANS = ["module.head.mlp.1.running_mean", "module.head.mlp.4.running_mean"]


@pytest.mark.parametrize("name", each(RUNS))
def test_two_processes_follow_the_run_of_one(together, name):
    settings, expected = RUNS[name]
    both = torch.load(together(name) / f"{name}.pth", weights_only=True)
    without_gradient = BEFORE_BATCH_NORM if "use_bn_in_head" in settings else []
    without_gradient = without_gradient + ([] if settings.get("optimizer") == "sgd" else MEANS)
    assert_same_run(both, alone(**expected), without_gradient)
    whole = sum(p.numel() for p in learner(**expected).student.parameters())
    if settings.get("fsdp"):
        assert 0.5 * whole <= both["held"] < 0.55 * whole
    else:
        assert both["held"] == whole
    wrapped = "use_bn_in_head" in settings or settings.get("arch") == "deepvit"
    prefix = "module.backbone." if wrapped else "backbone."
    for tensor, value in both["backbone"].items():
        assert torch.equal(value, both["teacher"][prefix + tensor])


def test_the_runs_are_no_trivial_ones():
    """Clipping bites, stochastic depth drops, the last layer moves once it may."""
    run = alone()
    assert min(run["losses"]) < run["losses"][0] - 0.05
    for settings in ({"clip_grad": 0.0}, {"drop_path_rate": 0.0}, {"freeze_last_layer": 0}):
        assert alone(**settings)["losses"] != pytest.approx(run["losses"], abs=1e-4), settings


@pytest.mark.parametrize("name", each(POISONED))
def test_a_step_that_is_not_finite_on_one_process_changes_nothing_on_either(together, name):
    for rank in range(2):
        assert (together(name) / f"{name} {rank}.txt").read_text() == "True"
