"""``dino-kit launch``: words to jobs, and jobs on this machine; tests/slurm has those of a Slurm."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_interruption import posix
from tiny_run import TINY

from dino_kit import cli, files
from dino_kit.cluster import here, job, state, submission, waiting
from dino_kit.cluster.state import State
from dino_kit.config import command_line
from dino_kit.errors import RunFailed, UserError

ROOT = Path(__file__).parent.parent
DIGITS = [*TINY, "--in_chans", "3", "--data_path", "digits", "--warmup_epochs", "0",
          "--probe_freq", "0", "--total_batch_size", "64", "--epochs", "1"]  # fmt: skip


def parsed(line: str):
    return command_line.parse(*command_line.named(line.split()))


def dry(capsys, line: str) -> str:
    """What a launch would start; ``line`` has its own flags first."""
    words = line.split()
    assert cli.main([*words[:2], "--dry_run", *words[2:]]) == 0
    return capsys.readouterr().out


# From words to a job


def test_a_published_line_of_the_reference_runs_train_on_two_nodes(capsys, tmp_path):
    shown = dry(
        capsys,
        "launch slurm --nodes 2 --ngpus 8 --use_volta32 --timeout 300 --partition p --comment c "
        f"--arch vit_small --patch_size=16 --data_path d --output_dir {tmp_path}/out",
    )
    for line in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=300",
                 "--partition=p", "--comment=c", "--constraint=volta32gb", "--cpus-per-task=10",
                 "--mem=327680MB", "--requeue", "--signal=USR2@120"):  # fmt: skip
        assert f"#SBATCH {line}\n" in shown
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in shown
    assert "--kill-on-bad-exit=1" in shown
    assert "arch: vit_small" in shown and "patch_size: 16" in shown and "data_path: d" in shown
    assert not (tmp_path / "out").exists()


def test_nothing_but_a_profile_knows_a_site(capsys, tmp_path):
    plain = dry(capsys, f"launch slurm --data_path d --output_dir {tmp_path}")
    for name in ("partition", "account", "qos", "constraint", "comment"):
        assert f"--{name}" not in plain
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "partition: gpu\naccount: me\nqos: q\nnodes: 3\nsetup: [module load cuda, 'true']\n"
        "container: apptainer exec --nv x.sif\npython: python3\nsbatch_args: [reservation=r, "
        "exclusive]\nsrun_args: [mpi=none]\n"
    )
    shown = dry(
        capsys,
        f"launch slurm --profile {profile} --nodes 1 --data_path d --output_dir {tmp_path}",
    )
    for line in ("--partition=gpu", "--account=me", "--qos=q", "--nodes=1", "--reservation=r",
                 "--exclusive"):  # fmt: skip
        assert f"#SBATCH {line}\n" in shown
    assert "\nmodule load cuda\ntrue\n" in shown
    assert "--mpi=none apptainer exec --nv x.sif sh -c" in shown and "exec python3" in shown


@pytest.mark.parametrize("path", sorted((ROOT / "launch/clusters").glob("*.yaml")), ids=str)
def test_the_profiles_that_are_shown_can_be_read(capsys, tmp_path, path):
    shown = dry(capsys, f"launch slurm --profile {path} --data_path d --output_dir {tmp_path}")
    assert "#SBATCH --partition=gpu" in shown


def test_a_job_on_cpus_asks_for_no_gpus(capsys, tmp_path):
    shown = dry(
        capsys,
        f"launch slurm --nodes 1 --tasks_per_node 2 --data_path d --output_dir {tmp_path}",
    )
    assert "gpus" not in shown.partition("# dino-kit")[0] and "--mem" not in shown
    assert "#SBATCH --ntasks-per-node=2\n" in shown


def test_an_array_has_a_job_for_each_checkpoint(capsys, tmp_path):
    (tmp_path / "a.pth").touch()
    shown = dry(
        capsys,
        f"launch slurm --array -- knn {tmp_path}/a.pth {tmp_path}/b.pth --data_path d",
    )
    assert "#SBATCH --array=0-1%2\n" in shown and "#SBATCH --nodes=1\n" in shown
    assert "#SBATCH --gpus-per-node=1\n" in shown
    for name in "ab":
        assert f"# dino-kit knn {tmp_path}/{name}.pth --data_path d\n" in shown


def test_the_command_is_divided_where_the_two_dashes_are():
    config = parsed("launch slurm --nodes 1 -- dino-kit train vits8 --data_path d --output_dir o")
    assert config.command == ("train", "vits8", "--data_path", "d", "--output_dir", "o")
    config = parsed("launch slurm vits8 --wait --data_path d --nodes=4 --output_dir o --wait false")
    assert config.command == ("train", "vits8", "--data_path", "d", "--output_dir", "o")
    assert (config.nodes, config.wait) == (4, False)


@pytest.mark.parametrize(
    "line, told",
    [
        ("slurm --nodes 0 -- knn x", "--nodes is '0'; it takes a whole number from 1."),
        ("slurm --", "After -- a command is missing"),
        ("slurm -- tarin", "'tarin' is no command"),
        ("slurm -- launch local -- knn", "'launch' cannot be launched"),
        ("slurm --partiton p -- knn", "no flag --partiton; did you mean --partition?"),
        ("slurm --nodes 2 --data_path d", "--output_dir is missing."),
        ("slurm -- train --data_path d --output_dir o --epoch 3", "did you mean --epochs?"),
        ("slurm --ngpus 2 --gpus_per_node 4 -- knn", "--ngpus 2 contradicts --gpus_per_node 4"),
        ("slurm --ngpus 2 --tasks_per_node 4 -- knn", "--tasks_per_node 4 contradicts 2 GPUs"),
        ("slurm --partiton p --data_path d --output_dir o", "did you mean --partition?"),
        ("slurm --nodes 2 knn x --data_path d", "Before knn -- is missing: dino-kit launch slurm"),
        ("local knn x --data_path d", "Before knn -- is missing: dino-kit launch local"),
        ("slurm --container 'a -- knn", 'in which a quotation mark has no second'),
        ("slurm -- knn x --data_path d", "There is no checkpoint x; where another job"),
        ("slurm -- train --data_path d --output_dir 50%j", "for % Slurm puts numbers into the path"),
        ("slurm --use_volta32 --constraint x -- knn", "--use_volta32 contradicts --constraint x"),
        ("slurm --srun_args --mpi=none -- knn", "no flag --mpi"),
        ("slurm --array -- knn --data_path d", "there is none: name checkpoints there"),
        ("slurm --profile missing.yaml -- knn x", "The profile 'missing.yaml' is no YAML file"),
        ("slurm -- config", "dino-kit config has no folder of its own; give --job_dir"),
        ("status", "A folder is missing"),
        ("status nowhere", "No job was launched for nowhere"),
        ("cluster", "dino-kit launch takes one of slurm, local, status, and got 'cluster'"),
    ],
)
def test_faults_are_told_before_anything_is_started(capsys, tmp_path, monkeypatch, line, told):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", *line.split()]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_for_a_run(capsys, tmp_path):
    (tmp_path / "out").touch()
    line = ["launch", "slurm", "--data_path", "d", "--output_dir", str(tmp_path / "out")]
    assert cli.main(line) == 2
    assert "out" in capsys.readouterr().err and not (tmp_path / "jobs").exists()


def test_a_snapshot_is_refused_where_python_could_not_import_it(capsys, tmp_path):
    folder = f"{tmp_path}/a{os.pathsep}b"
    line = ["local", "--snapshot", "--data_path", "d", "--output_dir", folder]
    assert cli.main(["launch", *line]) == 2
    assert "Python cannot import from" in capsys.readouterr().err
    assert not list(tmp_path.rglob("code_*"))


@pytest.mark.parametrize("key", ["profile", "command"])
def test_a_profile_names_neither_another_one_nor_a_command(tmp_path, key):
    (tmp_path / "mine.yaml").write_text(f"{key}: x\n")
    with pytest.raises(UserError, match=f"has the key {key}; that stands on the command line"):
        parsed(f"launch slurm --profile {tmp_path}/mine.yaml -- knn x")


def test_what_people_set_once_for_sbatch_holds_unless_it_is_given(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name in ("PARTITION", "ACCOUNT", "QOS"):
        monkeypatch.setenv(f"SBATCH_{name}", f"my_{name.lower()}")
    line = f"launch slurm --qos given --data_path d --output_dir {tmp_path}"
    shown = dry(capsys, line)
    for flag in ("--partition=my_partition", "--account=my_account", "--qos=given"):
        assert f"#SBATCH {flag}\n" in shown
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # then these can be that job's
    assert "my_account" not in dry(capsys, line)


def test_a_mistake_in_a_profile_names_its_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("nodes: 2\nparttion: gpu\n")
    with pytest.raises(UserError, match="The profile .* has in line 2 the key 'parttion'"):
        parsed(f"launch slurm --profile {tmp_path}/mine.yaml --data_path d --output_dir o")


@posix
def test_a_job_carries_its_words_and_how_often_it_may_be_queued_again(capsys, tmp_path, monkeypatch):
    from submitit.core.utils import DelayedSubmission

    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 7\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    words = ["train", "--data_path", "d", "--output_dir", str(tmp_path / "out")]
    flags = ["--timeout", "90", "--max_timeouts", "11"]
    assert cli.main(["launch", "slurm", *flags, "--", *words]) == 0
    assert "job 7: dino-kit train" in capsys.readouterr().out
    (entry,) = submission.read_submitted(tmp_path / "out/jobs")
    assert (entry.job, entry.cluster, entry.words, entry.tasks) == ("7", "slurm", words, 16)
    carried = DelayedSubmission.load(entry.path(tmp_path / "out/jobs", "submitted_pickle"))
    assert carried.function.words == tuple(words)
    assert (carried._timeout_min, carried._timeout_countdown) == (90, 11)


def test_where_there_is_no_slurm_that_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "slurm", "--data_path", "d", "--output_dir", f"{tmp_path}/out"]) == 2
    assert "sbatch and srun are not here" in capsys.readouterr().err


def test_the_command_line_is_told_without_torch_and_submitit(tmp_path):
    program = (
        "import sys; from dino_kit import cli;"
        "cli.main(['launch', 'slurm', '--nodes', '0', '--', 'knn']);"
        "sys.exit(bool({'torch', 'submitit'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# In the processes of a job


def environment(tmp_path, rank: int = 1, name: str = "slurm"):
    return SimpleNamespace(
        job_id="12_3", global_rank=rank, num_tasks=4, local_rank=1, hostnames=["a", "b"],
        cluster=name, USR_SIG="USR2", paths=SimpleNamespace(result_pickle=tmp_path / "result.pkl"),
    )  # fmt: skip


def test_processes_agree_on_a_port_which_changes_with_each_start(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ports = set()
    for restarts in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        found = [job.process_group(environment(tmp_path, rank), 0) for rank in range(4)]
        assert [group["RANK"] for group in found] == list("0123")
        assert {group["MASTER_ADDR"] for group in found} == {"a"}
        (port,) = {group["MASTER_PORT"] for group in found}
        ports.add(port)
        assert 20_000 <= int(port) < 32_000
    assert len(ports) == 4
    assert job.process_group(environment(tmp_path), 1)["MASTER_PORT"] not in ports


def test_a_process_that_sees_only_its_own_gpu_takes_it(tmp_path, monkeypatch):
    for shown, local in (("0,1", "1"), ("1", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert job.process_group(environment(tmp_path), 0)["LOCAL_RANK"] == local


def test_a_job_is_a_few_words_that_can_be_pickled_and_queued_again():
    first = job.Job(["train", "--epochs", "3"])
    again = pickle.loads(pickle.dumps(first)).checkpoint().function
    assert (again.words, again.starts) == (first.words, 1)
    assert job.Job.__submitit_checkpoint__ is job.Job.checkpoint


def test_a_run_that_begins_anew_does_so_once(monkeypatch):
    begins = job.Job(["train", "--resume", "never"])
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert begins.words_now() == begins.words
    assert begins.checkpoint().function.words_now()[-1] == "--resume=auto"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # queued again without our asking
    assert begins.words_now()[-1] == "--resume=auto"
    assert job.Job(["knn", "x"]).words_now() == ("knn", "x")
    assert job.Job(["train", "mine.yaml"]).words_now()[-1] == "--resume=auto"  # it can say never


def test_what_an_earlier_start_left_is_not_the_result_of_this_one(tmp_path, monkeypatch):
    """It would be, where this start is killed, or queued again."""
    started, seen = environment(tmp_path), []
    started.paths.result_pickle.write_bytes(pickle.dumps(("error", "lost the others")))
    monkeypatch.setattr("submitit.JobEnvironment", lambda: started)
    monkeypatch.setattr(job, "process_group", lambda *_: {})
    monkeypatch.setattr(job, "_take_signals", lambda _: None)
    monkeypatch.setattr(
        cli, "outcome", lambda *_, repeat: seen.append(list(tmp_path.iterdir())) or (0, "")
    )
    assert job.Job(["train", "--data_path", "d"])() == 0
    assert seen == [[]]


@posix
@pytest.mark.parametrize("rank, refused", [(0, False), (0, True), (1, False)])
def test_only_the_main_process_asks_for_a_requeue_and_none_leaves_an_error(tmp_path, rank, refused):
    asked = []

    def handler(number, frame):
        asked.append(number)
        if refused:  # where Slurm has queued the job again itself
            raise subprocess.CalledProcessError(1, "scontrol")

    before = {number: signal.signal(number, handler) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        job._take_signals(environment(tmp_path, rank))
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGUSR2)
    finally:
        for number, was in before.items():
            signal.signal(number, was)
    assert ended.value.code == 0
    assert asked == ([signal.SIGUSR2] if rank == 0 else [])


@posix
def test_a_job_out_of_time_too_often_says_so(tmp_path):
    from submitit.core.utils import UncompletedJobError

    def handler(number, frame):
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    before = {number: signal.signal(number, handler) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        job._take_signals(environment(tmp_path, rank=0))
        with pytest.raises(RunFailed, match="more often than --max_timeouts allows"):
            signal.raise_signal(signal.SIGUSR2)
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def test_a_command_that_fails_is_told_by_its_sentence_and_a_fault_of_ours_by_its_traceback(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "process_group", lambda *_: {})
    monkeypatch.setattr(job, "_take_signals", lambda _: None)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: environment(tmp_path))
    for words in (["train", "--data_path", "d"], ["report", str(tmp_path)]):
        try:
            job.Job(words)()
        except RunFailed:
            leave(tmp_path, 0, "error", traceback.format_exc())
        verdict = waiting.verdict(submitted(), tmp_path, State("FAILED"))
        (line,) = verdict.splitlines()
        assert line.startswith("Process 0 of job 7 failed: error: ")
    leave(tmp_path, 0, "error", "Traceback\n  somewhere\nValueError: x\n")
    assert "somewhere" in waiting.verdict(submitted(), tmp_path, State("FAILED"))


# Waiting


def submitted(**changes) -> submission.Submitted:
    values = {"job": "7", "cluster": "slurm", "words": ["train"], "tasks": 2, "host": "h", "time": 0}
    return submission.Submitted(**(values | changes))


def leave(folder: Path, task: int, kind: str, value: str = "") -> None:
    path = submitted().path(folder, "result_pickle", task)
    path.write_bytes(pickle.dumps((kind, value)))
    os.utime(path, (100 - task, 100 - task))


def wait(monkeypatch, folder: Path, *names: str) -> State:
    """Wait for a job that has these states in turn, the last of them for ever."""
    clock, states = [0], iter(names)
    current = [""]

    def state_of(entry, where):
        current[0] = next(states, current[0])
        return State(current[0])

    def sleep(seconds):
        clock[0] += seconds
        assert clock[0] < 1000, "waited without end"

    monkeypatch.setattr(waiting, "state_of", state_of)
    monkeypatch.setattr(time, "sleep", sleep)
    return waiting.wait(submitted(), folder)


def test_a_job_that_is_queued_again_is_waited_for_whatever_its_files_say(tmp_path, monkeypatch):
    leave(tmp_path, 1, "error", "lost the others")
    final = wait(monkeypatch, tmp_path, "RUNNING", "FAILED", "PENDING", "RUNNING", "COMPLETED")
    assert final.name == "COMPLETED"


def test_a_job_of_which_nobody_knows_is_not_waited_for_without_end(tmp_path, monkeypatch):
    final = wait(monkeypatch, tmp_path, "RUNNING", "UNKNOWN")
    assert "knows of job 7" in waiting.verdict(submitted(), tmp_path, final)


@pytest.mark.parametrize(
    "name, told",
    [("OUT_OF_MEMORY", "--mem_gb"), ("CANCELLED", "was cancelled"), ("TIMEOUT", "ran out of time"),
     ("NODE_FAIL", "lost a node"), ("DEADLINE", "ended as DEADLINE")],
)  # fmt: skip
def test_what_slurm_did_to_a_job_is_told_before_what_its_processes_say(tmp_path, name, told):
    leave(tmp_path, 0, "error", "connection closed")
    submitted().path(tmp_path, "stderr", 0).write_text("submitit WARNING x\nthe last words\n")
    verdict = waiting.verdict(submitted(), tmp_path, State(name))
    assert told in verdict and "the last words" in verdict and "submitit" not in verdict


def test_the_first_error_is_the_cause(tmp_path):
    leave(tmp_path, 0, "error", "connection closed")
    leave(tmp_path, 1, "error", "the cause")
    assert "Process 1 of job 7 failed:\nthe cause" in waiting.verdict(
        submitted(), tmp_path, State("FAILED")
    )


def test_success_needs_the_word_of_slurm_and_of_all_processes(tmp_path):
    leave(tmp_path, 0, "success")
    assert "without leaving a result" in waiting.verdict(submitted(), tmp_path, State("COMPLETED"))
    leave(tmp_path, 1, "success")
    assert waiting.verdict(submitted(), tmp_path, State("COMPLETED")) == ""


def test_slurm_is_asked_first_and_its_accounting_afterwards(monkeypatch):
    answers = {"scontrol": "JobId=7 JobState=PENDING Reason=BeginTime Restarts=2 NodeList=(null)"}
    monkeypatch.setattr(state, "_output", lambda *command: answers.get(command[0], ""))
    found = state.state_of(submitted(), Path())
    assert (found.name, found.reason, found.restarts) == ("PENDING", "BeginTime", 2)
    answers = {"sacct": "7|CANCELLED by 0|node1|00:01:00\n"}
    assert state.state_of(submitted(), Path()).ended
    answers.clear()
    assert state.state_of(submitted(), Path()).name == "UNKNOWN"


def test_elements_cancelled_before_they_began_are_known_as_the_rest_of_their_array(monkeypatch):
    shown = {
        "scontrol": "JobId=7 ArrayJobId=7 ArrayTaskId=4294967294 JobState=CANCELLED\n"
        "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobState=COMPLETED\n",
        "sacct": "7_[1-2%1]|CANCELLED by 0|None assigned|00:00:00\n7_0|COMPLETED|one|00:00:03\n",
    }

    def output(name, *words):
        return shown[name] if words[-1] == "7" or "7" in words else ""

    monkeypatch.setattr(state, "_output", output)
    for _ in range(2):  # by scontrol, and where that has forgotten the job by sacct
        assert state.state_of(submitted(job="7_2", tasks=1), Path()).name == "CANCELLED"
        shown["scontrol"] = ""
    assert state.state_of(submitted(job="7_0", tasks=1), Path()).name == "COMPLETED"


def test_where_nobody_knows_of_a_job_the_words_of_all_its_processes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_output", lambda *command: "")
    leave(tmp_path, 0, "success")
    assert state.state_of(submitted(), tmp_path).name == "UNKNOWN"
    leave(tmp_path, 1, "success")
    assert state.state_of(submitted(), tmp_path).name == "COMPLETED"
    leave(tmp_path, 1, "error")
    assert state.state_of(submitted(), tmp_path).name == "FAILED"


@pytest.mark.parametrize("line", ['{"job": "8", "clus', '{"job": "8"}', "7", "", "\x00\x00"])
def test_a_record_that_is_damaged_hides_no_job(tmp_path, capsys, line):
    submission.record(tmp_path, "7", "slurm", ["train"], 2)
    with open(tmp_path / submission.SUBMITTED, "a") as file:
        file.write(line + "\n")
    submission.record(tmp_path, "9", "slurm", ["train"], 2)
    assert [entry.job for entry in submission.read_submitted(tmp_path)] == ["7", "9"]
    assert "Line 2 of " in capsys.readouterr().err


class Ran:
    def __reduce__(self):
        return print, ("code of somebody else's folder",)


def test_to_look_at_somebodys_folder_runs_none_of_its_code(tmp_path, capsys):
    leave(tmp_path, 0, "success", Ran())
    assert state.result_of(submitted(), tmp_path, 0) == (None, "")
    assert capsys.readouterr().out == ""


def test_why_a_job_waits_is_told_when_it_changes(tmp_path, monkeypatch, capsys):
    told = iter([State("PENDING", reason=why, elapsed="00:00:00") for why in ("", "PartitionConfig")])
    monkeypatch.setattr(waiting, "state_of", lambda *_: next(told, State("CANCELLED")))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    waiting.wait(submitted(), tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "job 7: PENDING", "job 7: PENDING (PartitionConfig)", "job 7: CANCELLED"
    ]  # fmt: skip


# On this machine


def test_a_job_here_keeps_to_the_gpus_of_its_shell(tmp_path, monkeypatch):
    found = {}

    def start(line, env):
        found.update(env)
        return SimpleNamespace(pid=7)

    monkeypatch.setattr("subprocess.Popen", start)
    for visible, gpus, given in (("2,GPU-5", 2, "2,GPU-5"), ("2,3", 1, "2"), ("", 2, "0,1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        here.submit(tmp_path, ["train"], gpus, 1, None)
        assert found["CUDA_VISIBLE_DEVICES"] == given
        assert found["SUBMITIT_LOCAL_NTASKS"] == str(gpus)


def test_a_job_imports_the_snapshot_of_the_package(capsys, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(
        "subprocess.Popen", lambda line, env: found.update(env) or SimpleNamespace(pid=7)
    )
    here.submit(tmp_path, ["train"], 0, 1, tmp_path / "code")
    shown = dry(capsys, f"launch slurm --snapshot --data_path d --output_dir {tmp_path}/out")
    assert found["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "code"), "before"])
    assert f"export PYTHONPATH={tmp_path}/out/jobs/code:before\n" in shown
    # Else the folder that the job is started in would come first.
    assert found["PYTHONSAFEPATH"] == "1" and "export PYTHONSAFEPATH=1\n" in shown


@posix
@pytest.mark.parametrize(
    "end, told",
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL. The system does that"),
        ("sys.exit('the cow jumped')", "it ended with status 1. The last that it said:\nthe cow"),
    ],
)
def test_a_process_here_that_ends_badly_ends_the_others_and_is_spoken_for(
    tmp_path, monkeypatch, end, told
):
    program = f"""
