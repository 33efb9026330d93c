"""A run that is killed, at any moment: the same command finishes it, with nothing lost or double.

Each moment is chosen by a count of what a run does to its files, and of its steps, so that the
places between a write, its fsync and its rename are met and not hoped for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import together
from test_train import assert_same, assert_same_run, metrics, pictures, words  # noqa: F401

from dino_kit import files
from dino_kit.config.train import RESUMABLE

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")

# Starts runs that count the moments at which they may be killed, and are at the one whose number is
# given. It is the kernel's SIGKILL: nothing is closed, flushed or tidied up. Of a write only half is
# done. The runs are forks of a process that has imported everything, which takes the longest.
PROGRAM = """
import json, os, pathlib, signal, sys, threading
from dino_kit import cli, files, journal
from dino_kit.commands import train
from dino_kit.assemble import assemble
from dino_kit.training import checkpoint
from dino_kit.training.learner import Learner
from dino_kit.evaluators.probe import Probe
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

at, moments = -1, []

def moment(name, before=lambda: None):
    if threading.current_thread() is not threading.main_thread():
        return
    moments.append(name)
    if len(moments) - 1 == at:
        before()
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name, label):
    real = getattr(owner, name)
    def counted(*arguments, **options):
        moment("before " + label)
        result = real(*arguments, **options)
        moment("after " + label)
        return result
    setattr(owner, name, counted)

for owner, name, label in (
    (os, "fsync", "fsync"), (os, "replace", "replace"), (os, "link", "link"),
    (pathlib.Path, "replace", "rename"), (pathlib.Path, "unlink", "unlink"),
    (Learner, "_teach", "half a step"), (Learner, "_commit", "commit"),
):
    around(owner, name, label)

