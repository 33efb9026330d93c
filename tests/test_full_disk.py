"""A disk that is full, or a folder that is read-only: the run goes on, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_train import assert_same_run, metrics, pictures, result, train, whole, words  # noqa: F401

from dino_kit import files, journal
from dino_kit.journal import Journal
from dino_kit.training import checkpoint
from dino_kit.training.learner import Learner
from dino_kit.training.monitor import Monitor

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def no_file_longer_than(limit: int):
    """What the system itself refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(*steps: int):
    """``checkpoint.save`` with no room for the checkpoints of these steps; all for none."""
    save = checkpoint.save

    def refused(folder, content, *rest):
        if steps and content["step"] not in steps:
            return save(folder, content, *rest)
        with no_file_longer_than(20_000):
            return save(folder, content, *rest)

    return refused


def read_only(*steps: int):
    save = checkpoint.save

    def refused(folder, content, *rest):
        with pytest.MonkeyPatch.context() as patched:
            if not steps or content["step"] in steps:
                patched.setattr(os, "replace", _refuse(errno.EROFS))
            return save(folder, content, *rest)

    return refused


def _refuse(number: int):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refuse


EVERY = ("--save_every_steps", 1, "--saveckp_freq", 2)


@pytest.mark.parametrize("fault", [full_disk, read_only])
def test_the_run_goes_on_and_tries_again(pictures, whole, tmp_path, monkeypatch, capsys, fault):  # noqa: F811
    seen, take = {}, Learner.step

    def step(learner, number, *arguments):
        if number:
            seen[number] = result(tmp_path)["step"]
        return take(learner, number, *arguments)

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(checkpoint, "save", fault(3, 4))
    assert train(pictures, tmp_path, *EVERY, "--max_failed_saves", 3) == 0
    assert seen == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5}  # the one before stays, and can be read
    said = capsys.readouterr().err
    why = "File too large" if fault is full_disk else "Read-only file system"
    for number in (3, 4):
        assert (
            f"The checkpoint of step {number} could not be written ({why}); the one of step 2 is "
            "intact. The run goes on"
        ) in said
    assert "Traceback" not in said
    assert_same_run(whole, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("fault", [full_disk, read_only])
def test_after_so_many_failures_it_stops_and_the_same_command_goes_on(
    pictures, whole, tmp_path, monkeypatch, capsys, fault  # noqa: F811
):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", fault(2, 3, 4))
        assert train(pictures, tmp_path, *EVERY, "--max_failed_saves", 3) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "could not" in line]
    assert len(said) == 3 and said[-1].startswith("dino-kit: stopped: The checkpoint of step 4 ")
    assert "the one of step 1 is intact. 3 in a row could not." in said[-1]
    assert "the same command then goes on" in said[-1]
    assert result(tmp_path)["step"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert train(pictures, tmp_path, "--saveckp_freq", 2) == 0
    assert_same_run(whole, tmp_path)


def test_the_last_checkpoint_has_no_later_one_to_make_up_for_it(
    pictures, whole, tmp_path, monkeypatch, capsys  # noqa: F811
):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full_disk(6))
        assert train(pictures, tmp_path) == 1
    assert "It was the run's last." in capsys.readouterr().err
    assert result(tmp_path)["step"] == 4
    assert train(pictures, tmp_path) == 0
    assert_same_run(whole, tmp_path)


def test_failures_are_counted_in_a_row(pictures, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoint, "save", full_disk(1, 3, 5))
    assert train(pictures, tmp_path, *EVERY, "--max_failed_saves", 2) == 0


def test_it_is_tried_again_after_a_minute(pictures, tmp_path, monkeypatch):  # noqa: F811
    clock, tried, take, save = [0.0], [], Learner.step, checkpoint.save
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def step(*arguments):
        clock[0] += 25.0
        return take(*arguments)

    def refused(folder, content, *rest):
        tried.append(content["step"])
        return save(folder, content, *rest) if len(tried) != 1 else _refuse(errno.ENOSPC)()

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(checkpoint, "save", refused)
    flags = ("--epochs", 2, "--total_batch_size", 2)  # ten steps an epoch
    assert train(pictures, tmp_path, *flags) == 0
    assert tried == [10, 13, 20]


def test_a_line_that_finds_no_room_waits_whole_for_the_next(tmp_path, capsys):
    lines = Journal(tmp_path / "metrics.jsonl")
    lines.append("one")
    with no_file_longer_than(6):  # "one", and half of the next
        lines.append("two")
        assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
        with pytest.raises(OSError):
            lines.flush()
    assert "metrics.jsonl could not be written to" in capsys.readouterr().err
    lines.append("three")
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\nthree\n"
    with no_file_longer_than(0):
        lines.append("four")
    lines.flush()
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\nthree\nfour\n"


