"""A signal that asks a run to end: the step is finished and saved, and the same command goes on."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import assert_same_run, metrics, pictures, result, train, words  # noqa: F401

from dino_kit.data.undisturbed import undisturbed
from dino_kit.training.interruption import Interruption
from dino_kit.training.learner import Learner

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no signals to send")


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(pictures, out) == 0
    return out


@pytest.fixture(autouse=True)
def as_in_a_shell():
    """A background job of a shell ignores SIGINT, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(monkeypatch, step: int, *numbers: int) -> None:
    """Let the signals come in the middle of the step with this number."""
    original = Learner._teach

    def teach(learner, *args, **kwargs):
        learner.steps_taken = getattr(learner, "steps_taken", -1) + 1
        if learner.steps_taken == step:
            for number in numbers:
                signal.raise_signal(number)
        return original(learner, *args, **kwargs)

    monkeypatch.setattr(Learner, "_teach", teach)


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_the_step_is_finished_and_saved_and_the_same_command_goes_on(
    pictures, whole, tmp_path, monkeypatch, capsys, name  # noqa: F811
):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        signalled(patched, 2, number)
        assert train(pictures, tmp_path, "--num_workers", 1) == 128 + number
    said = capsys.readouterr().err
    assert "The same command goes on from the last checkpoint" in said and "Traceback" not in said
    assert result(tmp_path)["step"] == 3
    assert signal.getsignal(number) is before
    assert train(pictures, tmp_path) == 0
    assert_same_run(whole, tmp_path)


@posix
def test_a_handler_that_returns_lets_the_run_go_on_after_it_was_saved(
    pictures, whole, tmp_path, monkeypatch  # noqa: F811
):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(result(tmp_path)["step"]))
    try:
        signalled(monkeypatch, 2, signal.SIGTERM)
        assert train(pictures, tmp_path) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [3]
    assert_same_run(whole, tmp_path)


@posix
def test_of_two_signals_that_which_ends_the_run_is_met_first(pictures, tmp_path, monkeypatch):  # noqa: F811
    """Slurm sends SIGTERM, which its jobs pass over, together with the signal of the preemption."""
    seen = []

    def handler(number, frame):
        seen.append((number, result(tmp_path)["step"]))
        raise SystemExit(5)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        signalled(monkeypatch, 0, signal.SIGTERM, signal.SIGUSR2)
        with pytest.raises(SystemExit):
            train(pictures, tmp_path)
    finally:
        for number, was in before.items():
            signal.signal(number, was)
    assert seen == [(signal.SIGUSR2, 1)]


def test_asked_twice_from_the_keyboard_it_stops_at_once(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    signalled(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    assert train(pictures, tmp_path) == 130
    assert "once more" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pth").exists()  # the epoch's second step was cut short


@posix
def test_a_signal_after_the_last_step_is_not_lost():
    interruption = Interruption()
    with pytest.raises(KeyboardInterrupt), interruption.put_off():
        assert interruption.request() == 0
        signal.raise_signal(signal.SIGINT)
        assert interruption.request() > 0


@posix
def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        interruption = Interruption()
        with interruption.put_off():
            signal.raise_signal(signal.SIGTERM)
            assert interruption.request() == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_every_so_many_minutes(pictures, whole, tmp_path, monkeypatch):  # noqa: F811
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saves = []
    original, take = torch.save, Learner.step

    def step(learner, number, *args, **kwargs):
        clock[0] += 60.0  # a minute a step
        return take(learner, number, *args, **kwargs)

    def save(content, *args, **kwargs):
        if isinstance(content, dict) and "step" in content:
            saves.append(content["step"])
        return original(content, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(torch, "save", save)
    # Two steps an epoch, each of which ends with a checkpoint from which the time counts anew.
    assert train(pictures, tmp_path / "often", "--save_every_minutes", 1) == 0
    assert saves == [1, 2, 3, 4, 5, 6]
    saves.clear()
    assert train(pictures, tmp_path / "never", "--save_every_minutes", 3) == 0
    assert saves == [2, 4, 6]
    assert metrics(whole) == metrics(tmp_path / "often")


# What one of two processes does: train, and be signalled in the middle of step 2 if it is rank 1.
PROGRAM = """
import os, signal, sys
from dino_kit import cli
from dino_kit.training.learner import Learner
teach, taken = Learner._teach, []
def signalled(learner, *args):
    taken.append(1)
    if len(taken) == 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return teach(learner, *args)
if os.environ.get("SIGNALLED"):
    Learner._teach = signalled
sys.exit(cli.main(sys.argv[1:]))
"""


def two_processes(line: list[str], **environment: str) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(
            subprocess.Popen([sys.executable, "-c", PROGRAM, *line],
                             env=os.environ | group | environment)
        )  # fmt: skip
    return [process.wait(300) for process in processes]


@posix
def test_a_signal_to_one_process_ends_all_after_the_same_step(pictures, tmp_path):  # noqa: F811
    flags = ["--batch_size_per_gpu", 4]
    parts = words(pictures, tmp_path / "parts", *flags)
    assert two_processes(parts, SIGNALLED="1") == [143, 143]
    assert result(tmp_path / "parts")["step"] == 3
    assert two_processes(parts) == [0, 0]
    assert two_processes(words(pictures, tmp_path / "whole", *flags)) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@posix
@pytest.mark.parametrize("way", ["spawn", "forkserver"])
def test_data_workers_heed_only_their_parent(way):
    """Slurm and terminals signal every process of a job, and the run ends its workers itself."""
    import multiprocessing

    context = multiprocessing.get_context(way)
    ready, end = context.Event(), context.Event()
    worker = context.Process(target=_work, args=(ready, end), daemon=True)
    worker.start()
    assert ready.wait(60)
    from_outside = "import os, sys; [os.kill(int(sys.argv[1]), int(n)) for n in sys.argv[2:]]"
    numbers = [signal.SIGINT, signal.SIGUSR2]
    if hasattr(signal, "sigwaitinfo"):
        numbers.append(signal.SIGTERM)
    line = [sys.executable, "-c", from_outside, str(worker.pid), *(str(int(n)) for n in numbers)]
    subprocess.run(line, check=True)
    worker.join(1.0)
    assert worker.is_alive()
    worker.terminate()  # as PyTorch does with one that does not stop
    worker.join(60)
    assert not worker.is_alive()


def _work(ready, end) -> None:
    undisturbed()
    ready.set()
    end.wait(120)


@posix
def test_signals_to_the_workers_do_not_end_a_run(pictures, whole, tmp_path, monkeypatch):  # noqa: F811
    """The workers' signals come from outside, as Slurm's do: from a process that is no parent."""
    take = Learner.step
    send = "import os, sys; os.kill(int(sys.argv[1]), int(sys.argv[2]))"

    @functools.wraps(take)
    def step(learner, number, *args, **kwargs):
        if number == 1:
            import multiprocessing

            workers = multiprocessing.active_children()
            assert workers
            for worker in workers:
                for name in ("SIGTERM", "SIGUSR2", "SIGINT"):
                    what = str(int(signal.Signals[name]))
                    subprocess.run([sys.executable, "-c", send, str(worker.pid), what], check=True)
        return take(learner, number, *args, **kwargs)

    monkeypatch.setattr(Learner, "step", step)
    assert train(pictures, tmp_path, "--num_workers", 1) == 0
    assert_same_run(whole, tmp_path)
