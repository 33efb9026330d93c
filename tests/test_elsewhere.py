"""A run goes on elsewhere: with other paths, workers and processes."""

from __future__ import annotations

import shutil

import pytest
from processes import together
from test_train import (  # noqa: F401
    Stopped,
    assert_equal_up_to_rounding,
    metrics,
    pictures,
    result,
    stop_after,
    train,
    whole,
    words,
)

PROGRAM = "import sys; from dino_kit import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_process_goes_on_as_two_in_another_place(
    pictures, whole, tmp_path, monkeypatch, workers  # noqa: F811
):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 3)
        train(pictures, tmp_path / "run")
    shutil.copytree(pictures, tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "renamed")
    flags = ("--num_workers", workers, "--device", "auto", "--batch_size_per_gpu", 4)
    ended = together("-c", PROGRAM, *words(tmp_path / "moved", tmp_path / "renamed", *flags))
    assert [one.status for one in ended] == [0, 0], ended
    assert not any("Warning" in one.said for one in ended), ended
    assert result(tmp_path / "renamed")["step"] == 6
    assert [line["step"] for line in metrics(tmp_path / "renamed")] == [3, 6]
    assert_equal_up_to_rounding(whole, tmp_path / "renamed")
