"""``--fsdp`` and evaluation over two processes, by their commands: files and figures are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharded_training
import torch
from processes import run_together
from sharded_training import assert_close_run, knn, save_images, train, train_an_epoch

import dino_kit
from dino_kit import files


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One run by one process; two that change after an epoch, from one to two and from two to one."""
    root = tmp_path_factory.mktemp("sharded")
    save_images(root / "pictures", 20)
    save_images(root / "labelled/train", 15)
    save_images(root / "labelled/val", 8)
    (root / "labelled/train/class0/2.png").write_bytes(b"no image")
    assert train(root, "whole") == 0
    assert train_an_epoch(root, "begun by one") == 1
    runs = ("begun by two", "begun by one", "knn by two")
    run_together(sharded_training.__file__, str(root), *runs)
    assert train(root, "begun by two") == 0
    assert knn(root, "knn by one") == 0
    return root


@pytest.mark.parametrize("name", ["begun by one", "begun by two"])
def test_a_run_goes_on_sharded_and_whole_again(root, name):
    whole, other = (files.read_weights(root / run / "checkpoint.pth") for run in ("whole", name))
    assert_close_run(whole, other)


@pytest.mark.parametrize("name", ["begun by one", "begun by two"])
def test_the_probes_of_a_sharded_teacher_are_those_of_a_whole_one(root, name):
    def probes(run: str) -> list[dict]:
        return [json.loads(line) for line in (root / run / "probe.jsonl").read_text().splitlines()]

    whole, other = probes("whole"), probes(name)
    assert [probe["step"] for probe in other] == [probe["step"] for probe in whole] == [0, 2, 4]
    for one, expected in zip(other, whole, strict=True):
        assert one["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-3)


def test_an_evaluator_reads_a_checkpoint_that_two_processes_wrote(root):
    loaded = dino_kit.load_backbone(root / "begun by one")
    whole = dino_kit.load_backbone(root / "whole")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), whole(images), rtol=1e-3, atol=1e-3)


def test_knn_by_two_processes_gives_the_numbers_of_one(root):
    one, two = (json.loads((root / f"knn by {n}" / "knn.json").read_text()) for n in ("one", "two"))
    different = {"command", "settings"}
    assert {k: v for k, v in two.items() if k not in different} == {
        k: v for k, v in one.items() if k not in different
    }
    assert [Path(name).name for name in one["left_out"]["bank"]] == ["2.png"]
    for name in ("trainfeat", "trainlabels", "testfeat", "testlabels"):
        tensors = [torch.load(root / f"knn by {n}" / f"{name}.pth") for n in ("one", "two")]
        torch.testing.assert_close(*tensors)


def test_shards_are_not_compiled(root, capsys):
    assert train(root, "compiled", "--fsdp", "true", "--compile", "true") == 2
    assert "--fsdp true and --compile true do not go together" in capsys.readouterr().err


def test_fsdp_on_one_process_is_a_run_as_any_other(root, capsys):
    assert train(root, "alone", "--fsdp", "true") == 0
    assert "--fsdp has no effect on one process" in capsys.readouterr().err
    whole, alone = (files.read_weights(root / run / "checkpoint.pth") for run in ("whole", "alone"))
    for name, value in whole["student"].items():
        assert torch.equal(alone["student"][name], value)
