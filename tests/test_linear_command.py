"""`dino-kit linear` end to end: what it writes, resume, processes, heads in use, and faults."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import together
from torch import nn

import dino_kit
from dino_kit import cli, files, locks
from dino_kit.backbones.build import create_backbone
from dino_kit.data.crops import sample_crop
from dino_kit.data.loader import epoch_order
from dino_kit.data.sources.folder import FolderSource
from dino_kit.errors import UserError
from dino_kit.evaluators.head_training import HeadTraining
from dino_kit.evaluators.linear import LinearFeatures, LinearHead, training_view
from dino_kit.normalize import Normalize
from dino_kit.randomness import stream

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
CLASSES = ["black", "dark", "gray", "light", "pale", "white"]
FLAGS = "--epochs 3 --lr 2 --total_batch_size 8 --num_workers 0 --device cpu".split()
TRAIN, VAL = 5 * len(CLASSES), 2 * len(CLASSES)  # images: three steps of 8 and one of 6 an epoch
WRITTEN = {"checkpoint.pth", "checkpoint_linear.pth", "linear.json", "linear_log.txt",
           ".checkpoint_linear.pth.lock"}  # fmt: skip


def save_backbone(path: Path, seed: int = 0) -> Path:
    """A checkpoint of a run, of which teacher and student differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = [create_backbone("vit", image_size=16, **SIZES) for _ in range(2)]
    states = [
        {f"backbone.{name}": value for name, value in network.state_dict().items()}
        for network in networks
    ]
    config = {"arch": "vit", "global_crops_size": 16, **SIZES}
    content = {"teacher": states[0], "student": states[1], "config": config, "epoch": 3, "step": 9}
    torch.save(content, path)
    return path


