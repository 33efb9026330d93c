"""``dino-kit train`` end to end: a run's folder, resume, batches, processes and faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY

import dino_kit
from dino_kit import cli, files
from dino_kit.assemble import assemble, view_groups
from dino_kit.backbones import layers
from dino_kit.config import recipe
from dino_kit.config.train import RESUMABLE, TrainConfig
from dino_kit.data import augment
from dino_kit.training.monitor import Monitor

FLAGS = [
    *TINY,
    *"--batch_size_per_gpu 8 --epochs 3 --warmup_epochs 1 --lr 0.05 --log_every_steps 3".split(),
    *"--probe_freq 0".split(),
]
IMAGES, STEPS = 20, 6  # two steps an epoch, of eight images each


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20, 24 + number, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def words(pictures, out, *flags) -> list[str]:
    return ["train", "--data_path", str(pictures), "--output_dir", str(out), *FLAGS,
            *(str(flag) for flag in flags)]  # fmt: skip


def train(pictures, out, *flags) -> int:
    return cli.main(words(pictures, out, *flags))


def result(out, name: str = "checkpoint.pth") -> dict:
    return files.read_weights(Path(out) / name)


def metrics(out) -> list[dict]:
    """The lines of a run but for what depends on the clock."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")}
        for line in lines
    ]


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


def assert_same_run(one, other) -> None:
    a, b = result(one), result(other)
    for content in (a, b):
        for name in RESUMABLE:
            content["config"].pop(name)
    assert_same(a, b)
    assert metrics(one) == metrics(other)
    assert (Path(one) / "log.txt").read_text() == (Path(other) / "log.txt").read_text()


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(pictures, out, "--saveckp_freq", 2) == 0
    return out


# A run's folder


