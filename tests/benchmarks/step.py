"""A training step, its loss and its update: how fast and how large, against the reference's way.

    taskset -c 0,1 python tests/benchmarks/step.py --precision fp32
    taskset -c 0,1 python tests/benchmarks/step.py --precision bf16
    taskset -c 0,1 python tests/benchmarks/step.py --parts loss update --repeats 5

The reference's way is ``reference_step.py``, beside this file. The ways take turns in one process,
and the median counts, by the clock and by the processor's time, which other work on the machine
disturbs less. In bf16 ours is held against the reference's way in fp32, which is all that its code
does on a CPU, and against the same under autocast. The most memory is of processes of their own,
above what the imports take (of the loss: above its arguments). Crops are 2 × 224 and 8 × 96, of
random numbers: nothing here depends on what they show.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference_step import Step, self_distillation
from torch import Tensor

from dino_kit import ema, sharding
from dino_kit.backbones.build import create_backbone
from dino_kit.config.architectures import VIT_SIZES
from dino_kit.heads import DINOHead
from dino_kit.objectives.centering import Center
from dino_kit.objectives.dino import dino_loss
from dino_kit.student_teacher import build_student_teacher
from dino_kit.training import optim
from dino_kit.training.learner import Learner, MicroBatch
from dino_kit.training.plan import plan_epochs

PROTOTYPES = 65536
VIEWS = ((2, 224), (8, 96))
KEYS = ("seconds", "processor_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="vit_small", choices=list(VIT_SIZES))
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--loss_batch", type=int, default=32, help="images of the loss by itself")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--parts", nargs="+", default=["step"], choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", help="only these, such as ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        part, way = arguments.memory_of
        print(json.dumps(most_memory(PARTS[part](arguments)[way])))
        return
    threads = torch.get_num_threads()
    print(f"{arguments.arch}/16, torch {torch.__version__}, {threads} threads")
    found = {part: measure(part, arguments) for part in arguments.parts}
    if arguments.json:
        settings = {name: getattr(arguments, name) for name in ("arch", "batch", "precision")}
        about = {**settings, "torch": torch.__version__, "threads": threads}
        arguments.json.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a part's table, and return it: for each way seconds, processor's seconds, bytes."""
    ways = {
        way: make
        for way, make in PARTS[part](arguments).items()
        if not arguments.ways or way in arguments.ways
    }
    rows = take_turns({way: make() for way, make in ways.items()}, arguments.repeats)
    for way in ways:
        rows[way]["peak_bytes"] = in_a_process(part, way, arguments)
        if part == "step":
            rows[way]["images_per_second"] = arguments.batch / rows[way]["seconds"]
    print(f"\n{part:24} {'seconds':>9} {'processor':>10} {'img/s':>7} {'memory':>9}   times faster, memory")
    ours = rows.get("ours")
    for way, row in rows.items():
        speed = f"{row['images_per_second']:.2f}" if part == "step" else ""
        ratio = ""
        if ours and way != "ours":
            row["ratio"] = {key: row[key] / ours[key] for key in KEYS}
            row["ratio"]["memory"] = ours["peak_bytes"] / row["peak_bytes"]
            ratio = "{seconds:.2f} ({processor_seconds:.2f}), {memory:.2f}".format(**row["ratio"])
        print(
            f"{way:24} {row['seconds']:9.3f} {row['processor_seconds']:10.3f} {speed:>7} "
            f"{row['peak_bytes'] / 1e6:6.0f} MB   {ratio}"
        )
    return rows


def take_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    for way in ways.values():
        way()  # memory is taken and kernels are chosen
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            before = time.perf_counter(), time.process_time()
            way()
            taken[name].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    return {
        name: dict(
            zip(KEYS, map(statistics.median, zip(*own, strict=True)), strict=True)
        )
        for name, own in taken.items()
    }


def in_a_process(part: str, way: str, arguments: argparse.Namespace) -> int:
    flags = ("arch", "batch", "loss_batch", "precision")
    line = [sys.executable, __file__, "--memory_of", part, way]
    line += [word for flag in flags for word in (f"--{flag}", str(getattr(arguments, flag)))]
    return json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)