def save_images(root: Path, per_class: int, classes=CLASSES) -> Path:
    """Noise, the lighter the later in the alphabet its class is."""
    rng = np.random.default_rng(per_class)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            light = 36 * CLASSES.index(name)
            pixels = rng.integers(light, light + 60, (20, 24 + number, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    save_images(root / "train", TRAIN // len(CLASSES))
    save_images(root / "val", VAL // len(CLASSES))
    return root


def words(data, out, *flags) -> list[str]:
    return ["linear", str(out), "--data_path", str(data), *FLAGS, *(str(flag) for flag in flags)]


def train(data, out, *flags) -> int:
    """Train a layer on the checkpoint of ``out``, which is made where there is none."""
    if not (Path(out) / "checkpoint.pth").exists():
        save_backbone(Path(out) / "checkpoint.pth")
    return cli.main(words(data, out, *flags))


def evaluate(out, *flags) -> int:
    line = ["linear", str(out), "--evaluate", "--num_workers", "0", "--device", "cpu"]
    return cli.main([*line, *(str(flag) for flag in flags)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An uninterrupted training."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(data, out) == 0
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def head(out, name: str = "checkpoint_linear.pth") -> dict:
    return files.read_weights(Path(out) / name)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "linear_log.txt").read_text().splitlines()]


def record(out, name: str = "linear.json") -> dict:
    return json.loads((Path(out) / name).read_text())


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_same(one, other, where: str = "") -> None:
    """Equal bit for bit, through dictionaries and lists."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_training(one, other) -> None:
    a, b = head(one), head(other)
    for content in (a, b):
        content["backbone"].pop("path")
    assert_same(a, b)
    assert lines(one) == lines(other)


def assert_equal_up_to_rounding(one, other) -> None:
    for name, tensor in head(one)["state_dict"].items():
        torch.testing.assert_close(head(other)["state_dict"][name], tensor, rtol=0, atol=1e-5)
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
        assert (a["test_acc1"], a["test_acc5"]) == (b["test_acc1"], b["test_acc5"])


# What is written


def test_the_files_of_a_training(whole, data):
    assert {path.name for path in whole.iterdir()} == WRITTEN
    log_lines = lines(whole)
    assert [line["epoch"] for line in log_lines] == [0, 1, 2]
    assert [line["train_lr"] for line in log_lines] == pytest.approx([1 / 16, 3 / 64, 1 / 64])
    found = record(whole)
    best = max(log_lines, key=lambda line: line["test_acc1"])
    for name, line in {"last": log_lines[-1], "best": best}.items():
        assert found["results"][name] == {
            "epochs": line["epoch"] + 1, "top1": line["test_acc1"], "top5": line["test_acc5"],
            "loss": line["test_loss"], "images": VAL, "train_images": TRAIN,
            "largest_class_percent": found["largest_class_percent"],
        }  # fmt: skip
    assert found["results"]["best"]["top1"] > 2 * found["largest_class_percent"]
    assert found["largest_class_percent"] == pytest.approx(100 / len(CLASSES))
    assert (found["train_images"], found["test_images"], found["classes"]) == (TRAIN, VAL, 6)
    assert found["features"] == {
        "n_last_blocks": 2, "avgpool_patchtokens": False, "embed_dim": 48
    }  # fmt: skip
    assert found["scaled_lr"] == 2 * 8 / 256 and found["class_names"] == CLASSES
    assert found["checkpoint"]["sha256"] == files.sha256(whole / "checkpoint.pth")
    assert found["head"]["sha256"] == files.sha256(whole / "checkpoint_linear.pth")
    assert found["read"] == {"train": str(data / "train"), "validation": str(data / "val")}
    assert found["transform"]["center_crop"] == 16 and set(found["versions"]) >= {"torch"}


def test_a_head_has_the_references_layout_and_only_plain_data(whole):
    content = torch.load(whole / "checkpoint_linear.pth", weights_only=True)
    assert set(content) >= {"epoch", "state_dict", "optimizer", "best_acc"}
    assert content["epoch"] == 3
    assert content["best_acc"] == record(whole)["results"]["best"]["top1"]
    theirs = nn.Module()  # the reference's, in its data-parallel wrapper
    theirs.module = nn.Module()
    theirs.module.linear = nn.Linear(48, len(CLASSES))
    theirs.load_state_dict(content["state_dict"], strict=True)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=0)
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.param_groups[0]["lr"] == lines(whole)[-1]["train_lr"]


def test_the_recorded_command_repeats_the_training(whole, tmp_path):
    line = shlex.split(record(whole)["command"])
    assert line[:2] == ["dino-kit", "linear"]
    assert cli.main([*line[1:], "--output_dir", str(tmp_path)]) == 0
    assert_same_training(whole, tmp_path)


def test_training_is_what_plain_pytorch_makes_of_the_same_crops(whole, data):
    """SGD and CosineAnnealingLR on features of crops drawn one by one, as the reference's loop."""
    source, images, epochs = FolderSource(data / "train"), TRAIN, 3
    features = LinearFeatures(dino_kit.load_backbone(whole), 2)
    plain = LinearHead(48, len(CLASSES)).linear
    optimizer = torch.optim.SGD(plain.parameters(), 2 * 8 / 256, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    view = training_view(16)
    for epoch in range(epochs):
        for batch in torch.from_numpy(epoch_order(0, epoch, images)).split(8):
            crops = []
            for index in batch.tolist():
                image = Image.open(source.name(index))
                rng = stream("crop", 0, epoch, index)
                crop = view.render(image, sample_crop(view, image.height, image.width, rng))
                crops.append(torch.from_numpy(crop.copy()).permute(2, 0, 1))
            with torch.no_grad():
                seen = features(Normalize()(torch.stack(crops)))
            labels = torch.tensor([source.label(index) for index in batch.tolist()])
            loss = nn.CrossEntropyLoss()(plain(seen), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    for name, value in plain.state_dict().items():
        found = head(whole)["state_dict"][f"module.linear.{name}"]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)


def test_the_table_and_the_way_on(whole, data, capsys):
    assert train(data, whole) == 0
    shown = capsys.readouterr().out
    assert "at the end, epoch 3" in shown and "at its best, epoch" in shown
    assert "answering always with the largest class gives 16.67 %" in shown
    assert f"dino-kit linear {whole} --evaluate --val_data FOLDER" in shown


def test_below_five_classes_there_is_no_top_5(data, tmp_path, capsys):
    for part in ("train", "val"):
        for name in CLASSES[:3]:
            shutil.copytree(data / part / name, tmp_path / "few" / part / name)
    assert train(tmp_path / "few", tmp_path / "out", "--epochs", 1) == 0
    assert record(tmp_path / "out")["results"]["last"]["top5"] is None
    assert lines(tmp_path / "out")[0]["test_acc5"] is None
    assert "│     - │" in capsys.readouterr().out


def test_each_checkpoint_and_network_has_files_of_its_own(data, tmp_path):
    kept = save_backbone(tmp_path / "checkpoint0003.pth")
    line = [*words(data, kept, "--epochs", 1), "--checkpoint_key", "student"]
    assert cli.main(line) == 0
    name = "linear_checkpoint0003_student"
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint0003.pth", f"checkpoint_{name}.pth", f"{name}.json", f"{name}_log.txt",
        f".checkpoint_{name}.pth.lock",
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--avgpool_patchtokens", "true"],
        ["--n_last_blocks", 1, "--avgpool_patchtokens", "on"],
        ["--total_batch_size", 100],  # one short batch
        ["--image_size", 32],
        ["--val_freq", 2],
        ["--num_labels", 6],
    ],
)
def test_settings_that_take_another_way_through_the_code(data, tmp_path, flags):
    assert train(data, tmp_path, "--epochs", 2, *flags) == 0
    assert all(np.isfinite(line["train_loss"]) for line in lines(tmp_path))


@pytest.mark.parametrize("told", [True, False])
def test_the_rate_for_imagenet_on_a_few_images_is_told_and_one_of_ones_own_is_not(
    data, tmp_path, capsys, told
):
    assert train(data, tmp_path, "--epochs", 1, "--lr", 0.001 if told else 0.002) == 0
    said = "notice: The usual --lr 0.001 is meant for the 1,000,000 steps" in capsys.readouterr().err
    assert said == told


# Resume


class Stopped(Exception):
    pass


def stop_after(monkeypatch, epochs: int, error: type[BaseException] = Stopped) -> None:
    """End the process, as far as a training can tell, when so many epochs are done."""
    finished = HeadTraining._finished

    def finish_or_stop(self, done, line):
        finished(self, done, line)
        if done == epochs:
            raise error

    monkeypatch.setattr(HeadTraining, "_finished", finish_or_stop)


@pytest.mark.parametrize("stops", [[1], [2], [1, 2, 3]])
def test_an_interrupted_training_is_the_uninterrupted_one_bit_for_bit(
    whole, data, tmp_path, monkeypatch, stops, capsys
):
    for epochs in stops:
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            stop_after(patched, epochs)
            train(data, tmp_path)
    with open(tmp_path / "linear_log.txt", "a") as file:
        file.write(f'{{"epoch": {stops[-1]}, "train_')  # torn
    capsys.readouterr()
    assert train(data, tmp_path, "--num_workers", 1) == 0
    if stops[-1] < 3:
        assert f"going on after epoch {stops[-1]} of 3" in capsys.readouterr().out
        assert_same_training(whole, tmp_path)
    else:  # all was done but the record
        assert record(tmp_path)["results"] == record(whole)["results"]


def test_an_interruption_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 1, KeyboardInterrupt)
    assert train(data, tmp_path, "--resume", "never") == 130
    assert "The same command without --resume goes on" in capsys.readouterr().err


def test_a_finished_training_says_so_and_stays(copy, data, capsys):
    before = head(copy), lines(copy)
    assert train(data, copy) == 0
    assert "holds this training already, finished" in capsys.readouterr().out
    assert_same(before[0], head(copy))
    assert before[1] == lines(copy)


def test_images_may_have_moved(copy, data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "moved")
    assert cli.main([*words(tmp_path / "moved", copy), "--batch_size_per_gpu", "3"]) == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", 4], "epochs was 3 and is now 4"),
        (["--lr", 1], "lr was 2.0 and is now 1.0"),
        (["--seed", 1, "--total_batch_size", 4], "total_batch_size was 8 and is now 4; seed was 0"),
        (["--n_last_blocks", 1], "n_last_blocks was 2 and is now 1"),
        (["--avgpool_patchtokens", "1"], "avgpool_patchtokens was False and is now True"),
        (["--image_size", 12], "image_size was 16 and is now 12"),
    ],
)
def test_a_changed_setting_is_refused_by_name_and_touches_nothing(
    copy, data, capsys, flags, named
):
    before = contents(copy)
    assert train(data, copy, *flags) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1 and "--resume never" in said
    assert contents(copy) == before