def test_the_folder_of_a_run(whole, pictures):
    assert {path.name for path in whole.iterdir()} - {".lock"} == {
        "config.yaml", "checkpoint.pth", "checkpoint_previous.pth", "checkpoint0000.pth",
        "checkpoint0002.pth", "metrics.jsonl", "log.txt", "tensorboard",
    }  # fmt: skip
    assert [line["step"] for line in metrics(whole)] == [3, 6]
    epochs = [json.loads(line) for line in (whole / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    config = recipe.read(TrainConfig, str(whole / "config.yaml"))
    assert config["data_path"] == str(pictures) and config["total_batch_size"] == 8


def test_the_recipe_in_the_folder_repeats_the_run(whole, tmp_path):
    again = tmp_path / "again"
    assert cli.main(["train", str(whole / "config.yaml"), "--output_dir", str(again)]) == 0
    assert_same_run(whole, again)


def test_a_checkpoint_has_the_references_layout_and_only_plain_data(whole):
    content = torch.load(whole / "checkpoint.pth", weights_only=True)
    assert set(content) == {
        "student", "teacher", "optimizer", "epoch", "dino_loss", "step", "config", "images",
        "skipped", "monitor", "names",
    }  # fmt: skip
    assert (content["epoch"], content["step"], content["images"]) == (3, STEPS, IMAGES)
    assert [result(whole, f"checkpoint000{e}.pth")["epoch"] for e in (0, 2)] == [1, 3]
    assert result(whole, "checkpoint_previous.pth")["step"] == 4
    assert all(name.startswith(("module.backbone.", "module.head.")) for name in content["student"])
    assert all(name.startswith(("backbone.", "head.")) for name in content["teacher"])
    assert set(content["dino_loss"]) == {"center"}


@pytest.mark.parametrize("use_bn", [False, True])
def test_a_checkpoint_loads_in_the_references_way(pictures, whole, tmp_path, use_bn):
    out = whole
    if use_bn:
        out = tmp_path / "bn"
        assert train(pictures, out, "--epochs", 1, "--use_bn_in_head", "true") == 0
    state = torch.load(out / "checkpoint.pth", weights_only=True)["teacher"]
    state = {name.replace("module.", "").replace("backbone.", ""): v for name, v in state.items()}
    sizes = {"patch_size": 4, "image_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    backbone = dino_kit.create_backbone("vit", **sizes)
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert missing == [] and unexpected and all(name.startswith("head.") for name in unexpected)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone.eval()(images), dino_kit.load_backbone(out)(images))


# Resume


class Stopped(Exception):
    pass


def stop_after(monkeypatch, step: int) -> None:
    """End the process, as far as a run can tell, when so many steps are done."""
    record = Monitor.record

    def record_or_stop(self, number, *arguments, **options):
        record(self, number, *arguments, **options)
        if number + 1 == step:
            raise Stopped

    monkeypatch.setattr(Monitor, "record", record_or_stop)


@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ([3], []),  # falls back to the end of the first epoch
        ([5], ["--save_every_steps", 1]),
        ([2, 3, 6], ["--save_every_steps", 1]),
        ([4], ["--save_every_steps", 3]),
    ],
)
@pytest.mark.parametrize("method", [[], ["--centering", "sinkhorn", "--optimizer", "lars"]])
def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(
    pictures, tmp_path, monkeypatch, stops, flags, method
):
    for step in stops:
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            stop_after(patched, step)
            train(pictures, tmp_path / "parts", *flags, *method)
    assert train(pictures, tmp_path / "parts", "--num_workers", 1, *method) == 0
    assert train(pictures, tmp_path / "whole", *method) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_batch_norm_is_resumed_too(pictures, tmp_path, monkeypatch):
    flags = ["--use_bn_in_head", "true", "--norm_last_layer", "false", "--optimizer", "sgd"]
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 3)
        train(pictures, tmp_path / "parts", *flags)
    for name in ("parts", "whole"):
        assert train(pictures, tmp_path / name, *flags) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_ended_from_outside_goes_on(pictures, tmp_path, number):
    flags = ["--epochs", 40, "--save_every_steps", 1]
    line = [sys.executable, "-m", "dino_kit", *words(pictures, tmp_path / "parts", *flags)]
    # A shell's background jobs ignore an interruption, and so would their children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as running:
        written = tmp_path / "parts/metrics.jsonl"
        while running.poll() is None and not (
            written.exists() and len(written.read_text().splitlines()) >= 3
        ):
            time.sleep(0.02)
        running.send_signal(number)
        said = running.stderr.read()
    if number != signal.SIGKILL:
        assert running.returncode == 128 + number and "Traceback" not in said
        assert "goes on from the last checkpoint" in said
    assert 0 < result(tmp_path / "parts")["step"] < 80
    for name in ("parts", "whole"):
        assert train(pictures, tmp_path / name, *flags) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_says_so_and_stays(whole, pictures, capsys):
    before = (whole / "checkpoint.pth").stat().st_mtime_ns, metrics(whole)
    assert train(pictures, whole, "--saveckp_freq", 2) == 0
    assert "holds this run already, finished" in capsys.readouterr().out
    assert before == ((whole / "checkpoint.pth").stat().st_mtime_ns, metrics(whole))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--arch", "deepvit"], "arch was vit and is now deepvit"),
        (["--embed_dim", 32], "embed_dim was 24 and is now 32"),
        (["--epochs", 4], "epochs was 3 and is now 4"),
        (["--lr", 0.1], "lr was 0.05 and is now 0.1"),
        (["--total_batch_size", 4], "total_batch_size was 8 and is now 4"),
        (["--seed", 1, "--blur_prob", 0], "blur_prob was [1.0, 0.1, 0.5] and is now"),
    ],
)
def test_a_changed_recipe_is_refused_by_name_and_touches_nothing(
    whole, pictures, capsys, flags, named
):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    assert train(pictures, whole, *flags) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1 and "--resume never" in said
    assert before == {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}


def test_other_images_are_refused(pictures, tmp_path, capsys):
    assert train(pictures / "class0", tmp_path, "--epochs", 1) == 0
    assert train(pictures, tmp_path, "--epochs", 1) == 2
    assert "had 10 images and now has 20" in capsys.readouterr().err


def test_as_many_images_of_other_names_are_refused(pictures, tmp_path, capsys):
    """Of a step's images a run remembers the places alone."""
    shutil.copytree(pictures / "class0", tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "out", "--epochs", 1) == 0
    first = sorted((tmp_path / "data").iterdir())[0]
    first.rename(first.with_name(f"z{first.name}"))
    assert train(tmp_path / "data", tmp_path / "out", "--epochs", 1) == 2
    assert "the names of the images were others" in capsys.readouterr().err


