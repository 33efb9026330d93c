"""Jobs on a real Slurm: started, warned, evicted, requeued, failed, killed; see cluster.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_kit import cli, files

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
REQUIRED = os.environ.get("DINO_KIT_SLURM") == "required"
SECONDS = 240  # the longest that anything here may take
STEPS = 22 * 3
TRAIN = (
    "train --arch vit --embed_dim 16 --depth 1 --num_heads 2 --patch_size 4 --global_crops_size 8 "
    "--local_crops_size 4 --local_crops_number 2 --out_dim 32 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --total_batch_size 64 --num_workers 0 --device cpu --probe_freq 0 "
    "--warmup_epochs 1 --log_every_steps 5 --epochs 3 --saveckp_freq 1 --data_path digits"
).split()


def why_not() -> str:
    if shutil.which("sbatch") is None:
        return "there is no Slurm here; as root, tests/slurm/cluster.py starts one"
    listed = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False)
    if not {"main", "low", "now", "high"} <= set(listed.stdout.split()):
        return "the Slurm here is not the one of tests/slurm/cluster.py"
    return ""


reason = why_not()
if reason and REQUIRED:
    raise RuntimeError(f'DINO_KIT_SLURM is "required", and {reason}.')
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(reason), reason=reason),
    pytest.mark.usefixtures("alone"),  # so that all is under way before anything is waited for
]


class Launched:
    """``dino-kit launch slurm --wait`` as a process of its own, and the job it waits for."""

    def __init__(self, out: Path, *flags: str, line: list[str] | None = None, fault: str = ""):
        self.out = out
        path = os.pathsep.join([str(FAULTS), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "DINO_KIT_FAULT": fault}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dino_kit", "launch", "slurm", "--wait", "--cpus_per_task", "1",
             *flags, "--", *(line or [*TRAIN, "--output_dir", str(out)])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ended = None

    @property
    def id(self) -> str:
        file = self.out / "jobs/submitted.jsonl"
        until(lambda: file.exists() and file.read_text().strip())
        return json.loads(file.read_text().splitlines()[0])["job"]

    def log(self, task: int = 0) -> str:
        path = self.out / f"jobs/{self.id}_{task}_log.out"
        return path.read_text() if path.exists() else ""

    def holds(self) -> None:
        """Return when it waits in its step."""
        until(lambda: "hold at step" in self.log())

    def ended(self) -> tuple[int, str, str]:
        """Exit status, output and errors of the one who waits."""
        if self._ended is None:
            said, complained = self.process.communicate(timeout=SECONDS)
            self._ended = self.process.returncode, said, complained
        return self._ended


def until(ready) -> None:
    for _ in range(SECONDS * 10):
        if ready():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to be")


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True).stdout


TWO = ("--nodes", "2", "--tasks_per_node", "1")
ONE = ("--nodes", "1", "--tasks_per_node", "1")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All of them at once, because most of their time is spent waiting."""
    root = tmp_path_factory.mktemp("slurm")
    started = {
        # Slurm warns up to a minute earlier than it is asked to.
        "limit": Launched(root / "limit", *ONE, "--timeout", "2", "--signal_delay", "20",
                          fault="hold:0:30"),
        "warned": Launched(root / "warned", *TWO, fault="hold:0:30"),
        "evicted": Launched(root / "evicted", *TWO, "--partition", "low", fault="hold:0:30"),
        "evicted at once": Launched(root / "now", *ONE, "--partition", "now", fault="hold:0:30"),
        "requeued": Launched(root / "requeued", *ONE, fault="hold:0:30"),
        "cancelled": Launched(root / "cancelled", *ONE, fault="hold:0:10"),
        "failed": Launched(root / "failed", *TWO, fault="raise:1:10"),
        "killed": Launched(root / "killed", *TWO, fault="die:1:10"),
        "whole": Launched(root / "whole", *TWO),
    }  # fmt: skip
    signal_from_the_start(started["cancelled"])
    yield started
    for job in started.values():
        if job.process.poll() is None:
            subprocess.run(["scancel", job.id], check=False)
            job.process.kill()


def signal_from_the_start(job: Launched) -> None:
    """Send what would end a process whose handlers are not in place yet."""
    until(lambda: "JobState=RUNNING" in scontrol("show", "job", job.id))
    for _ in range(20):
        for name in ("TERM", "USR2"):
            subprocess.run(["scancel", f"--signal={name}", job.id], check=False)
        if "Starting with" in job.log():
            break
        time.sleep(0.1)


