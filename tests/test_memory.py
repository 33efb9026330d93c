"""Too little memory: one sentence with the batch that fits, and following it the run goes on."""

from __future__ import annotations

import re

import pytest
import torch
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
    assert "nor for one; a smaller network" in capsys.readouterr().err


def test_with_a_batch_norm_a_smaller_batch_is_another_run(
    pictures, tmp_path, monkeypatch, capsys  # noqa: F811
):
    room_for(monkeypatch, 5, REFUSALS[0])
    assert train(pictures, tmp_path, "--use_bn_in_head", "true") == 1
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


def test_of_two_processes_both_end(pictures, tmp_path):  # noqa: F811
    program = """
import os, sys
from dino_kit import cli
from dino_kit.training.learner import Learner
def learn(*arguments):
    if os.environ["RANK"] == "1":
        raise MemoryError
    return learned(*arguments)
learned, Learner._learn = Learner._learn, learn
sys.exit(cli.main(sys.argv[1:]))
"""
    ended = together("-c", program, *words(pictures, tmp_path, "--batch_size_per_gpu", 4))
    assert [one.status for one in ended] == [1, 1]
    assert "2 may fit: --batch_size_per_gpu 2 --total_batch_size 8" in ended[1].said
    assert "Process 1 (of 2) has stopped: The memory does not suffice" in ended[0].said