def test_resume_never_begins_again_once(pictures, tmp_path, capsys):
    assert train(pictures, tmp_path, "--epochs", 1, "--seed", 1, "--saveckp_freq", 1) == 0
    (tmp_path / "checkpoint0007.pth").touch()  # of a run that was longer
    assert train(pictures, tmp_path, "--epochs", 2, "--resume", "never") == 0
    assert result(tmp_path)["step"] == 4 and [line["step"] for line in metrics(tmp_path)] == [3, 4]
    assert not (tmp_path / "checkpoint0007.pth").exists()
    # Its own recipe goes on with it.
    assert recipe.read(TrainConfig, str(tmp_path / "config.yaml"))["resume"] == "auto"
    capsys.readouterr()
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 0
    assert "finished" in capsys.readouterr().out


def test_the_run_that_makes_way_is_gone_before_the_new_one_has_a_checkpoint(
    pictures, tmp_path, monkeypatch
):
    assert train(pictures, tmp_path) == 0
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 1)
        train(pictures, tmp_path, "--resume", "never")
    assert not list(tmp_path.glob("*.pth"))


def test_checkpoints_that_no_run_of_ours_wrote_stay(pictures, tmp_path):
    (tmp_path / "checkpoint0099.pth").write_bytes(b"someone's")
    assert train(pictures, tmp_path, "--epochs", 1) == 0
    assert (tmp_path / "checkpoint0099.pth").read_bytes() == b"someone's"


def test_a_finished_run_keeps_its_recipe(pictures, tmp_path):
    assert train(pictures, tmp_path / "out", "--epochs", 1) == 0
    before = (tmp_path / "out/config.yaml").read_bytes()
    shutil.copytree(pictures, tmp_path / "moved")
    assert train(tmp_path / "moved", tmp_path / "out", "--epochs", 1) == 0
    assert (tmp_path / "out/config.yaml").read_bytes() == before


def test_a_run_goes_on_with_its_blocks_computed_twice(pictures, tmp_path, monkeypatch):
    seen = []
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 3)
        train(pictures, tmp_path / "parts")
    forward = layers.checkpoint
    monkeypatch.setattr(layers, "checkpoint", lambda *a, **k: seen.append(1) or forward(*a, **k))
    assert train(pictures, tmp_path / "parts", "--checkpoint_activations", "true") == 0
    assert train(pictures, tmp_path / "whole") == 0
    assert seen
    whole, parts = (result(tmp_path / name)["student"] for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [["--use_fp16", "false"], ["--precision", "fp32"]])
def test_the_same_precision_by_another_name_is_the_same_run(whole, pictures, flags):
    assert train(pictures, whole, "--saveckp_freq", 2, *flags) == 0