@pytest.fixture(scope="module")
def taker(jobs) -> str:
    """Let all that is to befall the jobs befall them; returns the job that takes the nodes."""
    jobs["warned"].holds()
    subprocess.run(["scancel", "--signal=USR2", jobs["warned"].id], check=True)
    jobs["requeued"].holds()
    scontrol("requeue", jobs["requeued"].id)
    jobs["cancelled"].holds()
    subprocess.run(["scancel", jobs["cancelled"].id], check=True)
    jobs["evicted"].holds()
    jobs["evicted at once"].holds()
    return subprocess.run(
        ["sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null",
         "--wrap", "sleep 1"], check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


@pytest.fixture(scope="module")
def alone(taker, tmp_path_factory) -> Path:
    """The run of one process, uninterrupted, while the jobs are queued again."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert cli.main([*TRAIN, "--output_dir", str(out)]) == 0
    return out


def assert_same(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moments, centre and metrics, bit for bit."""
    a, b = (files.read_weights(out / "checkpoint.pth") for out in (one, other))
    assert a["step"] == b["step"] == STEPS
    for part in ("student", "teacher", "optimizer", "dino_loss", "monitor", "skipped"):
        assert_same(a[part], b[part])
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in ("images_per_second", "data_wait")}
         for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, other)
    ]  # fmt: skip
    assert lines[0] == lines[1]
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()


def went_on_after(job: Launched) -> list[int]:
    return [int(step) for step in re.findall(r"going on after step (\d+)", job.log())]


def test_a_remote_failure_reaches_who_waits(jobs):
    status, _, complained = jobs["failed"].ended()
    assert status == 1
    assert "Process 1 of job" in complained and "Traceback" in complained
    assert "ValueError: the cow jumped over the moon" in complained


def test_a_killed_process_ends_the_job_and_that_is_told(jobs):
    status, _, complained = jobs["killed"].ended()
    assert status == 1
    assert f"job {jobs['killed'].id}" in complained.lower() and "FAILED" in jobs["killed"].ended()[1]


def test_a_signal_before_a_job_heeds_it_does_no_harm_and_a_cancelled_one_is_not_waited_for(jobs):
    status, _, complained = jobs["cancelled"].ended()
    assert status == 1 and f"Job {jobs['cancelled'].id} was cancelled" in complained


def test_on_the_signal_of_a_preemption_the_step_is_finished_and_the_job_requeued(jobs):
    job = jobs["warned"]
    status, said, _ = job.ended()
    assert status == 0 and "started again 1 time" in said
    assert went_on_after(job) == [31]
    assert jobs["whole"].ended()[0] == 0
    assert_same_run(jobs["whole"].out, job.out)


def test_a_requeue_without_a_signal_goes_on_from_the_newest_checkpoint(jobs, alone):
    job = jobs["requeued"]
    status, _, _ = job.ended()
    assert status == 0
    assert went_on_after(job) == [22]
    assert_same_run(alone, job.out)


def test_another_job_takes_the_nodes_with_and_without_a_time_of_grace(jobs, taker, alone):
    for name in ("evicted", "evicted at once"):
        status, said, complained = jobs[name].ended()
        assert status == 0, complained
        assert "started again" in said
    assert "JobState=COMPLETED" in scontrol("show", "job", taker)
    assert went_on_after(jobs["evicted"]) == [31]
    assert_same_run(jobs["whole"].out, jobs["evicted"].out)
    assert went_on_after(jobs["evicted at once"]) in ([31], [22])
    assert_same_run(alone, jobs["evicted at once"].out)


def test_before_its_time_is_up_a_job_saves_and_is_queued_again(jobs, alone):
    job = jobs["limit"]
    status, said, complained = job.ended()
    assert status == 0, complained
    assert "started again 1 time" in said
    assert went_on_after(job) == [31]
    assert "timed-out" in job.log()
    assert_same_run(alone, job.out)


def test_status_tells_the_end_on_one_screen(jobs, capsys):
    for name in ("whole", "failed"):
        jobs[name].ended()
    assert cli.main(["launch", "status", str(jobs["whole"].out)]) == 0
    shown = capsys.readouterr().out
    assert f"job {jobs['whole'].id}: COMPLETED" in shown
    assert f"step {STEPS}" in shown and "look at it with" in shown
    assert len(shown.splitlines()) < 25
    assert cli.main(["launch", "status", str(jobs["failed"].out)]) == 1
    told = capsys.readouterr()
    assert "FAILED" in told.out and "the cow jumped over the moon" in told.err


def test_an_array_evaluates_many_checkpoints(jobs):
    assert jobs["whole"].ended()[0] == 0
    out = jobs["whole"].out
    checkpoints = [str(out / f"checkpoint000{epoch}.pth") for epoch in (0, 2)]
    line = ["knn", *checkpoints, "--data_path", "digits", "--num_workers", "0", "--device", "cpu"]
    status, said, complained = Launched(out, "--array", *ONE, line=line).ended()
    assert status == 0, complained
    assert len(re.findall(r"^job \d+_[01]: COMPLETED", said, re.MULTILINE)) == 2
    for checkpoint in checkpoints:
        written = json.loads((out / f"knn_{Path(checkpoint).stem}.json").read_text())
        assert written["results"]