def test_no_checkpoint_makes_history_of_lines_that_are_not_written(
    pictures, whole, tmp_path, monkeypatch  # noqa: F811
):
    """Killed after it, the run would go on behind them."""
    append, full = journal.append_whole, []
    monkeypatch.setattr(
        journal, "append_whole", lambda *what: _refuse(errno.ENOSPC)() if full else append(*what)
    )
    take = Learner.step

    def step(learner, number, *arguments):
        full[:] = [1] * (number in (2, 3))  # the line of step 3, and of the second epoch
        if number >= 4:
            assert result(tmp_path)["step"] == (2 if number == 4 else 5)
            full.clear()
        return take(learner, number, *arguments)

    monkeypatch.setattr(Learner, "step", step)
    assert train(pictures, tmp_path, *EVERY) == 0
    assert_same_run(whole, tmp_path)


def test_lines_are_on_the_disk_before_the_checkpoint_is(pictures, tmp_path, monkeypatch):  # noqa: F811
    """Else a machine that loses its power has the checkpoint without them."""
    order = []
    flush, save = Journal.flush, checkpoint.save
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync") or fsync(handle))

    def flushed(lines):
        order.append(lines.path.name)
        flush(lines)

    monkeypatch.setattr(Journal, "flush", flushed)
    monkeypatch.setattr(checkpoint, "save", lambda *what: order.append("saved") or save(*what))
    assert train(pictures, tmp_path, "--epochs", 1, "--log_every_steps", 1) == 0
    start = order.index("metrics.jsonl")
    assert order[start : order.index("saved")] == [
        "metrics.jsonl", "fsync", "log.txt", "fsync", "probe.jsonl"
    ]  # fmt: skip


def test_a_run_outlives_its_tensorboard(pictures, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    from torch.utils.tensorboard import SummaryWriter

    for name in ("add_scalar", "flush", "close"):
        monkeypatch.setattr(SummaryWriter, name, _refuse(errno.ENOSPC))
    assert train(pictures, tmp_path) == 0
    told = "tensorboard could not be written to (No space left on device)"
    assert capsys.readouterr().err.count(told) == 1
    assert metrics(tmp_path) == metrics(whole)


def test_a_probe_keeps_its_figures_where_its_sheet_finds_no_room(
    pictures, tmp_path, monkeypatch, capsys  # noqa: F811
):
    write = files.atomic_write

    def refused(path, *mode):
        return _refuse(errno.ENOSPC)() if str(path).endswith(".png") else write(path, *mode)

    monkeypatch.setattr(files, "atomic_write", refused)
    monkeypatch.setattr(checkpoint, "keep_as_best", _refuse(errno.ENOSPC))
    flags = ("--epochs", 1, "--probe_freq", 1, "--probe_data", pictures)
    assert train(pictures, tmp_path, *flags) == 0
    probes = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    assert [probe["step"] for probe in probes] == [0, 2]
    assert all("sheet" not in probe and "effective_rank" in probe for probe in probes)
    said = capsys.readouterr().err
    assert "epoch0001.png could not be written" in said and "Traceback" not in said


def test_a_bad_image_is_told_and_written_down_later(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{number}.png")
    (tmp_path / "data/0.png").write_bytes(b"junk")
    append, times = journal.append_whole, []

    def refused(path, data):
        times.append(path)
        return append(path, data) if len(times) > 1 else _refuse(errno.ENOSPC)()

    monkeypatch.setattr("dino_kit.data.bad_images.journal.append_whole", refused)
    monkeypatch.setattr(Monitor, "_append", lambda *what: None)  # by the same function
    flags = ("--epochs", 2, "--total_batch_size", 4, "--max_bad_share", 0.5)
    assert train(tmp_path / "data", tmp_path / "out", *flags) == 0
    assert (tmp_path / "out/bad_images.txt").read_text().count("0.png") == 1
    assert "bad_images.txt could not be written to" in capsys.readouterr().err
    assert len(times) == 2


# What one of two processes does: it is the main one that finds the disk full.
PROGRAM = """
import errno, os, sys
from dino_kit import cli
from dino_kit.training import checkpoint
def full(*what):
    assert os.environ["RANK"] == "0", "only the main process writes"
    raise OSError(errno.ENOSPC, "No space left on device")
checkpoint.save = full
sys.exit(cli.main(sys.argv[1:]))
"""


def test_all_processes_do_as_the_main_one_finds(pictures, tmp_path):  # noqa: F811
    line = words(pictures, tmp_path, *EVERY, "--max_failed_saves", 2, "--batch_size_per_gpu", 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *line], text=True, stderr=subprocess.PIPE,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 1, text
        assert "stopped: The checkpoint of step 2 could not be written" in text
        assert "Traceback" not in text
    assert "(No space left on device); there is none so far" in said[0]
