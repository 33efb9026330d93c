"""Of several processes one lists the images, and the others read what it kept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar

from dino_kit.backbones.build import create_backbone

# What each process does: open images in all ways while it is counted how often they are looked for.
PROGRAM = """
import json, os, sys
import torch
from dino_kit import cli, distributed
from dino_kit.data.sources import folder
from dino_kit.data.sources.archive import Archive
from dino_kit.data.sources.opening import open_labelled_sources, open_training_source
from dino_kit.data.sources.source import fingerprint

root, found, counts = sys.argv[1], {}, {"folders": 0, "archives": 0}
of, members = folder._Listing.of.__func__, Archive.members

def listed(kind, path):
    counts["folders"] += 1
    return of(kind, path)

def indexed(archive):
    counts["archives"] += 1
    return members(archive)

folder._Listing.of, Archive.members = classmethod(listed), indexed

def note(name, names):
    found[name] = {**counts, "names": names}
    counts.update(folders=0, archives=0)

distributed.start(torch.device("cpu"))
for name in ("folder", "x.tar", "shards", "halves", "halves of shards"):
    source = open_training_source(os.path.join(root, name), os.path.join(root, "lists"))
    note(name, fingerprint(source))
for name in ("halves", "halves of shards"):
    pair = open_labelled_sources(os.path.join(root, name), lists=os.path.join(root, "lists 2"))
    note(f"{name}, labelled", [fingerprint(source) for source in pair])
distributed.stop()
line = ["linear", os.path.join(root, "run"), "--data_path", os.path.join(root, "halves"),
        "--device", "cpu", "--epochs", "1", "--num_workers", "0", "--batch_size_per_gpu", "4"]
assert cli.main(line) == 0
note("linear", None)
with open(os.path.join(root, f"{distributed.rank()}.json"), "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """For each process and way: how many folders and archives were gone through, and what came."""
    root = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    path = root / "1.png"
    Image.fromarray(pixels).save(path)
    names = [f"{kind}/{number}.png" for kind in "ab" for number in range(4)]
    members = {name: path.read_bytes() for name in names}
    for place in ("folder", "halves/train", "halves/val"):
        for name, content in members.items():
            (root / place / name).parent.mkdir(parents=True, exist_ok=True)
            (root / place / name).write_bytes(content)
    for place in ("x.tar", "shards/0.tar", "shards/1.tar", "halves of shards/train/0.tar",
                  "halves of shards/val/0.tar"):  # fmt: skip
        write_tar(root / place, members)
    for place in ("folder", "halves"):
        for folder in (root / place, *(root / place).rglob("*/")):
            os.utime(folder, (1e9, 1e9))  # a list of what has changed just now is not relied on
    backbone = create_backbone("vit", image_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    config = {"arch": "vit", "global_crops_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1,
              "num_heads": 2}  # fmt: skip
    (root / "run").mkdir()
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"teacher": state, "config": config}, root / "run/checkpoint.pth")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(root)], env=os.environ | group,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                cwd=Path(__file__).parent.parent,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "way, folders, archives",
    [("folder", 1, 0), ("x.tar", 0, 1), ("shards", 0, 2), ("halves", 1, 0),
     ("halves of shards", 0, 1), ("halves, labelled", 2, 0), ("halves of shards, labelled", 0, 2),
     ("linear", 2, 0)],
)  # fmt: skip
def test_one_process_lists_and_the_other_reads_its_list(found, way, folders, archives):
    main, other = (of_process[way] for of_process in found)
    assert (main["folders"], main["archives"]) == (folders, archives)
    assert (other["folders"], other["archives"]) == (0, 0)
    assert main["names"] == other["names"]
