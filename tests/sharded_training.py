"""What each of two processes does in ``test_sharded_training``: ``python sharded_training.py ROOT``."""

from __future__ import annotations

import sys
from pathlib import Path

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


def knn(root: Path, out: str) -> int:
    places = [str(root / "whole"), "--data_path", str(root / "labelled")]
    written = ["--output_dir", str(root / out), "--dump_features", str(root / out)]
    return cli.main(["knn", *places, *written, *KNN])


if __name__ == "__main__":
    root = Path(sys.argv[1])
    # A group is joined once in a process: a second one may meet what is left of the first.
    stop, distributed.stop = distributed.stop, lambda: None
    assert train_an_epoch(root, "begun by two", "--fsdp", "true") == 1
    assert train(root, "begun by one", "--fsdp", "true") == 0
    assert knn(root, "knn by two") == 0
    stop()
