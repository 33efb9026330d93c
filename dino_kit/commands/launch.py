"""``dino-kit launch``: the same command as a job, of a Slurm cluster or of this machine."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dino_kit import log
from dino_kit.cluster import state, submission, waiting
from dino_kit.config import command_line, recipe
from dino_kit.config.commands import COMMANDS
from dino_kit.config.launch import LocalConfig, SlurmConfig, StatusConfig
from dino_kit.errors import UserError

_NODES, _GPUS = 2, 8  # of the reference's launcher, for its one command
JOBS = "jobs"
_METRICS = ("step", "epoch", "state", "loss", "lr", "skipped", "images_per_second")


def slurm(config: SlurmConfig) -> int:
    """Submit; with ``--wait`` stay until the job has ended.

    Returns 0, or 1 where a job that was waited for did not succeed.

    Raises:
        UserError: launcher, command and cluster do not fit.
    """
    lines = _lines(config.command, config.array)
    name, parsed = _parsed(lines)
    train = name == "train"
    gpus = config.gpus
    if gpus is None:
        on_cpus = config.tasks_per_node is not None
        gpus = 0 if on_cpus else _GPUS if train else 1
    nodes = config.nodes or (_NODES if train else 1)
    config = replace(config, nodes=nodes)
    folder = _folder(config, name, parsed[0])
    if config.dry_run:
        code = folder / "code" if config.snapshot else None
        parameters = submission.slurm_parameters(config, gpus, code)
        log.say(submission.slurm_script(parameters, folder, len(lines)).rstrip("\n"))
        _say_recipe(lines, parsed)
        return 0
    submission.prepare_folder(folder)
    code = submission.take_snapshot(folder) if config.snapshot else None
    parameters = submission.slurm_parameters(config, gpus, code)
    entries = submission.submit_to_slurm(config, parameters, folder, lines)
    for entry in entries:
        log.say(f"job {entry.job}: {shlex.join(['dino-kit', *entry.words])}")
    log.say(f"logs in {folder}; how it goes: dino-kit launch status {_shown(folder)}")
    return _wait_for(entries, folder) if config.wait else 0


def _wait_for(entries: Sequence[submission.Submitted], folder: Path) -> int:
    failed = False
    try:
        for entry in entries:
            final = waiting.wait(entry, folder, follow=len(entries) == 1)
            failed |= _tell_failure(entry, folder, final)
    except KeyboardInterrupt:
        log.notice(
            f"The job goes on; scancel {entries[0].job.partition('_')[0]} ends it, and dino-kit "
            f"launch status {_shown(folder)} says how it is."
        )
        raise
    return int(failed)


def _tell_failure(entry: submission.Submitted, folder: Path, final: state.State) -> bool:
    told = waiting.verdict(entry, folder, final)
    if told:
        print(f"dino-kit: stopped: {told}", file=sys.stderr)
    return bool(told)


def local(config: LocalConfig) -> int:
    """Run the job here, and stay until it has ended.

    Returns 0, 1 where it did not succeed, or 128 + the signal's number that ended it.

    Raises:
        UserError: launcher and command do not fit.
    """
    lines = _lines(config.command, array=False)
    name, parsed = _parsed(lines)
    folder = _folder(config, name, parsed[0])
    gpus = config.gpus
    if gpus is None:
        gpus = 0 if config.tasks_per_node is not None else _gpus_here()
    tasks = gpus or config.tasks_per_node or 1
    if config.dry_run:
        log.say(f"{tasks} process(es) on this machine, {gpus} GPU(s), logs in {folder}")
        _say_recipe(lines, parsed)
        return 0
    if not hasattr(signal, "SIGUSR2"):
        raise UserError(
            "dino-kit launch needs the signals of Linux and macOS, and this system has none; "
            "torchrun --nproc_per_node N launch/train.py starts N processes here."
        )
    from dino_kit.cluster import here

    submission.prepare_folder(folder)
    code = submission.take_snapshot(folder) if config.snapshot else None
    # The job's processes would get an interruption from the keyboard, too, and be killed by what
    # starts them before they have saved; so it is passed on, once, as another signal.
    keyboard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        entry, job = here.submit(folder, lines[0], gpus, tasks, code)
    finally:
        signal.signal(signal.SIGINT, keyboard)
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        job._process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        final = waiting.wait(entry, folder, alive=lambda: job._process.poll() is None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        print(f"dino-kit: stopped by {signal.Signals(received[0]).name}.", file=sys.stderr)
        return 128 + received[0]
    return int(_tell_failure(entry, folder, final))


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _lines(words: Sequence[str] | None, array: bool) -> list[tuple[str, ...]]:
    """The command lines of the jobs: one, or with ``array`` one for each of its first words."""
    words = tuple(words or ())
    name, rest = command_line.named(words)
    if name.startswith("launch") or name not in COMMANDS:
        raise UserError(f"{words[0]!r} cannot be launched; give a command such as train or knn.")
    if not array:
        return [words]
    count = next((place for place, word in enumerate(rest) if word.startswith("-")), len(rest))
    if not count:
        raise UserError(
            "--array starts a job for each word between the command and its first flag, and there "
            "is none: name checkpoints there, as in knn OUT/checkpoint*.pth --data_path FOLDER."
        )
    return [(*name.split(), word, *rest[count:]) for word in rest[:count]]


def _parsed(lines: Sequence[Sequence[str]]) -> tuple[str, list[Any]]:
    """The command and its configurations. Raises :class:`UserError` where one does not fit."""
    name, _ = command_line.named(lines[0])
    return name, [command_line.parse(name, command_line.named(line)[1]) for line in lines]


def _folder(config: SlurmConfig | LocalConfig, name: str, parsed: Any) -> Path:
    """Where the logs go: by the run's folder, and not by the job's id, so that it can be found."""
    if config.job_dir:
        return Path(config.job_dir).absolute()
    for field in ("output_dir", "weights", "out"):
        value = getattr(parsed, field, None)
        if value and field == "weights" and not Path(value).exists():
            raise UserError(
                f"There is no checkpoint {value}; where another job is to write it first, give "
                "--job_dir for the logs of this one."
            )
        if value:
            path = Path(value)
            beside = path.is_file() and field != "output_dir"
            return (path.parent if beside else path).absolute() / JOBS
    raise UserError(f"dino-kit {name} has no folder of its own; give --job_dir for the job's logs.")


def _shown(folder: Path) -> str:
    """``folder`` as ``launch status`` takes it."""
    return shlex.quote(str(folder.parent if folder.name == JOBS else folder))


def _say_recipe(lines: Sequence[Sequence[str]], parsed: Sequence[Any]) -> None:
    for line in lines:
        log.say(f"\n# {shlex.join(['dino-kit', *line])}")
    log.say("")
    log.say(recipe.dump(parsed[0]).rstrip("\n"))


def status(config: StatusConfig) -> int:
    """One screen: the last job's state, what it wrote last, and the newest metrics.

    Returns 0, or 1 where the job has failed.

    Raises:
        UserError: no job was launched for the folder.
    """
    run, folder = Path(config.out), Path(config.out) / JOBS
    if not (folder / submission.SUBMITTED).is_file():
        run, folder = run.parent, run
    entries = submission.read_submitted(folder)
    if not entries:
        raise UserError(f"No job was launched for {config.out}; dino-kit launch starts one.")
    array = entries[-1].job.partition("_")[0]
    last = [entry for entry in entries if entry.job.partition("_")[0] == array]
    failures = ""
    for entry in last:
        now = state.state_of(entry, folder)
        log.say(f"job {entry.job}: {now}")
        log.say(f"  {textwrap.shorten(shlex.join(['dino-kit', *entry.words]), 200)}")
        if now.ended and not failures:
            failures = waiting.verdict(entry, folder, now)
    _say_metrics(run / "metrics.jsonl")
    log_file = last[-1].path(folder, "stdout")
    log.say(f"{log_file}:")
    for line in waiting.tail(log_file, config.lines):
        log.say(f"  {line}")
    if failures:
        print(f"dino-kit: stopped: {failures}", file=sys.stderr)
    return int(bool(failures))


def _say_metrics(path: Path) -> None:
    for line in reversed(waiting.tail(path, 2)):  # the last one may be half written
        try:
            values = json.loads(line)
        except ValueError:
            continue
        told = [(name.replace("_", " "), values[name]) for name in _METRICS if name in values]
        shown = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in told
        ]
        log.say(f"newest metrics: {', '.join(shown)}")
        return
