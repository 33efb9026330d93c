"""`dino-kit linear --fast` end to end: the choice of a rate, what is kept, processes, and faults."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from test_linear_command import CLASSES, assert_same, contents, launch, save_backbone, save_images

import dino_kit
from dino_kit import cli, files
from dino_kit.data.loader import epoch_order
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.holding_out import held_out_of
from dino_kit.evaluators import grid_training
from dino_kit.evaluators.grid_training import HELD_OUT_SHARE
from dino_kit.evaluators.linear import LinearHead
from dino_kit.report import results

TOO_HIGH = 1e45  # in float32 without end
FLAGS = ["--epochs", 20, "--total_batch_size", 8, "--num_workers", 0, "--device", "cpu",
         "--lrs", 0.1, 1, 10, TOO_HIGH]  # fmt: skip
TRAIN, VAL = 5 * len(CLASSES), 2 * len(CLASSES)
WRITTEN = {"checkpoint.pth", "checkpoint_linear_fast.pth", "linear_fast.json",
           ".checkpoint_linear_fast.pth.lock"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    save_images(root / "train", TRAIN // len(CLASSES))
    save_images(root / "val", VAL // len(CLASSES))
    return root


def train(data, out, *flags) -> int:
    if not (out / "checkpoint.pth").exists():
        save_backbone(out / "checkpoint.pth")
    words = ["linear", out, "--data_path", data, "--fast", *FLAGS, *flags]
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(data, out) == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def head(out) -> dict:
    return files.read_weights(out / "checkpoint_linear_fast.pth")


def record(out, name: str = "linear_fast.json") -> dict:
    return json.loads((out / name).read_text())


def test_the_files_and_the_record_of_a_training(whole):
    assert {path.name for path in whole.iterdir()} == WRITTEN
    found = record(whole)
    held = held_out_of(FolderSource(found["read"]["train"]), HELD_OUT_SHARE, "held out")
    result = found["results"]["fast"]
    assert (result["epochs"], result["images"], result["train_images"]) == (20, VAL, TRAIN)
    assert found["held_out_images"] == len(held) and len(CLASSES) <= len(held) < TRAIN / 2
    assert [entry["lr"] for entry in found["rates"]] == [0.1, 1, 10, TOO_HIGH]
    assert [entry["diverged"] for entry in found["rates"]] == [False] * 3 + [True]
    assert found["rates"][3]["held_out"] is None and found["rates"][3]["test"] is None
    best = max(
        found["rates"][:3], key=lambda x: (x["held_out"]["top1"], -x["held_out"]["loss"])
    )
    assert result["lr"] == best["lr"]
    assert result["top1"] > 2 * found["largest_class_percent"]
    assert found["best_on_test"]["test"]["top1"] == max(
        entry["test"]["top1"] for entry in found["rates"][:3]
    )
    assert found["head"]["sha256"] == files.sha256(whole / "checkpoint_linear_fast.pth")
    assert found["transform"]["center_crop"] == 16 and found["total_batch_size"] == 8
    content = torch.load(whole / "checkpoint_linear_fast.pth", weights_only=True)
    assert content["epoch"] == 20 and content["best_acc"] == result["top1"]


def test_the_layer_that_is_kept_is_plain_pytorchs_on_all_images(whole, data):
    """At the chosen rate, of the centre of each image, as a classifier prepares it."""
    classifier, source = dino_kit.load_classifier(whole), FolderSource(data / "train")
    with torch.no_grad():
        images = [classifier.prepare(source.name(index)) for index in range(TRAIN)]
        features = classifier.features(torch.stack(images))
    labels = torch.tensor([source.label(index) for index in range(TRAIN)])
    layer = plain(features, labels, record(whole)["results"]["fast"]["lr"] * 8 / 256)
    torch.testing.assert_close(classifier.head.linear.weight, layer.weight, rtol=1e-4, atol=1e-5)


def plain(features, labels, rate):
    layer = LinearHead(features.shape[1], len(CLASSES)).linear
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0)
    for epoch in range(20):
        for batch in torch.from_numpy(epoch_order(0, epoch, len(labels))).split(8):
            loss = torch.nn.functional.cross_entropy(layer(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return layer


def test_the_choice_does_not_look_at_the_images_to_classify(data, whole, tmp_path):
    """Nor does what is learnt: with other labels there, only the numbers on them are others."""
    shutil.copytree(data, tmp_path / "data")
    turned = tmp_path / "data/val"
    for name in CLASSES:
        (turned / name).rename(turned / f"{name}.")
    for name, other in zip(CLASSES, CLASSES[::-1], strict=True):
        (turned / f"{name}.").rename(turned / other)
    assert train(tmp_path / "data", tmp_path / "out") == 0
    one, other = record(whole), record(tmp_path / "out")
    assert other["results"]["fast"]["lr"] == one["results"]["fast"]["lr"]
    for a, b in zip(one["rates"], other["rates"], strict=True):
        assert a["held_out"] == b["held_out"]
    assert other["results"]["fast"]["top1"] != one["results"]["fast"]["top1"]
    for name, value in head(whole)["state_dict"].items():
        assert torch.equal(value, head(tmp_path / "out")["state_dict"][name])


def test_the_tables_and_the_way_on(copy, data, capsys):
    assert train(data, copy, "--resume", "never") == 0
    shown, lr = capsys.readouterr(), record(copy)["results"]["fast"]["lr"]
    held = record(copy)["held_out_images"]
    assert f"{lr:g}  (chosen)" in shown.out and shown.out.count("(chosen)") == 1
    assert shown.out.count("diverged") == 2
    assert f"layers that learnt from {TRAIN - held} images; the {held} held out" in shown.out
    assert f"dino-kit linear {copy} --evaluate --fast --val_data FOLDER" in shown.out
    assert cli.main(
        ["linear", str(copy), "--evaluate", "--fast", "--val_data", str(data / "val"),
         "--num_workers", "0"]
    ) == 0  # fmt: skip
    found, result = record(copy, "linear_fast_evaluate.json"), record(copy)["results"]["fast"]
    assert found["results"] == pytest.approx({k: result[k] for k in found["results"]}, abs=1e-5)


@pytest.mark.parametrize(("lrs", "edge"), [("1e-6 1e-5", "highest"), ("0.1 1e45", "lowest")])
def test_a_rate_at_the_edge_is_told(data, tmp_path, capsys, lrs, edge):
    assert train(data, tmp_path, "--lrs", *lrs.split()) == 0
    assert f"is the {edge} of --lrs; one beyond may be better" in capsys.readouterr().err


def test_a_finished_training_says_so_and_stays(copy, data, capsys, monkeypatch):
    before, numbers = head(copy), record(copy)["results"]
    monkeypatch.setattr("dino_kit.evaluators.grid_training.joined_features", None)
    assert train(data, copy) == 0
    assert "holds this training already, finished" in capsys.readouterr().out
    assert_same(head(copy), before)
    assert record(copy)["results"] == numbers


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", 5], "epochs was 20 and is now 5"),
        (["--lrs", 1, 2], "lrs was [0.1, 1.0, 10.0, 1e+45] and is now [1.0, 2.0]"),
        (["--n_last_blocks", 1], "n_last_blocks was 2 and is now 1"),
    ],
)
def test_a_changed_setting_is_refused_unless_it_is_to_begin_again(
    copy, data, capsys, flags, named
):
    before = contents(copy)
    assert train(data, copy, *flags) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1 and contents(copy) == before
    assert train(data, copy, *flags, "--resume", "never") == 0
    assert contents(copy)["linear_fast.json"] != before["linear_fast.json"]


def test_the_order_of_the_rates_and_repeats_are_the_same_training(copy, data):
    before = contents(copy)["checkpoint_linear_fast.pth"]
    assert train(data, copy, "--lrs", TOO_HIGH, 10, 1, 0.1, 1) == 0
    assert contents(copy)["checkpoint_linear_fast.pth"] == before


def test_neither_way_of_training_takes_up_the_others_layer(copy, data, tmp_path, capsys):
    """Not even where a checkpoint's name gives both layers one name."""
    save_backbone(copy / "fast.pth")
    plain_line = ["linear", str(copy / "fast.pth"), "--data_path", str(data), "--epochs", "1",
                  "--num_workers", "0", "--device", "cpu"]  # fmt: skip
    before = contents(copy)
    assert cli.main(plain_line) == 2
    assert "was not written by dino-kit linear" in capsys.readouterr().err
    assert contents(copy) == before
    out = tmp_path / "out"
    save_backbone(out / "fast.pth")
    assert cli.main([plain_line[0], str(out / "fast.pth"), *plain_line[2:]]) == 0
    assert train(data, out) == 2
    assert "was not written by dino-kit linear" in capsys.readouterr().err


