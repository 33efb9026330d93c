"""A folder is held by one process, and is free as soon as that process is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys

import pytest
from processes import together
from test_train import pictures, train, words  # noqa: F401

from dino_kit import locks
from dino_kit.errors import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no fork and no SIGKILL")


def held_by_another(folder, *, forks: bool = False) -> subprocess.Popen:
    """A process that holds ``folder``, and with ``forks`` has a child that outlives it."""
    program = f"""
import os, sys, time
from dino_kit import locks
with locks.hold({str(folder)!r}, "training"):
    if {forks} and os.fork() == 0:
        time.sleep(300)
    print("held", flush=True)
    time.sleep(300)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # its children, whose parent is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_second_run_is_refused_and_told_whose_the_first_is(
    pictures, tmp_path, capsys  # noqa: F811
):
    first = held_by_another(tmp_path)
    try:
        assert train(pictures, tmp_path) == 2
    finally:
        end(first)
    assert capsys.readouterr().err == (
        f"dino-kit: error: Another run, of process {first.pid} on {socket.gethostname()}, is "
        f"training in {tmp_path}.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_of_two_processes_one_tells_it_and_both_end(pictures, tmp_path):  # noqa: F811
    line = words(pictures, tmp_path, "--batch_size_per_gpu", 4)
    with locks.hold(tmp_path, "training"):
        main, other = together("-m", "dino_kit", *line)
    assert (main.status, other.status) == (2, 2)
    told = f"dino-kit: error: Another run, of process {os.getpid()} on {socket.gethostname()}, is"
    assert told in main.said and "Traceback" not in main.said
    assert "dino-kit:" not in other.said and "Traceback" not in other.said


@posix
def test_a_child_does_not_keep_what_its_killed_parent_held(tmp_path):
    first = held_by_another(tmp_path, forks=True)
    try:
        with pytest.raises(UserError), locks.hold(tmp_path, "training"):
            pass
        first.kill()
        first.wait()
        os.killpg(first.pid, 0)  # the child lives
        with locks.hold(tmp_path, "training"):
            pass
    finally:
        end(first)


@posix
def test_after_a_kill_the_same_command_starts_at_once_though_data_workers_live_on(
    pictures, tmp_path  # noqa: F811
):
    line = [sys.executable, "-m", "dino_kit", *words(pictures, tmp_path, "--num_workers", 2)]
    program = [sys.executable, "-c", STOPPED, *line[3:]]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as first:
        workers = [int(word) for word in first.stdout.readline().split()]
        assert len(workers) == 2
        # Stopped, they outlive it however fast a worker may notice that its parent is gone.
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        first.kill()
        first.wait()
        try:
            again = subprocess.run(line, capture_output=True, text=True)
            assert again.returncode == 0, again.stderr
            assert all(os.kill(worker, 0) is None for worker in workers)
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)


# A run that tells who its data workers are in its third step, and goes no further.
STOPPED = """
import multiprocessing, sys, time
from dino_kit import cli
from dino_kit.training.learner import Learner
take = Learner.step
def step(learner, number, *args, **kwargs):
    if number == 2:
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        time.sleep(300)
    return take(learner, number, *args, **kwargs)
Learner.step = step
from dino_kit import log
log.say = lambda text: None
sys.exit(cli.main(sys.argv[1:]))
"""


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    """It would get the record lock a second time, and lose it when the second holder is done."""
    with locks.hold(tmp_path, "training"):
        with pytest.raises(UserError, match=f"Another run, of process {os.getpid()} on .* is training in"):
            with locks.hold(tmp_path, "training"):
                pass
        program = f"from dino_kit import locks; locks.hold({str(tmp_path)!r}, 'training').__enter__()"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "Another run" in other.stderr
    # It is free again for the next, also after a failure.
    with contextlib.suppress(KeyError), locks.hold(tmp_path, "training"):
        raise KeyError
    with locks.hold(tmp_path, "training"):
        pass


def test_locks_of_other_names_do_not_disturb_each_other(tmp_path):
    with locks.hold(tmp_path, "training"), locks.hold(tmp_path, "measuring", ".other.lock"):
        with pytest.raises(UserError, match="is measuring in"):
            with locks.hold(tmp_path, "measuring", ".other.lock"):
                pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_that_is_said(pictures, tmp_path, monkeypatch, capsys, number):  # noqa: F811
    def no_locks(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_lock", no_locks)
    assert train(pictures, tmp_path, "--epochs", 1) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path} lies on a file system without locks" in said and "only one at a time" in said
