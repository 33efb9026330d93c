"""Too little memory: one sentence with the batch that fits, and following it the run goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from processes import together
from test_train import assert_equal_up_to_rounding, pictures, train, whole, words  # noqa: F401

from dino_kit.evaluators.probe import Probe
from dino_kit.training import memory
from dino_kit.training.learner import Learner

REFUSALS = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    MemoryError(),
]


def room_for(monkeypatch, most: int, error: Exception) -> None:
    learn = Learner._learn

    def learned(learner, step, batches, *arguments):
        if max(len(batch.places) for batch in batches) > most:
            raise error
        return learn(learner, step, batches, *arguments)

    monkeypatch.setattr(Learner, "_learn", learned)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_the_sentence_names_the_batch_that_fits_and_to_follow_it_works(
    pictures, whole, tmp_path, monkeypatch, capsys, error  # noqa: F811
):
    room_for(monkeypatch, 5, error)
    assert train(pictures, tmp_path) == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "notice" not in line]
    assert "The memory does not suffice for 8 images at a time (" in told
    found = re.search(r"; 5 fit: (--batch_size_per_gpu 5 --total_batch_size 8) is the same", told)
    assert train(pictures, tmp_path, *found[1].split()) == 0
    assert_equal_up_to_rounding(whole, tmp_path)


def test_not_even_one_fits(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    room_for(monkeypatch, 0, REFUSALS[0])
    assert train(pictures, tmp_path) == 1
    assert "nor, as far as it could be tried, for one; a smaller" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--use_bn_in_head", "true"], ["--arch", "deepvit"]])
def test_with_a_batch_norm_a_smaller_batch_is_another_run(
    pictures, tmp_path, monkeypatch, capsys, flags  # noqa: F811
):
    room_for(monkeypatch, 5, REFUSALS[0])
    assert train(pictures, tmp_path, *flags) == 1
    assert "give --total_batch_size 5, which is another run" in capsys.readouterr().err


def test_the_first_probe(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    def probe(*arguments):
        raise REFUSALS[1]

    monkeypatch.setattr(Probe, "__call__", probe)
    room_for(monkeypatch, 3, REFUSALS[0])
    assert train(pictures, tmp_path, "--probe_freq", 1) == 1
    told = capsys.readouterr().err
    assert "--batch_size_per_gpu 3 --total_batch_size 8" in told and "--probe_freq 0" in told
    assert "Traceback" not in told


# Runs a command twice: first a small one, for which everything is loaded that a run needs, and then
# with 140 MB more of addresses than that has taken. 64 images need more, 32 less.
LIMITED = """
import resource, sys, torch
from dino_kit import cli
torch.set_num_threads(1)
first, *line = sys.argv[1:]
assert cli.main([*line, "--output_dir", first, "--total_batch_size", "4"]) == 0
with open("/proc/self/statm") as file:
    most = int(file.read().split()[0]) * resource.getpagesize() + (140 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.exit(cli.main(line))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts addresses against a limit")
def test_a_real_limit_and_the_command_that_it_is_answered_by(tmp_path):
    """The allocator gives back what is free, which it does by itself only where tensors are large.

    Not covered: a heap that keeps most of the addresses, which leaves oneDNN none for its code;
    and limits so narrow that something other than a tensor is the first that finds no room.
    """
    (tmp_path / "data").mkdir()
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{number}.png")
    line = words(tmp_path / "data", tmp_path / "out", "--embed_dim", 96, "--depth", 4,
                 "--global_crops_size", 32, "--local_crops_number", 0, "--epochs", 1,
                 "--warmup_epochs", 0, "--total_batch_size", 64, "--batch_size_per_gpu", 64)  # fmt: skip

    def run(first: str, *flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", LIMITED, tmp_path / first, *line, *flags],
            capture_output=True, text=True, check=False,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip

    refused = run("one")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "The memory does not suffice for 64 images at a time (" in refused.stderr
    flags = re.search(r"\d+ fit: (--batch_size_per_gpu \d+ --total_batch_size 64)", refused.stderr)
    done = run("two", *flags[1].split())
    assert done.returncode == 0, done.stderr


def test_another_fault_is_not_taken_for_it(pictures, tmp_path, monkeypatch):  # noqa: F811
    room_for(monkeypatch, 5, RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train(pictures, tmp_path)


@pytest.mark.parametrize("room", range(13))
def test_the_most_that_fit(room):
    tried = []

    def take(images):
        tried.append(images)
        if images > room:
            raise REFUSALS[0]

    assert memory.most_that_fit(take, 13) == room
    assert len(tried) <= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU all is tried on one thread")
def test_a_thread_that_once_got_no_memory_does_not_count_against_fewer_images():
    """oneDNN's generator of code remembers it; see the real limit, at 100 MB in place of 140."""
    here = threading.local()

    def take(images):
        if images > 5 or hasattr(here, "failed"):
            here.failed = True
            raise RuntimeError("could not create a primitive")

    assert memory.most_that_fit(take, 13) == 5


# What each of two processes does: the second has room for three images, and comes to know it at the
# place that is named.
OF_TWO = """
import os, sys
import torch
from dino_kit import cli
from dino_kit.training.learner import Learner

def learn(learner, step, batches, *rest):
    if os.environ["RANK"] == "1" and max(len(batch.places) for batch in batches) > 3:
        if os.environ["AMID"] == "yes":  # some gradients are on their way to the other process
            weights = [p for p in learner.student.parameters() if p.requires_grad]
            weights[0].register_post_accumulate_grad_hook(refuse)
            try:
                return learned(learner, step, batches, *rest)
            finally:
                hooks = weights[0]._post_accumulate_grad_hooks
                hooks.clear()
        raise MemoryError
    return learned(learner, step, batches, *rest)

def refuse(weight):
    raise MemoryError

learned, Learner._learn = Learner._learn, learn
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("amid", ["no", pytest.param("yes", marks=pytest.mark.slow)])
def test_one_of_two_processes_tries_on_its_own_what_fits(pictures, tmp_path, amid):  # noqa: F811
    line = words(pictures, tmp_path, "--batch_size_per_gpu", 4)
    ended = together("-c", OF_TWO, *line, AMID=amid)
    assert [one.status for one in ended] == [1, 1]
    told = "; 3 fit: --batch_size_per_gpu 3 --total_batch_size 8 is the same run"
    assert told in ended[1].said and "and --total_batch_size 6 one of smaller" in ended[1].said
    assert "Process 1 (of 2) has stopped: The memory does not suffice" in ended[0].said


@pytest.mark.parametrize(
    "flags",
    [["--use_bn_in_head", "true"], pytest.param(["--fsdp", "true"], marks=pytest.mark.slow)],
)
def test_what_lies_on_two_processes_is_not_tried_by_one(pictures, tmp_path, flags):  # noqa: F811
    line = words(pictures, tmp_path, "--batch_size_per_gpu", 4, *flags)
    ended = together("-c", OF_TWO, *line, AMID="no")
    assert [one.status for one in ended] == [1, 1]
    assert "; 2 may fit: " in ended[1].said
    assert "--total_batch_size 4, which is another run" in ended[1].said or "fsdp" in flags[0]
