"""A real Slurm of four nodes on one Debian machine, for the tests of ``dino-kit launch slurm``.

    python tests/slurm/cluster.py up        # as root; what runs already is left as it is
    . /tmp/dino_kit_slurm/environment       # where sbatch, srun and submitit find it
    pytest -m slurm
    python tests/slurm/cluster.py down

Controller, node daemons, accounting (submitit reads the states of jobs from it) and munge are the
real ones, under a folder of their own and without systemd and cgroups. The nodes are four daemons
on this machine, which claim more cores than it has. Partition ``main`` has the nodes one and two;
``low`` and ``high`` share three and four, and a job of ``high`` takes them from one of ``low``, which
has 30 seconds of grace, or none in ``now``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("DINO_KIT_SLURM_FOLDER", "/tmp/dino_kit_slurm"))
NODES = ("one", "two", "three", "four")
PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge",
            "slurmdbd": "slurmdbd", "mariadbd": "mariadb-server-core",
            "mariadb": "mariadb-client-core"}  # fmt: skip
MARK = "# dino_kit tests"  # at the end of our lines of /etc/hosts
DATABASE_PORT, ACCOUNTING_PORT, CONTROLLER_PORT, NODE_PORT = 33306, 6819, 6817, 17001
MUNGE = f"{FOLDER}/munge/socket"
ENVIRONMENT = {**os.environ, "SLURM_CONF": f"{FOLDER}/slurm.conf", "LC_ALL": "C",
               "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}  # fmt: skip


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, text=True, **options)


def up() -> None:
    if os.getuid():
        sys.exit("Only root can start a Slurm.")
    install()
    write_files()
    start("munged", "munged", f"--socket={MUNGE}", f"--key-file={FOLDER}/munge/key", "--force",
          f"--pid-file={pid_file('munged')}", f"--log-file={FOLDER}/log/munged.log",
          f"--seed-file={FOLDER}/munge/seed")  # fmt: skip
    start_database()
    start("slurmdbd", "slurmdbd")
    until("slurmdbd", lambda: answers(ACCOUNTING_PORT))
    clusters = run("sacctmgr", "-n", "list", "cluster", "format=cluster", capture_output=True)
    if "tests" not in clusters.stdout.split():
        run("sacctmgr", "-i", "add", "cluster", "tests", check=True, stdout=subprocess.DEVNULL)
    start("slurmctld", "slurmctld")
    until("slurmctld", lambda: not run("scontrol", "ping", capture_output=True).returncode)
    for node in NODES:
        start(f"slurmd-{node}", "slurmd", "-N", node)
    until("the nodes", nodes_are_idle)
    variables = {"SLURM_CONF": ENVIRONMENT["SLURM_CONF"]}
    (FOLDER / "environment").write_text("".join(f"export {n}={v}\n" for n, v in variables.items()))
    print(f"Slurm is up; . {FOLDER}/environment")


def install() -> None:
    missing = [package for program, package in PROGRAMS.items()
               if not shutil.which(program, path=ENVIRONMENT["PATH"])]  # fmt: skip
    if not missing:
        return
    # The packages would start services of their own, where there is a systemd.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**ENVIRONMENT, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *words], env=environment, check=True)
    finally:
        if ours:
            policy.unlink()


def write_files() -> None:
    for name in ("munge", "log", "pid", "state", "database", *(f"spool/{node}" for node in NODES)):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
    for name in (".", "munge", "log", "pid"):
        (FOLDER / name).chmod(0o755)
    key = FOLDER / "munge/key"
    if not key.exists():
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    # Nodes are found by their names, and so is this machine by gloo.
    for name in (host, *NODES):
        if run("getent", "hosts", name, capture_output=True).returncode:
            with open("/etc/hosts", "a") as file:
                file.write(f"127.0.0.1 {name} {MARK}\n")
    told = run("slurmctld", "-V", capture_output=True, check=True).stdout
    version = tuple(map(int, re.findall(r"\d+", told)[:2]))
    # A job that makes way is sent its --signal by another setting since 23.11.
    user_signal = ("PreemptParameters=send_user_signal" if version >= (23, 11)
                   else "SlurmctldParameters=preempt_send_user_signal")  # fmt: skip
    if version >= (23, 11):
        (FOLDER / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={NODE_PORT + place} CPUs=16 "
        "RealMemory=3000 State=UNKNOWN"
        for place, node in enumerate(NODES)
    )
    (FOLDER / "slurm.conf").write_text(f"""\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential is good: two minutes by default, 5 s at least.
