"""What DINO makes of one family of backbones after another in equal time, told by k-NN.

    python tests/benchmarks/families.py --data_path CIFAR10_5K --output_dir RUNS --minutes 10 --seeds 0 1

Each run is an ordinary ``dino-kit train`` on one core, with as many whole epochs as ``dino-kit bench
fit`` says fit into the minutes; the seeds of a family run side by side, each on a core of its own.
Its probe classifies the test images by k-NN (k 20) before the first epoch and after the last. A run
that is there already is not taken again, so the same command goes on where it was stopped.

    python tests/benchmarks/families.py --output_dir RUNS --figure PICTURE

draws what each family's seed 0 shows of one picture, into ``RUNS/families.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# What all runs share; crops are of whole patches of every family.
COMMON = (
    "--local_crops_number 4 --out_dim 1024 --head_hidden_dim 512 --batch_size_per_gpu 64 "
    "--momentum_teacher 0.99 --use_bn_in_head true --drop_path_rate 0 --warmup_epochs 1 "
    "--local_crops_scale 0.07 0.4 --blur_radius_min 0.011 --blur_radius_max 0.21 --num_workers 0"
)
TINY = "--global_crops_size 24 --local_crops_size 12"  # what dino-kit recipe proposes for 32 pixels
SMALL = "--global_crops_size 32 --local_crops_size 16"  # for patches of 8, windows, convolutions
LARGE = "--global_crops_size 64 --local_crops_size 32"  # for patches of 16 and 32
RATE, HIGH_RATE = "--lr 0.002", "--lr 0.006"  # a ResMLP gains less by the first
FAMILIES = {
    "ViT": f"--arch vit --embed_dim 96 --depth 4 --num_heads 3 --patch_size 4 {TINY} {RATE}",
    "DeepViT": f"--arch deepvit --embed_dim 96 --depth 4 --num_heads 6 --patch_size 4 {TINY} {RATE}",
    "ResMLP": f"--arch resmlp --embed_dim 96 --depth 4 --patch_size 4 {TINY} {HIGH_RATE}",
    "T2T-ViT": f"--arch t2t_vit --embed_dim 96 --depth 4 --num_heads 3 {LARGE} {RATE}",
    "CSWin": f"--arch cswin --embed_dim 24 --arch_options depths=[1,1,2,1] {LARGE} {RATE}",
    "Swin": (
        "--arch timm:swin_tiny_patch4_window7_224 --arch_options patch_size=4 embed_dim=48 "
        f"depths=[2,4] num_heads=[3,6] window_size=4 {SMALL} {RATE}"
    ),
    "XCiT": (
        "--arch timm:xcit_nano_12_p16_224 --arch_options patch_size=8 embed_dim=96 depth=4 "
        f"num_heads=3 {SMALL} {RATE}"
    ),
    "ResNet": f"--arch timm:resnet10t --arch_options channels=[32,64,128,256] {SMALL} {RATE}",
}

SIGHT = 232  # pixels of a panel's side
ACROSS = {4: 24, 8: 16, 16: 12, 32: 8}  # patches along a picture's side, by the patch's own side


class Result(NamedTuple):
    """k-NN top-1 in percent before and after, of one run."""

    before: float
    after: float
    epochs: int
    minutes: float


class Started(NamedTuple):
    folder: Path
    process: subprocess.Popen
    began: float  # by the monotonic clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_path", help="a folder with train/ and test/, a folder for each class")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--figure", type=Path, metavar="PICTURE")
    arguments = parser.parse_args()
    if arguments.figure:
        draw(arguments.output_dir, arguments.figure)
        return
    rows = []
    for family in arguments.only:
        folder = arguments.output_dir / family
        epochs = epochs_that_fit(family, folder, arguments.data_path, arguments.minutes)
        runs = [start(family, folder, arguments.data_path, epochs, n) for n in arguments.seeds]
        rows.append((family, [finish(run, epochs) for run in runs]))
        print(row(*rows[-1]), flush=True)
    print("\n| family | epochs | minutes | untrained | after |\n|---|---|---|---|---|")
    for family, results in rows:
        print(row(family, results))


def row(family: str, results: list[Result]) -> str:
    def all_of(values, form: str) -> str:
        return ", ".join(format(value, form) for value in values)

    return (
        f"| {family} | {results[0].epochs} | {all_of((r.minutes for r in results), '.1f')} | "
        f"{all_of((r.before for r in results), '.1f')} | "
        f"{all_of((r.after for r in results), '.1f')} |"
    )


def epochs_that_fit(family: str, folder: Path, data_path: str, minutes: float) -> int:
    """Whole epochs of one core, of the speed that was measured when the family was first asked for."""
    told = folder / "fit.json"
    if not told.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = f"bench fit {FAMILIES[family]} {COMMON} --data_path {data_path} --json {told}"
        subprocess.run(on_a_core(0, command), env=environment(), check=True)
    fit = json.loads(told.read_text())
    return max(2, round(minutes * 60 * fit["rate"] / fit["images"]))


def start(
    family: str, folder: Path, data_path: str, epochs: int, seed: int
) -> Started:
    out = folder / f"seed{seed}"
    command = (
        f"train {FAMILIES[family]} {COMMON} --epochs {epochs} --seed {seed} --data_path {data_path} "
        f"--probe_data {data_path} --probe_freq {epochs} --output_dir {out}"
    )
    log = (folder / f"seed{seed}.log").open("a")
    run = subprocess.Popen(
        on_a_core(seed % os.cpu_count(), command), env=environment(), stdout=log, stderr=log
    )
    return Started(out, run, time.monotonic())


def finish(started: Started, epochs: int) -> Result:
    out, run, began = started
    if run.wait():
        sys.exit(f"{out} failed; its log is beside it")
    lines = [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]
    accuracies = [line["knn_top1"] for line in (lines[0], lines[-1])]
    minutes = (time.monotonic() - began) / 60
    told = out / "minutes.json"
    if not told.exists():  # of a run that was there already, what it took then
        told.write_text(json.dumps(minutes))
    return Result(*accuracies, epochs, json.loads(told.read_text()))


def draw(folder: Path, picture: Path) -> None:
    """What each family that was run makes of one picture: its own maps, head by head averaged."""
    from PIL import Image

    from dino_kit import figures, weights
    from dino_kit.backbones.maps import KINDS, available
    from dino_kit.evaluators import attention, patches

    image = Image.open(picture).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    sight = image.resize((SIGHT, SIGHT))
    panels = [("the picture", "", sight)]
    colours = figures.colour_table()
    for family in FAMILIES:
        out = folder / family / "seed0"
        if not (out / "checkpoint.pth").exists():
            continue
        loaded = weights.load(out)
        backbone = loaded.backbone
        kind = available(backbone)[0]
        size = backbone.patch_size * ACROSS[backbone.patch_size]
        seen = attention.to_tensor(
            image.resize((size, size), Image.Resampling.BICUBIC),
            loaded.transform.mean, loaded.transform.std,
        )  # fmt: skip
        if kind == "attention":
            values = attention.attention_maps(backbone, seen).mean(0)
        elif kind == "reattention":
            values = attention.reattention_maps(backbone, seen).mean(0)
        elif kind == "classattention":
            values = attention.classattention_maps(backbone, seen).mean(0)
        else:
            kind, values = "similarity", patches.similarity_map(patches.look(backbone, seen))
        panels.append((family, kind, figures.overlay(sight, values.numpy(), colours)))
    shown = {kind: KINDS[kind].shows for _, kind, _ in panels[1:]}
    subtitle = "; ".join(f"{kind}: {shows}" for kind, shows in shown.items())
    sheet = figures.sheet("One picture, as each family sees it", subtitle, panels, columns=3)
    print(f"written to {figures.save(folder / 'families.png', sheet)}")


def on_a_core(core: int, command: str) -> list[str]:
    return ["taskset", "-c", str(core), sys.executable, "-m", "dino_kit", *command.split()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