def test_a_checkpoint_that_was_trained_further_is_refused(copy, data, capsys):
    save_backbone(copy / "checkpoint.pth", seed=1)
    assert train(data, copy) == 2
    assert f"the weights of {copy / 'checkpoint.pth'} were others" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "val"])
def test_other_images_are_refused(copy, data, tmp_path, capsys, part):
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other" / part / "gray/0.png").rename(tmp_path / "other" / part / "dark/9.png")
    assert train(tmp_path / "other", copy) == 2
    assert f"the images of {tmp_path / 'other' / part} were others" in capsys.readouterr().err


def test_resume_never_begins_again(copy, data):
    assert train(data, copy, "--epochs", 1, "--resume", "never") == 0
    assert [line["epoch"] for line in lines(copy)] == [0] and head(copy)["epoch"] == 1


def test_what_makes_way_is_gone_before_there_is_something_new(copy, data, monkeypatch):
    monkeypatch.setattr(HeadTraining, "_fit", lambda self: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        train(data, copy, "--resume", "never")
    assert not (copy / "checkpoint_linear.pth").exists() and lines(copy) == []


def test_a_head_of_another_tool_is_none_to_go_on_with(data, tmp_path, capsys):
    state = {"module.linear.weight": torch.zeros(6, 48), "module.linear.bias": torch.zeros(6)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "checkpoint_linear.pth")
    assert train(data, tmp_path) == 2
    assert "was not written by dino-kit linear" in capsys.readouterr().err


def test_two_processes_do_not_train_one_head_but_a_run_beside_it_is_no_obstacle(
    data, tmp_path, capsys
):
    save_backbone(tmp_path / "checkpoint.pth")
    with locks.hold(tmp_path, "training", ".checkpoint_linear.pth.lock"):
        assert train(data, tmp_path) == 2
        assert "is training checkpoint_linear.pth in" in capsys.readouterr().err
    with locks.hold(tmp_path, "training"):
        assert train(data, tmp_path, "--epochs", 1) == 0


@pytest.mark.parametrize("fast", [False, True])
def test_of_two_processes_one_tells_of_the_other_training_and_both_end(data, tmp_path, fast):
    name = "checkpoint_linear_fast.pth" if fast else "checkpoint_linear.pth"
    save_backbone(tmp_path / "checkpoint.pth")
    line = ["linear", tmp_path, "--data_path", data, "--num_workers", 0, "--device", "cpu"]
    line += ["--fast"] * fast
    with locks.hold(tmp_path, f"training {name}", f".{name}.lock"):
        main, other = together("-m", "dino_kit", *map(str, line))
    assert (main.status, other.status) == (2, 2)
    assert f"is training {name} in" in main.said and "Traceback" not in main.said
    assert "dino-kit:" not in other.said and "Traceback" not in other.said


# The same training on other machines


@pytest.mark.parametrize("flags", [["--batch_size_per_gpu", 3], ["--num_workers", 2]])
def test_how_images_are_loaded_and_taken_changes_nothing(whole, data, tmp_path, flags):
    assert train(data, tmp_path, *flags) == 0
    assert_equal_up_to_rounding(whole, tmp_path)


def launch(*line) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*start, "eval/linear.py", *map(str, line)], cwd=root, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_are_the_same_training_and_evaluate_the_same(data, tmp_path):
    """31 images in steps of 6 leave a last one of a single image, and 13 to validate on are odd.

    One of each cannot be used.
    """
    shutil.copytree(data, tmp_path / "odd")
    for part in ("train", "val"):
        more = tmp_path / "odd" / part / "gray"
        shutil.copy(more / "0.png", more / "9.png")
        (more / "1.png").write_bytes(b"no image")
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(tmp_path / "odd", one, "--total_batch_size", 6) == 0
    shutil.copytree(one, two)
    for path in two.glob("*linear*"):
        path.unlink()
    line = words(tmp_path / "odd", two)[1:]
    done = launch(*line, "--total_batch_size", 6, "--batch_size_per_gpu", 3)
    assert done.stdout.count("written to") == 1  # one process speaks
    assert_equal_up_to_rounding(one, two)
    assert record(two)["left_out"] == record(one)["left_out"] == {"train": 1, "validation": 1}
    shutil.rmtree(tmp_path / "odd/train")
    launch(two, "--evaluate", "--val_data", tmp_path / "odd/val", "--num_workers", 0)
    found = record(two, "linear_evaluate.json")["results"]
    expected = record(one)["results"]["last"]
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-5)


