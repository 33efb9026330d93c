"""From the settings of a launch to a job in the queue: its script, its folder, its record."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino_kit import files, journal, log
from dino_kit.cluster.job import Job
from dino_kit.config.launch import GB_PER_GPU, VOLTA_32, SlurmConfig
from dino_kit.errors import UserError

SUBMITTED = "submitted.jsonl"
# What people set once in their shells: sbatch reads SBATCH_ACCOUNT and its like.
OF_THE_SHELL = ("partition", "account", "qos")
# A signal before Python has its handlers would end the job; ignored, it leaves the requeue to Slurm.
_START = 'trap "" TERM USR2; exec {python} "$@"'


@dataclass(frozen=True)
class Submitted:
    """A line of ``submitted.jsonl``: a job, or one element of an array."""

    job: str  # its id
    cluster: str  # slurm or local
    words: list[str]  # the command line, without dino-kit
    tasks: int
    host: str  # where it was submitted
    time: float  # when, in seconds since 1970

    def path(self, folder: str | Path, name: str, task: int = 0) -> Path:
        """One of submitit's files: ``stdout``, ``stderr`` or ``result_pickle`` of a process."""
        from submitit.core.utils import JobPaths

        return getattr(JobPaths(folder, self.job, task), name)


def read_submitted(folder: str | Path) -> list[Submitted]:
    """The jobs of ``folder`` in the order in which they were submitted.

    A line that is no record, as one half written, is passed over with a notice.
    """
    path, found = Path(folder) / SUBMITTED, []
    if not path.is_file():
        return []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            found.append(Submitted(**json.loads(line)))
        except (ValueError, TypeError):
            log.notice(f"Line {number} of {path} is no record of a job, and is passed over.")
    return found


def slurm_parameters(config: SlurmConfig, gpus: int, code: Path | None) -> dict[str, Any]:
    """What submitit's Slurm executor takes, for a job of ``gpus`` a node (0: on CPUs)."""
    setup = [
        # Since Slurm 22.05 srun does not follow sbatch in this.
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        # All cores of the node for each of its processes would be too many.
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
        *(f"export {name}={shlex.quote(value)}" for name, value in code_variables(code).items()),
        *(config.setup or ()),
    ]
    python = shlex.quote(config.python) if config.python else '"$0"'
    memory = config.mem_gb or (GB_PER_GPU * gpus if gpus else None)
    parameters = {
        "job_name": config.job_name,
        "nodes": config.nodes,
        "ntasks_per_node": gpus or config.tasks_per_node or 1,
        "gpus_per_node": gpus or None,
        "cpus_per_task": config.cpus_per_task,
        "mem": f"{round(memory * 1024)}MB" if memory else None,
        "time": config.timeout,
        "signal_delay_s": config.signal_delay,
        **{name: getattr(config, name) or _of_the_shell(name) for name in OF_THE_SHELL},
        "constraint": VOLTA_32 if config.use_volta32 else config.constraint,
        "comment": config.comment,
        "array_parallelism": config.array_parallelism,
        "setup": setup,
        "srun_args": [
            "--kill-on-bad-exit=1",
            *(f"--{word}" for word in config.srun_args or ()),
            *shlex.split(config.container or ""),
            *("sh", "-c", _START.format(python=python)),
        ],
        # Without this a cluster whose JobRequeue is 0 would end the job where it should go on.
        "additional_parameters": {
            "requeue": True,
            **dict(_named(word) for word in config.sbatch_args or ()),
        },
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _of_the_shell(name: str) -> str | None:
    """sbatch's own variable, which it does not get to see; in a job it would be that job's."""
    return None if "SLURM_JOB_ID" in os.environ else os.environ.get(f"SBATCH_{name.upper()}")


def _named(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    return name, value if equals else True


def slurm_script(parameters: dict[str, Any], folder: Path, jobs: int) -> str:
    """The text that sbatch would be given."""
    from submitit.slurm import slurm

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    count = {"map_count": jobs} if jobs > 1 else {}
    return slurm._make_sbatch_string(command=command, folder=folder, **parameters, **count)


def submit_to_slurm(
    config: SlurmConfig, parameters: dict[str, Any], folder: Path, lines: Sequence[Sequence[str]]
) -> list[Submitted]:
    """Put a job for each command line in the queue; several are one array.

    Raises:
        UserError: there is no Slurm here, or it refuses the job.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "sbatch and srun are not here: submit from a machine of the cluster, or run "
            "dino-kit launch local."
        )
    executor = submitit.SlurmExecutor(folder, max_num_timeout=config.max_timeouts)
    executor.update_parameters(**parameters)
    try:
        # submitit prints what sbatch says, and so do we.
        with outside_of_a_job(), redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(Job(words)) for words in lines]
    except FailedJobError as error:
        told = "; ".join(
            line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()
        )
        raise UserError(f"Slurm refuses the job: {told}") from error
    tasks = parameters["nodes"] * parameters["ntasks_per_node"]
    return [
        record(folder, job.job_id, "slurm", words, tasks)
        for job, words in zip(jobs, lines, strict=True)
    ]


def record(folder: Path, job: str, cluster: str, words: Sequence[str], tasks: int) -> Submitted:
    entry = Submitted(str(job), cluster, list(words), tasks, socket.gethostname(), time.time())
    journal.append_whole(folder / SUBMITTED, f"{json.dumps(asdict(entry))}\n".encode())
    return entry


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Within, nothing says that this is a job itself, which a job submitted from it would inherit."""
    from submitit.helpers import clean_env

    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration:  # says where the cluster is, not which job this is
            os.environ["SLURM_CONF"] = configuration
        yield


def take_snapshot(folder: Path) -> Path:
    """Copy the package as it is now into ``folder``; returns where to import it from.

    Raises:
        UserError: Python could not import it from there.
    """
    target = folder / time.strftime("code_%Y%m%d_%H%M%S")
    code_variables(target)
    package = Path(files.__file__).parent
    shutil.copytree(
        package, target / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp")
    )
    return target


def code_variables(code: Path | None) -> dict[str, str]:
    """The environment in which Python imports the package from ``code``."""
    if code is None:
        return {}
    if os.pathsep in str(code):
        raise UserError(
            f"Python cannot import from {code}: {os.pathsep} stands between two of its folders; give "
            "--snapshot another --job_dir."
        )
    if sys.version_info < (3, 11) and Path(Path(files.__file__).parent.name).is_dir():
        raise UserError(
            "Before Python 3.11 the folder that a job is started in comes first, and this one holds "
            "the package; start --snapshot from another folder."
        )
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def prepare_folder(folder: Path) -> None:
    """Make the folder of the logs. Raises :class:`UserError` where it cannot be one."""
    if "%" in str(folder):
        raise UserError(
            f"The job's logs cannot be in {folder}: for % Slurm puts numbers into the path; give "
            "another --output_dir or --job_dir."
        )
    files.require_folder("job_dir", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