def most_memory(make: Callable[[], Callable[[], Any]]) -> int:
    """Bytes that two runs take at most, above what this process has now.

    A part that measures from a later point on says so by an attribute ``begin`` of what it makes.
    """
    before = resident()
    run = make()
    before = getattr(run, "begin", lambda: before)()
    for _ in range(2):
        run()
    return resident("VmHWM") - before


def resident(what: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def steps(arguments: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Any]]]:
    sizes, half = VIT_SIZES[arguments.arch], arguments.precision == "bf16"

    def reference(dtype: torch.dtype | None = None) -> Callable[[], Any]:
        torch.manual_seed(0)
        step = Step(sizes, PROTOTYPES, dtype=dtype)
        crops = [crop for group in groups(arguments.batch) for crop in group]
        return lambda: step(crops)

    def ours() -> Callable[[], Any]:
        one = learner(arguments.arch, arguments.precision)
        batch = MicroBatch(groups(arguments.batch), torch.arange(arguments.batch))
        return lambda: one.step(0, [batch])

    ways = {"reference": reference}
    if half:
        ways["reference, autocast"] = lambda: reference(torch.bfloat16)
    return {**ways, "ours": ours}


def losses(arguments: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Any]]]:
    images, crops = arguments.loss_batch, sum(views for views, _ in VIEWS)

    def way(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        torch.manual_seed(0)
        student = torch.randn(crops, images, PROTOTYPES).requires_grad_()
        teacher, center = torch.randn(2, images, PROTOTYPES), torch.zeros(1, PROTOTYPES)

        def run() -> None:
            student.grad = None
            loss(student, teacher, center).backward()

        run.begin = resident
        return run

    def reference(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        return self_distillation(student.flatten(0, 1), teacher.flatten(0, 1), center, crops)

    def ours(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        return dino_loss(student, teacher, center=center, temperature=0.04).loss

    return {"reference": lambda: way(reference), "ours": lambda: way(ours)}


def updates(arguments: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Any]]]:
    def with_gradients(network: torch.nn.Module) -> list[Tensor]:
        for p in network.parameters():
            if p.requires_grad:
                p.grad = 0.01 * torch.randn_like(p)
        return [p.grad for p in network.parameters() if p.grad is not None]

    def reference() -> Callable[[], Any]:
        step = Step(VIT_SIZES[arguments.arch], PROTOTYPES)
        with_gradients(step.student)
        return step.update

    def ours() -> Callable[[], Any]:
        one = learner(arguments.arch, "fp32")
        gradients = with_gradients(one.student)

        def run() -> None:
            norms = sharding.norms(gradients)
            norms.isfinite().all().item()
            optim.clip_per_tensor_(gradients, norms, one.clip_grad)
            one.optimizer.step()
            ema.update(one.teacher.parameters(), one.student.parameters(), 0.996)

        return run

    return {"reference": reference, "ours": ours}


PARTS = {"step": steps, "loss": losses, "update": updates}


def groups(images: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.randn(views, images, 3, side, side, generator=numbers) for views, side in VIEWS]


def learner(arch: str, precision: str) -> Learner:
    """As ``dino-kit train`` builds it by default, but with the last layer free to move."""
    torch.manual_seed(0)
    backbone, teacher = create_backbone(arch, drop_path_rate=0.1), create_backbone(arch)
    heads = [DINOHead(backbone.embed_dim, PROTOTYPES) for _ in range(2)]
    networks = build_student_teacher(backbone, heads[0], teacher, heads[1])
    plan = plan_epochs(
        epochs=1, steps_per_epoch=1000, lr=1e-4, min_lr=1e-6, warmup_epochs=0, weight_decay=0.04,
        weight_decay_end=0.4, momentum=0.996, warmup_teacher_temp=0.04, teacher_temp=0.04,
        warmup_teacher_temp_epochs=0, freeze_last_layer=0,
    )  # fmt: skip
    optimizer = optim.build_optimizer("adamw", optim.parameter_groups(networks.student))
    return Learner(*networks, Center(PROTOTYPES), optimizer, plan, precision=precision)


if __name__ == "__main__":
    main()
