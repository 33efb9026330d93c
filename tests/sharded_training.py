"""What each of several processes does in ``test_sharded_training`` and ``test_shards``.

``python sharded_training.py ROOT RUN…``, with names of ``RUNS``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_run import TINY

from dino_kit import cli, distributed
from dino_kit.errors import RunFailed
from dino_kit.training.run import Run

FLAGS = [*TINY, *["--epochs", "2", "--warmup_epochs", "1", "--lr", "0.05", "--probe_freq", "1", "--norm_last_layer", "false"]]
KNN = ["--nb_knn", "1", "3", "--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "3"]


def train(root: Path, out: str, *flags: str) -> int:
    places = ["--data_path", str(root / "pictures"), "--output_dir", str(root / out)]
    return cli.main(["train", *places, *FLAGS, *flags])


def train_an_epoch(root: Path, out: str, *flags: str) -> int:
    look = Run.look

    def stop(run: Run, done: int) -> None:
        look(run, done)
        if done:
            raise RunFailed("An epoch is enough.")

    Run.look = stop
    try:
        return train(root, out, *flags)
    finally:
        Run.look = look


def save_images(folder: Path, images: int) -> None:
    rng = np.random.default_rng(images)
    for number in range(images):
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (20, 24, 3)) + 5 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")


def assert_close_run(whole: dict, other: dict) -> None:
    """Two checkpoints of one run that differ by what is rounded in another order."""
    assert list(other) == list(whole) and other["step"] == whole["step"] == 4
    for network in ("student", "teacher"):
        assert list(other[network]) == list(whole[network])
        for tensor, value in whole[network].items():
            found = other[network][tensor]
            if tensor.endswith("attn.qkv.bias"):  # the key's part has no true gradient
                found, value = (torch.cat((x[:24], x[48:])) for x in (found, value))
            assert type(found) is torch.Tensor
            assert (found - value).norm() <= 1e-4 * value.norm() + 1e-12, tensor
    moments, expected = (c["optimizer"]["state"] for c in (other, whole))
    assert {n: {k: v.shape for k, v in s.items()} for n, s in moments.items()} == {
        n: {k: v.shape for k, v in s.items()} for n, s in expected.items()
    }
    assert other["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


def knn(root: Path, out: str) -> int:
    places = [str(root / "whole"), "--data_path", str(root / "labelled")]
    written = ["--output_dir", str(root / out), "--dump_features", str(root / out)]
    return cli.main(["knn", *places, *written, *KNN])


FSDP = ["--fsdp", "true"]
SHARDS = [*FSDP, "--checkpoint_shards", "true"]
NORMS = [*SHARDS, "--optimizer", "lars", "--use_bn_in_head", "true"]
RUNS = {
    "begun by two": lambda root: train_an_epoch(root, "begun by two", *FSDP) == 1,
    "begun by one": lambda root: train(root, "begun by one", *FSDP) == 0,
    "knn by two": lambda root: knn(root, "knn by two") == 0,
    "in shards": lambda root: train(root, "in shards", *SHARDS, "--saveckp_freq", "1") == 0,
    "begun in shards": lambda root: train_an_epoch(root, "begun in shards", *SHARDS) == 1,
    "ended in shards": lambda root: train(root, "ended in shards", *SHARDS) == 0,
    "norms": lambda root: train(root, "norms", *NORMS) == 0,
    "norms, begun": lambda root: train_an_epoch(root, "norms in two", *NORMS) == 1,
    "norms, ended": lambda root: train(root, "norms in two", *NORMS) == 0,
    "ended by four": lambda root: train(root, "ended by four", *SHARDS) == 0,
}


if __name__ == "__main__":
    root, names = Path(sys.argv[1]), sys.argv[2:]
    # A group is joined once in a process: a second one may meet what is left of the first.
    stop, distributed.stop = distributed.stop, lambda: None
    for name in names:
        assert RUNS[name](root), name
    stop()
