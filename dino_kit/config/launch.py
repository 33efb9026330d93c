"""Settings of ``dino-kit launch``: the flags of the reference's launcher, and what a site needs.

What is particular to a cluster (partition, account, container, ...) stands in a profile, a YAML file
of these flags: nothing here knows a site.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from dino_kit.config.fields import Checked, option
from dino_kit.errors import UserError

# The reference asks for so much memory for each GPU, and for nodes by this name of its cluster.
GB_PER_GPU = 40
VOLTA_32 = "volta32gb"


@dataclass(frozen=True, kw_only=True)
class Started:
    """Job"""

    command: tuple[str, ...] | None = option(
        None,
        "What to run, with its own flags, after --. Without -- it is train, with all flags that "
        "are not among those below.",
        positional=True,
        nothing="",
    )
    gpus_per_node: int | None = option(
        None,
        "GPUs of each node; each gets a process. 0 for a job on CPUs.",
        low=0,
        nothing="0 with --tasks_per_node; else 8 for train on a cluster, as in the reference, 1 for "
        "other commands there, and all of this machine here",
    )
    ngpus: int | None = option(None, "--gpus_per_node by its older name.", low=0, nothing="")
    tasks_per_node: int | None = option(
        None, "Processes of each node, where there are no GPUs.", low=1, nothing="1"
    )
    job_dir: str | None = option(
        None, "Folder of the job's logs.", nothing="jobs/ in the folder that the command writes to"
    )
    snapshot: bool = option(
        False,
        "Run a copy of the package as it is now, whatever happens to the code before the job "
        "starts, or starts again.",
        switch=True,
    )
    dry_run: bool = option(
        False, "Print what would be started, with the resolved recipe, and start nothing.",
        switch=True,
    )

    def check(self) -> None:
        if None not in (self.gpus_per_node, self.ngpus) and self.gpus_per_node != self.ngpus:
            raise UserError(
                f"--ngpus {self.ngpus} contradicts --gpus_per_node {self.gpus_per_node}; give one."
            )
        gpus = self.gpus
        if gpus and self.tasks_per_node not in (None, gpus):
            raise UserError(
                f"--tasks_per_node {self.tasks_per_node} contradicts {gpus} GPUs a node: each GPU "
                "has one process; --gpus_per_node 0 is for a job on CPUs."
            )

    @property
    def gpus(self) -> int | None:
        """GPUs of a node, by whichever flag they were given."""
        return self.ngpus if self.gpus_per_node is None else self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Cluster"""

    profile: str | None = option(
        None,
        "YAML file of flags of this command that hold for a site; flags given here win over it.",
    )
    nodes: int | None = option(
        None, "Nodes of the cluster.", low=1, nothing="2 for train, as in the reference; else 1"
    )
    timeout: int = option(2800, "Minutes after which Slurm ends the job; it is then queued anew.", low=1)
    partition: str | None = option(None, "Partition of the cluster.", nothing="SBATCH_PARTITION; else the site's own")
    account: str | None = option(None, "Account that pays.", nothing="SBATCH_ACCOUNT; else the user's own")
    qos: str | None = option(None, "Quality of service.", nothing="SBATCH_QOS; else the site's own")
    constraint: str | None = option(None, "Features that the nodes must have.")
    use_volta32: bool = option(
        False, f"The older flag: --constraint {VOLTA_32}.", switch=True
    )
    comment: str | None = option(None, "Comment for the scheduler.")
    job_name: str = option("dino", "Name of the job.")
    cpus_per_task: int = option(10, "CPU cores of each process.", low=1)
    mem_gb: float | None = option(
        None, "Gigabytes of memory of each node.", above=0, nothing=f"{GB_PER_GPU} for each GPU; else the site's own"
    )
    signal_delay: int = option(
        120, "Seconds before the end of its time at which the job is warned, and saves.", low=1
    )
    max_timeouts: int = option(
        30, "How often a job whose time was up is queued again.", low=0
    )
    setup: tuple[str, ...] | None = option(
        None, "Shell lines to run on the first node before the job.", nothing="none"
    )
    sbatch_args: tuple[str, ...] | None = option(
        None, "More of sbatch, each as NAME=VALUE, such as reservation=mine."
    )
    srun_args: tuple[str, ...] | None = option(
        None, "More of srun, each as NAME=VALUE, such as container-image=dino.sqsh."
    )
    container: str | None = option(
        None, "Words to put before Python's, such as apptainer exec --nv dino.sif."
    )
    python: str | None = option(
        None, "Python of the nodes, or of the container.", nothing="the one that runs this"
    )
    array: bool = option(
        False,
        "Run the command once for each of its first words that are no flags, as one array of jobs: "
        "an evaluator over many checkpoints.",
        switch=True,
    )
    array_parallelism: int = option(16, "Jobs of an array that run at a time.", low=1)
    wait: bool = option(
        False, "Stay until the job has ended, and end as it does.", switch=True
    )

    def check(self) -> None:
        if self.use_volta32 and self.constraint not in (None, VOLTA_32):
            raise UserError(
                f"--use_volta32 contradicts --constraint {self.constraint}; give one."
            )
        for flag in ("sbatch_args", "srun_args"):
            for word in getattr(self, flag) or ():
                if word.startswith(("-", "=")):
                    raise UserError(f"--{flag} takes NAME=VALUE without dashes, and got {word!r}.")
        try:
            shlex.split(self.container or "")
        except ValueError:
            raise UserError(
                f"--container is {self.container!r}, in which a quotation mark has no second."
            ) from None


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(Cluster, Started, Checked):
    pass


@dataclass(frozen=True, kw_only=True)
class LocalConfig(Started, Checked):
    pass


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Checked):
    """Status"""

    out: str | None = option(
        None, "The folder that the job's command writes to, or its --job_dir.", positional=True,
        nothing="",
    )
    lines: int = option(10, "Lines of the job's log to show.", low=0)

    def check(self) -> None:
        if not self.out:
            raise UserError("A folder is missing: the one that the job's command writes to.")