def halved(path, data, real=journal.append_whole):
    def half():
        with open(path, "ab") as file:
            file.write(data[: len(data) // 2])
    moment("half a line", half)
    real(path, data)
    moment("after a line")
journal.append_whole = halved

write = files._Target.write
def written(target, data):
    moment("in a save", lambda: (target.file.write(bytes(data)[:7]), target.file.flush()))
    return write(target, data)
files._Target.write = written
Probe._sheet = lambda *what: Image.new("RGB", (8, 8))  # to draw one takes long
# Without labels that mean something, the probe after the second epoch is called the best.
checkpoint.is_best = lambda scores: len(scores) == 3

for order in sys.stdin:
    at, folder, line = json.loads(order)
    child = os.fork()
    if child == 0:
        output = os.open(os.path.join(folder, "output"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        status = cli.main(line)
        with open(os.path.join(folder, "moments"), "w") as file:
            json.dump(moments, file)
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
NEVER = 10**9
FLAGS = ("--save_every_steps", 1, "--saveckp_freq", 1, "--probe_freq", 1, "--on_bad_image", "skip",
         "--max_bad_share", 0.2, "--log_every_steps", 1)  # fmt: skip


@pytest.fixture(scope="module")
def data(pictures, tmp_path_factory) -> Path:  # noqa: F811
    """Images of which two are broken, for bad_images.txt."""
    root = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(pictures, root)
    for name in ("class0/4.png", "class1/7.png"):
        (root / name).write_bytes(b"junk")
    return root


@pytest.fixture(scope="module")
def train(data):
    """``train(folder, at)``: a run in ``folder``, killed at a moment; returns its exit status."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(folder: Path, at: int) -> int:
            folder.mkdir(exist_ok=True)
            line = words(data, folder / "run", *FLAGS)
            server.stdin.write(json.dumps([at, str(folder), line]) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            assert status in (0, -signal.SIGKILL), (folder / "output").read_text()
            return status

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> tuple[Path, list[str]]:
    """An uninterrupted run, and its moments."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, NEVER) == 0
    return folder / "run", json.loads((folder / "moments").read_text())


def assert_nothing_lost_or_double(one: Path, other: Path) -> None:
    assert_same_run(one, other)
    steps = [line["step"] for line in metrics(other)]
    assert steps == list(range(1, 7))
    assert (other / "bad_images.txt").read_text() == (one / "bad_images.txt").read_text() != ""
    probes = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"}
         for line in (run / "probe.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]  # fmt: skip
    assert probes[0] == probes[1] and [probe["step"] for probe in probes[1]] == [0, 2, 4, 6]
    for pattern in ("*", "looks/*"):
        names = [
            {path.name for path in run.glob(pattern)} - {"events", "tensorboard"}
            for run in (one, other)
        ]
        assert names[0] == names[1]
    for name in ("checkpoint_best.pth", "checkpoint0000.pth", "checkpoint_previous.pth"):
        assert_same_checkpoint(one / name, other / name)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    contents = [files.read_weights(path) for path in (one, other)]
    for content in contents:
        for name in RESUMABLE:
            content["config"].pop(name)
    assert_same(*contents, where=one.name)


def among(moments: list[str], kind: str, place: float) -> int:
    """The number of a moment of this kind, as far into the run as ``place`` says."""
    numbers = [number for number, name in enumerate(moments) if name == kind]
    return numbers[int(place * len(numbers))]


@pytest.mark.parametrize(
    ("kind", "place"), [("in a save", 0.6), ("before rename", 0.5), ("half a line", 0.7)]
)
def test_killed_once(train, whole, tmp_path, kind, place):
    run, moments = whole
    assert train(tmp_path, among(moments, kind, place)) == -signal.SIGKILL
    assert train(tmp_path, NEVER) == 0
    assert_nothing_lost_or_double(run, tmp_path / "run")


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(train, whole, tmp_path):
    """Of a run that was killed, the next start is, too; each within its first steps."""
    run, moments = whole
    numbers, kills, folder = random.Random(0), 0, tmp_path / "0"
    while kills < 20:
        if train(folder, numbers.randrange(len(moments) // 3)) == -signal.SIGKILL:
            kills += 1
            continue
        assert_nothing_lost_or_double(run, folder / "run")
        folder = tmp_path / str(kills)
    assert train(folder, NEVER) == 0
    assert_nothing_lost_or_double(run, folder / "run")


@pytest.mark.slow
def test_killed_at_every_kind_of_moment(train, whole, tmp_path):
    run, moments = whole
    assert len(set(moments)) == 17
    for number, kind in enumerate(sorted(set(moments))):
        folder = tmp_path / str(number)
        assert train(folder, among(moments, kind, number / 17)) == -signal.SIGKILL, kind
        assert train(folder, NEVER) == 0
        assert_nothing_lost_or_double(run, folder / "run")


# The kill comes in the middle of the fourth step, of which nothing is on the disk. The one process is
# taken for one of several, so that what is the identity on one goes by gloo, or on a GPU by NCCL.
IN_A_STEP = """
import os, signal, sys
from torch.distributed import get_backend
from dino_kit import cli, distributed
from dino_kit.training.learner import Learner

class Several(int):
    __eq__ = lambda self, other: False
    __gt__ = lambda self, other: True

distributed.world_size = lambda: Several(1)

def commit(learner, step, *rest, real=Learner._commit):
    assert get_backend() == {"cpu": "gloo", "cuda": "nccl"}[learner.device.type]
    assert learner.parallel_student is not learner.student
    if os.environ["KILLED"] == "yes" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(learner, step, *rest)

Learner._commit = commit
sys.exit(cli.main(sys.argv[1:]))
"""
WITHOUT_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=WITHOUT_GPU)])
def test_killed_in_half_precision_amid_collectives(pictures, tmp_path, device):  # noqa: F811
    def run(out: str, killed: str) -> int:
        flags = ("--precision", "bf16", "--device", device, "--save_every_steps", 1)
        line = words(pictures, tmp_path / out, *flags, "--log_every_steps", 1)
        return together("-c", IN_A_STEP, *line, processes=1, KILLED=killed)[0].status

    assert run("whole", "no") == 0 and run("killed", "yes") == -signal.SIGKILL
    assert run("killed", "no") == 0
    if device == "cpu":
        assert_same_run(tmp_path / "whole", tmp_path / "killed")
    one, other = ([line["loss"] for line in metrics(tmp_path / out)] for out in ("whole", "killed"))
    assert len(other) == 6 and other == pytest.approx(one, rel=1e-2)  # a GPU adds in any order