def test_beside_an_ordinary_layer_it_is_named(copy, data):
    line = ["linear", str(copy), "--data_path", str(data), "--epochs", "1", "--num_workers", "0"]
    assert cli.main(line) == 0
    kept = dino_kit.load_classifier(copy).head.linear.weight
    fast = dino_kit.load_classifier(copy / "checkpoint_linear_fast.pth").head.linear.weight
    assert torch.equal(kept, files.read_weights(copy / "checkpoint_linear.pth")["state_dict"][
        "module.linear.weight"])  # fmt: skip
    assert not torch.equal(kept, fast)


def test_a_report_has_its_accuracy(whole):
    rows = results.read(whole, [])
    assert {(row.evaluator, row.setting) for row in rows} == {("linear probe", "--fast")}
    assert [row.metric for row in rows] == ["top-1, %", "top-5, %"]
    assert rows[0].value == record(whole)["results"]["fast"]["top1"]


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_image_is_left_out_and_counted(data, tmp_path, capsys, part):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / part / "gray/1.png").write_bytes(b"no image")
    assert train(tmp_path / "data", tmp_path / "run") == 0
    assert "1.png cannot be read as an image" in capsys.readouterr().err
    found = record(tmp_path / "run")
    assert found["left_out"] == {"train": int(part == "train"), "validation": int(part == "val")}
    assert found["train_images"] == TRAIN - (part == "train")
    assert found["test_images"] == VAL - (part == "val")
    assert found["largest_class_percent"] == pytest.approx(100 * 2 / (12 - (part == "val")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", 1], "--lr 1 is the rate of a training without --fast"),
        (["--val_freq", 2], "--val_freq 2 is of a training without --fast"),
        (["--fast", "off"], "--lrs are the learning rates of --fast"),
        (["--lrs", 0], "--lrs"),
        (["--num_labels", 7], "--num_labels is 7, and the data has 6 classes"),
        (["--evaluate"], "There is no trained head"),
    ],
)
def test_a_fault_is_a_sentence_and_writes_nothing(data, tmp_path, capsys, flags, message):
    assert train(data, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("dino-kit: error: ") and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pth"}


def test_where_every_rate_diverges_the_training_stops_with_a_reason(data, tmp_path, capsys):
    assert train(data, tmp_path, "--lrs", "1e44", "1e45") == 1
    error = capsys.readouterr().err
    assert "diverged at every learning rate from 1e+44 to 1e+45" in error
    assert not (tmp_path / "linear_fast.json").exists()


def test_images_that_cannot_be_divided_are_refused(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/train").glob("*/[1-9].png"):
        path.unlink()
    assert train(tmp_path / "data", tmp_path / "run") == 2
    assert "no class has two images that can be used" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused(data, tmp_path, capsys, monkeypatch):
    joined, asked = grid_training.joined_features, []

    def counted(*args, **how):
        asked.append(how["description"])
        return joined(*args, **how)

    monkeypatch.setattr(grid_training, "joined_features", counted)
    path = save_backbone(tmp_path / "checkpoint.pth")
    content = torch.load(path, weights_only=True)
    content["teacher"]["backbone.norm.bias"][0] = np.nan
    torch.save(content, path)
    assert train(data, tmp_path) == 2
    error = capsys.readouterr().err
    assert "The training images have features that are not finite" in error
    # Other processes take part in both sets, and one that they miss would end them by a traceback.
    assert len(asked) == 2


def test_held_out_images_are_other_ones_than_those_of_a_folder_without_a_split(data):
    """Of what a share of one hash leaves, the same hash would take none but one of each class."""
    source = FolderSource(data / "train")
    one, other = held_out_of(source, 0.5), held_out_of(source, 0.5, "held out")
    assert one != other and held_out_of(source, 0.5, "held out") == other
    labels = [source.label(index) for index in other]
    assert set(labels) == set(range(len(CLASSES)))


@pytest.mark.slow
def test_two_processes_share_the_images_and_give_the_same(data, tmp_path):
    """31 and 13 images, one of each broken, so that shares are uneven."""
    shutil.copytree(data, tmp_path / "odd")
    for part in ("train", "val"):
        more = tmp_path / "odd" / part / "gray"
        shutil.copy(more / "0.png", more / "9.png")
        (more / "1.png").write_bytes(b"no image")
    assert train(tmp_path / "odd", tmp_path / "one") == 0
    save_backbone(tmp_path / "two/checkpoint.pth")
    done = launch(tmp_path / "two", "--data_path", tmp_path / "odd", "--fast", *FLAGS)
    assert done.stdout.count("written to") == 1
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert two["left_out"] == one["left_out"] == {"train": 1, "validation": 1}
    assert two["results"]["fast"] == pytest.approx(one["results"]["fast"], abs=1e-4)
    for name, value in head(tmp_path / "one")["state_dict"].items():
        torch.testing.assert_close(head(tmp_path / "two")["state_dict"][name], value)