@pytest.mark.slow
def test_without_a_total_batch_the_processes_batches_add_up(data, tmp_path):
    for name in ("one", "two"):
        save_backbone(tmp_path / name / "checkpoint.pth")
    flags = ["--data_path", data, *FLAGS[:4], "--num_workers", 0, "--device", "cpu"]
    line = ["linear", tmp_path / "one", *flags, "--batch_size_per_gpu", 32]
    assert cli.main([str(word) for word in line]) == 0
    launch(tmp_path / "two", *flags, "--batch_size_per_gpu", 16)
    assert record(tmp_path / "two")["total_batch_size"] == 32
    assert_equal_up_to_rounding(tmp_path / "one", tmp_path / "two")


# A trained head in use


def test_evaluation_gives_what_training_found_at_its_end(copy, data, capsys):
    before = contents(copy)
    assert evaluate(copy, "--data_path", data) == 0
    last = record(copy)["results"]["last"]
    found = record(copy, "linear_evaluate.json")
    assert found["results"] == pytest.approx({k: last[k] for k in ("top1", "top5", "loss")})
    assert found["head"]["sha256"] == files.sha256(copy / "checkpoint_linear.pth")
    assert {k: v for k, v in contents(copy).items() if k in before} == before
    assert "after epoch 3" in capsys.readouterr().out


