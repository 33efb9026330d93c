"""Folders of runs that never ran: healthy, collapsed, short, old, huge; for the report's tests."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig

EACH, WARMUP = 40, 2  # steps of an epoch, epochs of warm-up
COLLAPSES = {
    "uniform collapse": {"entropy": 1.0, "kl": 0.0},
    "one-point collapse": {"entropy": 0.0, "kl": 0.0},
    "dead student": {"entropy": 0.3, "kl": 1.2},
}


def settings(**changes) -> TrainConfig:
    words = {"data_path": "digits", "output_dir": "out", "total_batch_size": 32, "epochs": 20,
             "warmup_epochs": WARMUP, "out_dim": 1024}  # fmt: skip
    read = recipe.read(TrainConfig, "quickstart")
    return replace(fields.create(TrainConfig, read | words), **changes)


def line(step: int, total: int, config: TrainConfig, state: str, each: int, rng) -> dict:
    """A line as the monitor writes it, of a run that is in ``state`` from a fifth of its way on."""
    even, way = math.log(config.out_dim), step / total
    warming = way < 0.1
    grown = 1 - math.exp(-4 * way)
    noise = rng.normal(0, 0.03)
    fault = COLLAPSES.get(state) if way > 0.2 else None
    entropy = even * (fault["entropy"] if fault else 1 - 0.65 * grown) + 0.05 * noise
    entropy = min(max(entropy, 1e-4), even)
    kl = max(fault["kl"] if fault else 0.6 * math.exp(-3 * way) + 0.2 + noise, 0.0)
    spread = 0.01 if fault else 0.25 + 0.6 * grown
    information = 0.002 if fault else even * 0.6 * grown
    name = "warming up" if warming else state if fault else "learning"
    return {
        "step": step,
        "epoch": (step - 1) // each,
        "loss": entropy + kl,
        "grad_norm": 0.8 * math.exp(-2 * way) + 0.1 + abs(noise),
        "loss_ratio": (entropy + kl) / even,
        "teacher_entropy": entropy,
        "kl": kl,
        "prototypes_used": config.out_dim if fault and entropy > 1 else 1 + 800 * grown,
        "spread": spread,
        "effective_rank": 1.1 if fault else 4 + 40 * grown + 10 * noise,
        "view_retrieval": 1 / 32 if fault else min(0.05 + 0.9 * grown + noise, 1.0),
        "teacher_information": information,
        "student_information": 0.8 * information,
        "state": name,
        "lr": 0.005 * min(way / 0.1, 0.5 + 0.5 * math.cos(math.pi * max(way - 0.1, 0) / 0.9)),
        "weight_decay": 0.4 - 0.36 * (0.5 + 0.5 * math.cos(math.pi * way)),
        "momentum": 1 - 0.01 * (0.5 + 0.5 * math.cos(math.pi * way)),
        "teacher_temp": min(0.04 + 0.3 * way, 0.07),
        "skipped": int(way > 0.6),
        "images_per_second": 800 + 900 * noise,
        "data_wait": abs(noise),
    }


HEALTH = ("loss_ratio", "teacher_entropy", "kl", "prototypes_used", "spread", "effective_rank",
          "view_retrieval", "teacher_information", "student_information", "state")  # fmt: skip


def make(
    folder: Path,
    state: str = "learning",
    *,
    done: float = 1.0,
    every: int = 10,
    health: bool = True,
    labels: bool = True,
    probes: int = 6,
    lines: int | None = None,
    config: TrainConfig | None = None,
) -> Path:
    """Write the files of a run, without a checkpoint.

    ``done`` is the share of the run that was done, ``every`` the steps between two lines; with
    ``lines`` there are so many, and the run is as long as that takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, each = config or settings(), EACH
    if lines:
        each = lines * every // config.epochs
    total = config.epochs * each
    rng = np.random.default_rng(0)
    (folder / "config.yaml").write_text(recipe.dump(config), encoding="utf-8")
    steps = range(every, int(done * total) + 1, every)
    rows = [line(step, total, config, state, each, rng) for step in steps]
    if not health:
        rows = [{k: v for k, v in row.items() if k not in HEALTH} for row in rows]
    write_lines(folder / "metrics.jsonl", rows)
    epochs = [
        {"train_loss": row["loss"], "train_lr": row["lr"], "train_wd": row["weight_decay"],
         "epoch": row["epoch"]}
        for row in rows if row["step"] % each == 0
    ]  # fmt: skip
    write_lines(folder / "log.txt", epochs)
    if probes:
        found = [
            probe(folder, epoch, each, labels)
            for epoch in np.linspace(0, int(done * config.epochs), probes).astype(int).tolist()
        ]
        write_lines(folder / "probe.jsonl", found)
    return folder


def probe(folder: Path, epoch: int, each: int, labels: bool) -> dict:
    grown = 1 - math.exp(-epoch / 6)
    sheet = f"looks/epoch{epoch:04}.png"
    (folder / "looks").mkdir(exist_ok=True)
    draw_sheet(epoch).save(folder / sheet)
    found = {
        "step": epoch * each,
        "epoch": epoch,
        "effective_rank": 8 + 30 * grown,
        "view_retrieval": 0.3 + 0.6 * grown,
        "images": 256,
        "seconds": 1.5,
        "sheet": sheet,
        "sentence": "effective rank 36.9, view retrieval 88.0 %; both still rise (since epoch 16).",
    }
    if labels:
        found |= {"knn_top1": 60 + 35 * grown, "knn_k": 20, "knn_bank": 1000, "knn_queries": 300}
    return found


def draw_sheet(epoch: int) -> Image.Image:
    """Small, as it is stored and read many times."""
    sheet = Image.new("RGB", (300, 300), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(8):
        for column in range(7):
            x, y = 7 + 42 * column, 7 + 36 * row
            shade = (37 * row + 11 * epoch + 53 * column) % 256
            draw.rectangle((x, y, x + 31, y + 31), fill=(shade, 255 - shade, 120))
    return sheet


def write_lines(path: Path, rows) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