import os, sys, time
if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
    {end}
time.sleep(30)
"""
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(here, "_SECONDS_TO_LEAVE", 0.5)
    for name, value in {"NTASKS": "2", "COMMAND": f"{sys.executable} {tmp_path}/program.py",
                        "TIMEOUT_S": "600", "SIGNAL_DELAY_S": "0", "WITH_SHELL": ""}.items():  # fmt: skip
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    monkeypatch.setenv("SUBMITIT_STDERR_TO_STDOUT", "")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        controller = here.Controller(tmp_path)
        controller.start_tasks()
        first = controller.tasks[0]
        assert controller.wait()[1] not in (0, None)
        controller.kill_tasks()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert first.wait() < 0
    entry = submission.Submitted(controller.pid, "local", ["train"], 2, "here", 0.0)
    failed = State("FAILED")
    assert f"Process 1 of job {entry.job} failed: {told}" in waiting.verdict(entry, tmp_path, failed)


@posix
@pytest.mark.slow
def test_a_process_killed_before_it_comes_to_the_others_is_not_waited_for(tmp_path, capsys):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '1':\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    out = tmp_path / "out"
    running = launch("--tasks_per_node", "2", "--", "train", *DIGITS, "--output_dir", str(out),
                     path=tmp_path)  # fmt: skip
    try:
        _, complained = running.communicate(timeout=200)
    finally:
        running.terminate()
    assert running.returncode == 1
    assert "failed: killed by SIGKILL" in complained and "Process 1 of job" in complained
    assert cli.main(["launch", "status", str(out)]) == 1
    assert "Process 1 of job" in capsys.readouterr().err


def test_a_system_without_the_signals_is_told_of_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(signal, "SIGUSR2", raising=False)
    line = ["launch", "local", "--data_path", "d", "--output_dir", str(tmp_path / "out")]
    assert cli.main(line) == 2
    assert "torchrun" in capsys.readouterr().err and not (tmp_path / "out").exists()


def launch(*words: str, path: Path = ROOT) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(path), str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "dino_kit", "launch", "local", *words],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@posix
def test_a_job_of_two_processes_here(tmp_path, capsys):
    out = tmp_path / "out"
    running = launch("--tasks_per_node", "2", "--gpus_per_node", "0", "--snapshot", "--", "train",
                     *DIGITS, "--output_dir", str(out))  # fmt: skip
    said, complained = running.communicate(timeout=300)
    assert running.returncode == 0, complained
    assert "2 process(es)" in said and "look at it with" in said and "submitit" not in said
    assert files.read_weights(out / "checkpoint.pth")["step"] == 22
    (code,) = (out / "jobs").glob("code_*")
    assert (code / "dino_kit/cli.py").is_file() and not list(code.rglob("__pycache__"))
    assert cli.main(["launch", "status", str(out)]) == 0
    shown = capsys.readouterr().out
    assert ": COMPLETED\n" in shown and "newest metrics: step 22, epoch 0" in shown


@posix
def test_a_failure_here_is_told_with_what_the_process_said(tmp_path, capsys):
    out = tmp_path / "out"
    running = launch("--tasks_per_node", "1", "--", "train", *DIGITS, "--output_dir", str(out),
                     "--data_path", str(tmp_path / "missing"))  # fmt: skip
    _, complained = running.communicate(timeout=300)
    assert running.returncode == 1
    assert "failed: error: " in complained and str(tmp_path / "missing") in complained
    assert "Traceback" not in complained
    assert cli.main(["launch", "status", str(out)]) == 1


@posix
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_here_lets_all_processes_save_and_the_same_command_goes_on(tmp_path, number):
    out = tmp_path / "out"
    words = ["--tasks_per_node", "2", "--", "train", *DIGITS, "--output_dir", str(out),
             "--epochs", "40", "--log_every_steps", "1"]  # fmt: skip
    running = launch(*words)
    until = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(number)
    _, complained = running.communicate(timeout=300)
    assert running.returncode == 128 + number, complained
    step = files.read_weights(out / "checkpoint.pth")["step"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 < step < 40 * 22 and lines[-1]["step"] == step