def test_images_of_some_classes_alone_are_classified_among_all(copy, data, tmp_path):
    for name in ("white", "black"):
        shutil.copytree(data / "val" / name, tmp_path / "some" / name)
    assert evaluate(copy, "--val_data", tmp_path / "some") == 0
    found = record(copy, "linear_evaluate.json")
    classifier = dino_kit.load_classifier(copy)
    paths = sorted((tmp_path / "some").rglob("*.png"))
    hits = [classifier.predict([path])[0][0][0] == path.parent.name for path in paths]
    assert found["results"]["top1"] == pytest.approx(100 * np.mean(hits))
    assert found["results"]["top1"] > 50 and (found["test_images"], found["classes"]) == (4, 6)


@pytest.fixture
def published(tmp_path) -> Path:
    """A head in the layout of the reference's published ones."""
    state = {
        "module.linear.weight": 0.1 * torch.randn(6, 48, generator=torch.Generator().manual_seed(2)),
        "module.linear.bias": torch.arange(6.0),
    }
    torch.save({"state_dict": state}, tmp_path / "linearweights.pth")
    return tmp_path / "linearweights.pth"


@pytest.mark.parametrize("flags", [[], ["--n_last_blocks", 1, "--avgpool_patchtokens", "true"]])
def test_a_published_head_is_evaluated(published, data, tmp_path, flags):
    save_backbone(tmp_path / "run/checkpoint.pth")
    line = ["--data_path", data, "--linear_weights", published, *flags]
    assert evaluate(tmp_path / "run", *line) == 0
    found = record(tmp_path / "run", "linear_evaluate.json")
    options = {"n_last_blocks": 1, "avgpool_patchtokens": True} if flags else {}
    classifier = dino_kit.load_classifier(published, backbone=tmp_path / "run", **options)
    source, hits = FolderSource(data / "val"), []
    for index in range(len(source)):
        logits = classifier(classifier.prepare(source.name(index))[None])
        hits.append(int(logits.argmax()) == source.label(index))
    assert found["results"]["top1"] == pytest.approx(100 * np.mean(hits))
    assert classifier.classes == ["0", "1", "2", "3", "4", "5"]


def test_a_classifier_from_python(whole, data):
    classifier = dino_kit.load_classifier(whole)
    assert classifier.classes == CLASSES and not classifier.training
    assert classifier.transform.image_size == 16
    white = data / "val/white/0.png"
    image = Image.open(white)
    assert torch.equal(classifier.prepare(white), classifier.prepare(image))
    logits = classifier(classifier.prepare(white)[None])
    assert logits.shape == (1, len(CLASSES))
    (by_path,), (by_image,) = classifier.predict([white]), classifier.predict([image])
    assert by_path == by_image and by_path[0][0] == CLASSES[int(logits.argmax())]
    assert by_path[0][1] == pytest.approx(logits.softmax(1).max().item(), abs=1e-6)
    (ranked,) = classifier.predict([image], top=99)
    assert {name for name, _ in ranked} == set(CLASSES)
    assert sum(value for _, value in ranked) == pytest.approx(1, abs=1e-5)
    assert ranked == sorted(ranked, key=lambda pair: -pair[1])
    assert classifier.predict([]) == []