def test_another_precision_is_another_run(whole, pictures, capsys):
    assert train(pictures, whole, "--precision", "bf16") == 2
    assert "precision was fp32 and is now bf16" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_costs_one_epoch_and_not_the_run(whole, pictures, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/checkpoint.pth").write_bytes(b"junk")
    assert train(pictures, tmp_path / "run", "--saveckp_freq", 2) == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("gone", ["images", "monitor", "skipped", "config"])
def test_a_checkpoint_of_another_tool_is_no_run_to_go_on_with(
    whole, pictures, tmp_path, capsys, gone
):
    content = result(whole)
    if gone == "config":
        content["config"] = "text"
    else:
        del content[gone]
    torch.save(content, tmp_path / "checkpoint.pth")
    assert train(pictures, tmp_path) == 2
    assert "was not written by dino-kit train" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_says_what_to_do(pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/class0/0.png").write_bytes(b"junk")
    assert train(tmp_path / "data", tmp_path / "out", "--on_bad_image", "raise") == 2
    said = capsys.readouterr().err
    assert "0.png cannot be read as an image" in said and "replace the file" in said


@pytest.mark.parametrize("place", [".", "class0", "new/run"])
def test_a_run_does_not_write_among_its_images(pictures, tmp_path, capsys, place):
    shutil.copytree(pictures, data := tmp_path / "data")
    before = sorted(data.rglob("*"))
    assert train(data, data / place) == 2
    assert "lies among the images of" in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before


def test_a_run_may_write_beside_the_part_that_it_reads(pictures, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(pictures, tmp_path / "data" / part)
    flags = ["--epochs", 1, "--total_batch_size", 20, "--batch_size_per_gpu", 20]
    assert train(tmp_path / "data", tmp_path / "data/run", *flags) == 0


def test_a_checkpoint_of_the_reference_is_no_run_to_go_on_with(pictures, tmp_path, capsys, golden):
    (tmp_path / "checkpoint.pth").write_bytes(
        golden.path("reference_full_checkpoint.pth").read_bytes()
    )
    assert train(pictures, tmp_path) == 2
    assert "was not written by dino-kit train" in capsys.readouterr().err


# The same run on other machines


@pytest.mark.parametrize("flags", [["--num_workers", 2], ["--log_every_steps", 3]])
def test_what_loads_the_data_changes_nothing(whole, pictures, tmp_path, flags):
    assert train(pictures, tmp_path / "other", *flags) == 0
    assert_same_run(whole, tmp_path / "other")


def test_an_accumulated_batch_is_the_same_run(whole, pictures, tmp_path):
    assert train(pictures, tmp_path / "parts", "--batch_size_per_gpu", 3) == 0
    assert_equal_up_to_rounding(whole, tmp_path / "parts")


def assert_equal_up_to_rounding(one, other) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    a, b = result(one), result(other)
    for network in ("student", "teacher"):
        for name, tensor in a[network].items():
            theirs = b[network][name]
            if name.endswith("attn.qkv.bias"):
                tensor, theirs = (torch.cat((x[:24], x[48:])) for x in (tensor, theirs))
            assert (tensor - theirs).norm() <= 1e-4 * tensor.norm() + 1e-12, name


@pytest.mark.slow
def test_two_processes_are_the_same_run(whole, pictures, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "launch/train.py", *words(pictures, tmp_path / "two", "--saveckp_freq", 2)[1:]]
    root = Path(__file__).parent.parent
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writing to") == 1  # one process speaks
    assert_equal_up_to_rounding(whole, tmp_path / "two")
    assert result(tmp_path / "two")["teacher"].keys() == result(whole)["teacher"].keys()


def test_a_shell_inside_a_slurm_job_runs_one_ordinary_process(whole, pictures, tmp_path):
    environment = {**os.environ, "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}
    line = [sys.executable, "-m", "dino_kit", *words(pictures, tmp_path / "slurm")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, tmp_path / "slurm")


# Settings


def test_warmups_longer_than_the_run_are_cut_with_a_notice(pictures, tmp_path, capsys):
    flags = ["--epochs", 1, "--warmup_epochs", 10, "--warmup_teacher_temp_epochs", 30]
    assert train(pictures, tmp_path, *flags) == 0
    said = capsys.readouterr().err
    assert "--warmup_epochs 10 is longer than the run and was cut to its 1 epochs" in said
    assert "--warmup_teacher_temp_epochs 30" in said


@pytest.mark.slow
def test_one_epoch_with_every_default(pictures, tmp_path):
    half = str(pictures / "class0")  # of the pictures; a step takes ten seconds
    line = ["train", "--data_path", half, "--output_dir", str(tmp_path), "--epochs", "1"]
    assert cli.main([*line, "--batch_size_per_gpu", "5"]) == 0
    (written,) = metrics(tmp_path)
    assert written["step"] == 2
    assert 0 < written["loss"] < 3 * np.log(65536) and written["skipped"] == 0
    assert dino_kit.load_backbone(tmp_path).embed_dim == 384


@pytest.mark.parametrize("flags", [
    ["--local_crops_number", 0], ["--precision", "bf16"], ["--use_fp16", "true"],
    ["--optimizer", "sgd"], ["--centering", "sinkhorn"], ["--head_nlayers", 1],
    ["--clip_grad", 0], ["--freeze_last_layer", 0], ["--norm_last_layer", "off"],
])  # fmt: skip
def test_settings_that_take_another_way_through_the_code(pictures, tmp_path, flags):
    assert train(pictures, tmp_path, "--epochs", 2, *flags) == 0
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path))


# Faults


def test_steps_that_are_not_finite_are_dropped_and_too_many_stop_the_run(
    pictures, tmp_path, capsys
):
    flags = ["--lr", 1e30, "--max_bad_steps", 2, "--clip_grad", 0, "--warmup_epochs", 0]
    assert train(pictures, tmp_path, *flags, "--save_every_steps", 1) == 1
    said = capsys.readouterr().err
    assert "was not finite and was dropped; its images are" in said
    assert "dino-kit: stopped: 2 steps in a row were not finite" in said
    assert "Traceback" not in said
    kept, before = result(tmp_path), result(tmp_path, "checkpoint_previous.pth")
    assert kept["skipped"] == {"total": 1, "in_a_row": 1} and before["skipped"]["total"] == 0
    assert kept["step"] == before["step"] + 1
    for part in ("student", "teacher", "optimizer", "dino_loss"):
        assert_same(kept[part], before[part], part)


def test_a_broken_image_ends_the_run_with_its_name(pictures, tmp_path, capsys):
    data = tmp_path / "data"
    for number in range(8):
        data.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(data / f"{number}.png")
    (data / "5.png").write_bytes(b"no image")
    for workers in (0, 1):
        flags = ["--num_workers", workers, "--on_bad_image", "raise"]
        assert train(data, tmp_path / "out", *flags) == 2
        said = capsys.readouterr().err
        assert "5.png cannot be read as an image" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_path", "{}/nothing"], "should be a folder of images, and there is nothing"),
        (["--data_path", "{}/empty"], "There is no image in"),
        (["--data_path", "imagenet:train"], "neither a path nor a known kind of data"),
        (["--output_dir", "{}/file"], "--output_dir"),
        (["--total_batch_size", "21"], "fewer than one batch of 21"),
        (["--device", "cuda:7"], "--device cuda:7 asks for GPU 7"),
        (["--precision", "fp16"], "needs a CUDA device"),
        (["--use_fp16", "true", "--precision", "bf16"], "contradicts --precision bf16"),
        (["--mlp_ratio", "0.01"], "leaves the MLP no width"),
        (["--mlp_ratio", "1e300"], "mlp_ratio"),
        (["--device", "cuda:99999999999999999999"], "--device is 'cuda:99999999999999999999'"),
        (["--output_dir", "{}/file/below"], "which is a file; a folder is needed"),
        (["--use_bn_in_head", "1", "--batch_size_per_gpu", "4"], "normalise each part by itself"),
    ],
)
def test_a_fault_is_one_sentence_and_writes_nothing(pictures, tmp_path, capsys, flags, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert train(pictures, tmp_path / "out", *(f.format(tmp_path) for f in flags)) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("dino-kit: error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_architecture_that_takes_no_such_crops_names_those_it_takes(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    line = (
        f"train --arch maxvit_t --data_path {tmp_path / 'images'} --output_dir {tmp_path / 'out'} "
        "--batch_size_per_gpu 1 --num_workers 0 --out_dim 16"
    )
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert "torchvision:maxvit_t takes no images of 96 pixels a side; near it, it takes 224;" in error
    assert "--local_crops_number 0 does without local crops." in error
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def _negative(image, parameters):
    """A rendering of one's own, to floats, which are pixels from 0 to 1."""
    crop = augment.resized_crop(image, parameters.box, parameters.size)
    return 1 - torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255.0


@pytest.mark.parametrize("workers", [0, 1])
def test_from_python_a_view_takes_any_callable(pictures, tmp_path, workers):
    flags = ("--num_workers", workers, "--normalize", 1, 0.5)
    config = cli.parse("train", words(pictures, tmp_path, *flags)[1:])
    views = [[replace(view, render=_negative) for view in group] for group in view_groups(config)]
    run = assemble(config, views=views)
    batches = next(iter(run.loader))
    assert all(group.dtype == torch.float32 for group in batches[0].groups)
    for group in run.prepare(batches[0]).groups:  # (x - 1) / 0.5 of x in [0, 1]
        assert -2 <= group.min() < -1 < group.max() <= 0
    run.train()
    assert metrics(tmp_path)[-1]["step"] == STEPS