AuthInfo=socket={MUNGE},cred_expire=5
SlurmctldPort={CONTROLLER_PORT}
SlurmctldPidFile={FOLDER}/pid/slurmctld
SlurmdPidFile={FOLDER}/pid/slurmd-%n
SlurmctldLogFile={FOLDER}/log/slurmctld.log
SlurmdLogFile={FOLDER}/log/slurmd-%n.log
StateSaveLocation={FOLDER}/state
SlurmdSpoolDir={FOLDER}/spool/%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ACCOUNTING_PORT}
AccountingStoragePass={MUNGE}
{nodes}
PartitionName=main Nodes=one,two Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=three,four PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=now Nodes=three,four PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=three,four PriorityTier=100 PreemptMode=OFF
""")
    accounting = FOLDER / "slurmdbd.conf"
    accounting.touch(0o600)
    accounting.write_text(f"""\
AuthType=auth/munge
AuthInfo=socket={MUNGE}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ACCOUNTING_PORT}
SlurmUser=root
LogFile={FOLDER}/log/slurmdbd.log
PidFile={FOLDER}/pid/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={DATABASE_PORT}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
""")


def start_database() -> None:
    database = FOLDER / "database"
    if not (database / "mysql").exists():
        run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={database}",
            "--skip-test-db", check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    accounts = "\n".join(
        f"CREATE USER IF NOT EXISTS 'slurm'@'{host}' IDENTIFIED BY 'slurm';\n"
        f"GRANT ALL ON slurm.* TO 'slurm'@'{host}';"
        for host in ("127.0.0.1", "localhost")
    )
    (FOLDER / "accounts.sql").write_text(f"CREATE DATABASE IF NOT EXISTS slurm;\n{accounts}\n")
    if not process("mariadbd"):
        with open(FOLDER / "log/mariadbd.log", "ab") as file:
            subprocess.Popen(
                ["mariadbd", "--no-defaults", "--user=root", f"--datadir={database}",
                 f"--socket={FOLDER}/database.socket", f"--pid-file={pid_file('mariadbd')}",
                 "--bind-address=127.0.0.1", f"--port={DATABASE_PORT}", "--skip-log-bin",
                 f"--init-file={FOLDER}/accounts.sql", "--innodb-buffer-pool-size=32M",
                 "--innodb-flush-log-at-trx-commit=0", "--skip-name-resolve"],
                env=ENVIRONMENT, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=file, stderr=file,
            )  # fmt: skip
    until("mariadbd", lambda: answers(DATABASE_PORT))


def start(name: str, *command: str) -> None:
    """Start a daemon, which goes to the background by itself, unless it runs."""
    if not process(name):
        run(*command, check=True)


def pid_file(name: str) -> Path:
    return FOLDER / "pid" / name


def process(name: str) -> int | None:
    """The process of one of our daemons, while it runs."""
    try:
        number = int(pid_file(name).read_text())
        running = Path(f"/proc/{number}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return number if running == name.partition("-")[0] else None


def answers(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def nodes_are_idle() -> bool:
    listed = run("sinfo", "-h", "-N", "-o", "%N %T", capture_output=True).stdout
    states = dict(line.split() for line in listed.splitlines())
    for node, state in states.items():
        if re.match("drain|down|inval|fail", state):  # from a state saved earlier
            run("scontrol", "update", f"NodeName={node}", "State=RESUME", capture_output=True)
    return set(states) == set(NODES) and set(states.values()) == {"idle"}


def until(what: str, ready) -> None:
    for _ in range(600):
        if ready():
            return
        time.sleep(0.1)
    for log in sorted((FOLDER / "log").glob("*.log")):
        print(f"== {log}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")
    sys.exit(f"{what} did not come up; the logs are in {FOLDER}/log.")


def down() -> None:
    if process("slurmctld"):  # no process of a job outlives the daemons
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            run("scancel", f"--state={state}")
        for _ in range(300):
            if not run("squeue", "-h", capture_output=True).stdout.strip():
                break
            time.sleep(0.1)
    for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "slurmdbd", "mariadbd", "munged"):
        number = process(name)
        if number is None:
            continue
        os.kill(number, signal.SIGTERM)
        for _ in range(150):
            if process(name) is None:
                break
            time.sleep(0.1)
        else:
            os.kill(number, signal.SIGKILL)
    hosts = Path("/etc/hosts")
    lines = hosts.read_text().splitlines(keepends=True)
    if any(MARK in line for line in lines):  # in place, because it can be a mount
        hosts.write_text("".join(line for line in lines if MARK not in line))
    shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    {"up": up, "down": down}[sys.argv[1]]()