def test_many_images_are_predicted_in_parts(whole, data, monkeypatch):
    classifier = dino_kit.load_classifier(whole)
    paths = sorted((data / "val").rglob("*.png"))
    together = classifier.predict(paths)
    monkeypatch.setattr("dino_kit.evaluators.classifier._TOGETHER", 5)
    parts = classifier.predict(paths)
    for (one,), (other,) in zip(together, parts, strict=True):
        assert one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-5)


def test_a_folder_that_moved_keeps_its_classifier(copy, whole):
    state = dino_kit.load_classifier(whole).state_dict()
    whole_gone = copy.rename(copy.with_name("moved"))
    content = head(whole_gone)
    content["backbone"]["path"] = "/nowhere/checkpoint.pth"
    torch.save(content, whole_gone / "checkpoint_linear.pth")
    assert_same(dict(state), dict(dino_kit.load_classifier(whole_gone).state_dict()))


def test_a_head_elsewhere_finds_its_backbone_where_it_was(data, tmp_path):
    """One whose architecture had to be said, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bare = create_backbone("vit", image_size=16, **SIZES)
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    flags = ["--num_heads", "2", "--output_dir", str(tmp_path / "out"), "--epochs", "1"]
    assert cli.main(words(data, tmp_path / "bare.pth", *flags)) == 0
    classifier = dino_kit.load_classifier(tmp_path / "out")  # the only head there
    assert classifier.features.backbone.num_heads == 2
    assert_same(dict(bare.state_dict()), dict(classifier.features.backbone.state_dict()))


def test_the_student_has_a_classifier_of_its_own(data, tmp_path):
    assert train(data, tmp_path, "--checkpoint_key", "student", "--epochs", 1) == 0
    backbone = dino_kit.load_classifier(tmp_path).features.backbone
    assert_same(
        dict(backbone.state_dict()), dict(dino_kit.load_backbone(tmp_path, "student").state_dict())
    )


def test_a_classifier_whose_backbone_was_trained_further_is_refused(copy, data, capsys):
    save_backbone(copy / "checkpoint.pth", seed=1)
    content = head(copy)
    content["backbone"]["path"] = str(copy / "checkpoint.pth")
    torch.save(content, copy / "checkpoint_linear.pth")
    with pytest.raises(UserError, match="was trained on other weights than those of"):
        dino_kit.load_classifier(copy)
    assert evaluate(copy, "--data_path", data) == 2
    assert "was trained on other weights than those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_last_blocks": 1}, "--n_last_blocks 1 contradicts"),
        ({"avgpool_patchtokens": True}, "--avgpool_patchtokens True contradicts"),
        ({"which": "student"}, "trained on other weights"),
    ],
)
def test_arguments_that_contradict_a_head_are_refused(whole, arguments, message):
    with pytest.raises(UserError, match=message):
        dino_kit.load_classifier(whole, **arguments)


def test_a_folder_without_a_head_or_with_several(copy, tmp_path, published):
    with pytest.raises(UserError, match="has no checkpoint_linear.pth"):
        dino_kit.load_classifier(tmp_path)
    (copy / "checkpoint_linear.pth").rename(copy / "checkpoint_linear_a.pth")
    shutil.copy(copy / "checkpoint_linear_a.pth", copy / "checkpoint_linear_b.pth")
    with pytest.raises(UserError, match="several heads: checkpoint_linear_a.pth, checkpoint_lin"):
        dino_kit.load_classifier(copy)
    with pytest.raises(UserError, match="does not say on which backbone"):
        dino_kit.load_classifier(published)


def test_a_backbone_that_is_gone_is_said(copy, tmp_path):
    content = head(copy)
    content["backbone"]["path"] = "/nowhere/checkpoint.pth"
    torch.save(content, tmp_path / "checkpoint_linear.pth")
    with pytest.raises(UserError, match=r"was /nowhere/checkpoint\.pth, and is neither there nor"):
        dino_kit.load_classifier(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"module.linear.weight": torch.zeros(6, 48)}},
        {"state_dict": {"linear.weight": torch.zeros(6, 48), "linear.bias": torch.zeros(5)}},
        {"state_dict": "text"},
        {"teacher": {}},
    ],
)
def test_what_is_no_head_is_refused(content, whole, data, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pth")
    assert evaluate(whole, "--data_path", data, "--linear_weights", tmp_path / "x.pth") == 2
    assert "x.pth holds no linear head" in capsys.readouterr().err


# Faults


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_labels", "1000"], "--num_labels is 1000, and the data has 6 classes"),
        (["--n_last_blocks", "3"], "--n_last_blocks 3 is more than the 2 blocks"),
        (["--image_size", "18"], "nearest that is: 16"),
        (["--embed_dim", "48"], "--embed_dim 48 contradicts"),
        (["--output_dir", "{}/run/checkpoint.pth"], "is a file; a folder is needed"),
        (["--train_data", "{}"], "give either --data_path, or both"),
        (["--linear_weights", "x.pth"], "give --evaluate with it"),
        (["--evaluate"], "There is no trained head"),
        (["--evaluate", "--linear_weights", "{}/none.pth"], "There is no file"),
    ],
)
def test_a_fault_is_a_sentence_and_writes_nothing(data, tmp_path, capsys, flags, message):
    save_backbone(tmp_path / "run/checkpoint.pth")
    before = sorted(tmp_path.rglob("*"))
    assert train(data, tmp_path / "run", *(flag.format(tmp_path) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("dino-kit: error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train/gray").rename(root / "gone"), "lack: gray"),
        (lambda root: shutil.copy(root / "val/gray/0.png", root / "val"), "has no labels"),
        (lambda root: [shutil.rmtree(root / part / name) for part in ("train", "val")
                       for name in CLASSES[1:]], "All images are of one class, black"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(data, tmp_path, capsys, change, message):
    shutil.copytree(data, tmp_path / "data")
    change(tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pth"}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_image_is_left_out_and_counted(data, whole, tmp_path, capsys, part, workers):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / part / "gray/1.png").write_bytes(b"no image")
    for _ in range(2):  # the second finds the training finished
        assert train(tmp_path / "data", tmp_path / "run", "--num_workers", workers) == 0
        assert "1.png cannot be read as an image" in capsys.readouterr().err or _
        found, before = record(tmp_path / "run"), record(whole)
        counts = {"train": "train_images", "val": "test_images"}
        for name, key in counts.items():
            assert found[key] == before[key] - (name == part)
        assert found["left_out"] == {"train": int(part == "train"), "validation": int(part == "val")}
        # Of twelve images two are black, the first of the classes learnt from that are as large.
        assert found["largest_class_percent"] == pytest.approx(100 * 2 / (12 - (part == "val")))
    flags = ["--val_data", str(tmp_path / "data/val")]
    assert evaluate(tmp_path / "run", *flags) == 0
    found = record(tmp_path / "run", "linear_evaluate.json")
    assert found["left_out"] == {"validation": int(part == "val")}
    assert found["results"]["top1"] == record(tmp_path / "run")["results"]["last"]["top1"]


def test_a_step_whose_images_are_all_bad_changes_nothing(data, tmp_path, capsys):
    """Nor does an epoch: the sentence says that there is nothing to learn from."""
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data/train").rglob("*.png"):
        path.write_bytes(b"no image")
    assert train(tmp_path / "data", tmp_path / "run") == 2
    assert "None of the images of epoch 1 can be used" in capsys.readouterr().err


def test_a_rate_that_is_too_high_stops_with_a_reason(data, tmp_path, capsys):
    assert train(data, tmp_path, "--lr", 1e38) == 1
    error = capsys.readouterr().err
    assert "dino-kit: stopped: The loss of epoch" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_labels", "5"], "and {}/checkpoint_linear.pth is for 6 classes"),
        (["--n_last_blocks", "1"], "--n_last_blocks 1 contradicts"),
        (["--linear_weights", "{}/wide.pth"], "is for features 50 wide, and these are 48"),
        (["--linear_weights", "{}/few.pth"], "is for 2 classes without names, and the images have 6"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(copy, data, capsys, flags, message):
    for name, shape in {"wide": (6, 50), "few": (2, 48)}.items():
        state = {"linear.weight": torch.zeros(shape), "linear.bias": torch.zeros(shape[0])}
        torch.save({"state_dict": state}, copy / f"{name}.pth")
    assert evaluate(copy, "--data_path", data, *(flag.format(copy) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert message.format(copy) in error and error.count("\n") == 1


def test_images_of_a_class_that_the_head_does_not_know_are_refused(copy, tmp_path, capsys):
    save_images(tmp_path / "more", 1, ["dark", "white"])
    (tmp_path / "more/dark").rename(tmp_path / "more/blue")
    assert evaluate(copy, "--val_data", tmp_path / "more") == 2
    assert "was not trained on: blue." in capsys.readouterr().err
