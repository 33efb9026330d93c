"""A step that goes wrong on one process of two is dropped on both, which then stop together."""

from __future__ import annotations

import json

import pytest
from processes import together
from test_train import metrics, pictures, words  # noqa: F401

# What each process does: something is wrong on the second one, in the steps that are named. It
# notes whether a step left everything as it was.
PROGRAM = """
import copy, json, os, sys
import torch
from dino_kit import cli, sharding
from dino_kit.training import learner
from dino_kit.training.learner import Learner

fault, steps = os.environ["FAULT"], json.loads(os.environ["STEPS"])
notes, bad = [], False
take, loss, norms = Learner.step, learner.cross_view_loss, sharding.norms

def equal(one, other):
    if isinstance(one, dict):
        return all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

def step(self, number, batches, *arguments):
    global bad
    bad = number in steps and os.environ["RANK"] == "1"
    if bad and fault == "a crop":
        batches[0].groups[0][0, 0, 0, 0, 0] = float("nan")
    if not hasattr(self, "hooked"):
        self.hooked = self.student.backbone.norm.weight.register_hook(
            lambda gradient: gradient * (float("inf") if bad and fault == "a gradient" else 1.0))
    before = copy.deepcopy(self.state_dict())
    outcome = take(self, number, batches, *arguments)
    notes.append((outcome.committed, equal(before, self.state_dict())))
    return outcome

def overflowing(*arguments):
    return loss(*arguments) * (float("inf") if bad and fault == "a loss" else 1.0)

def arrived(*arguments):
    return norms(*arguments) * (float("inf") if bad and fault == "a sum" else 1.0)

Learner.step, learner.cross_view_loss, sharding.norms = step, overflowing, arrived
status = cli.main(sys.argv[1:])
with open(os.path.join(os.environ["NOTES"], os.environ["RANK"]), "w") as file:
    json.dump(notes, file)
sys.exit(status)
"""


# The sum of the gradients spreads all but the last, which comes to one process alone.
@pytest.mark.parametrize("fault", ["a crop", "a loss", "a gradient", "a sum"])
def test_one_bad_process_of_two(pictures, tmp_path, fault):  # noqa: F811
    out = tmp_path / "out"
    line = words(pictures, out, "--batch_size_per_gpu", 4, "--max_bad_steps", 2, "--warmup_epochs", 0,
                 "--log_every_steps", 1, "--freeze_last_layer", 0)  # fmt: skip
    ended = together("-c", PROGRAM, *line, FAULT=fault, STEPS="[1, 3, 4]", NOTES=str(tmp_path))
    assert [one.status for one in ended] == [1, 1], ended
    for rank in range(2):
        notes = json.loads((tmp_path / str(rank)).read_text())
        assert notes == [[True, False], [False, True], [True, False], [False, True], [False, True]]
    assert [line["skipped"] for line in metrics(out)] == [0, 1, 1, 2]
    told = [line for line in ended[0].said.splitlines() if "not finite" in line]
    assert len(told) == 4 and "2 steps in a row were not finite, so the run stopped" in told[3]
    whose = "of process 1 (of 2) " if fault in ("a crop", "a loss") else ""
    for sentence in told:
        assert f"; its images {whose}are " in sentence or f": its images {whose}are " in sentence
    # By name: the one with the crop, else four of a process; at the stop all, eight of both.
    assert told[3].count(".png") == {"a crop": 1, "a loss": 4}.get(fault, 8)
    assert "Traceback" not in ended[0].said + ended[1].said


def test_the_process_that_is_named_is_the_one_with_the_bad_image(pictures, tmp_path):  # noqa: F811
    """Its images, and not those of the main process, which is the one that speaks."""
    from dino_kit.data.loader import epoch_order
    from dino_kit.data.sources.opening import open_training_source

    source = open_training_source(str(pictures), tmp_path / "lists")
    expected = {source.name(int(i)) for i in epoch_order(0, 0, len(source))[4:8]}
    line = words(pictures, tmp_path / "out", "--batch_size_per_gpu", 4, "--max_bad_steps", 1)
    ended = together("-c", PROGRAM, *line, FAULT="a loss", STEPS="[0]", NOTES=str(tmp_path))
    named = ended[0].said.splitlines()[-1].partition(" are ")[2].removesuffix(".").split(", ")
    assert set(named) == expected
