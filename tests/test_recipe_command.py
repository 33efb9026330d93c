"""``dino-kit recipe``: what is measured, what it writes and says, and that it can be trained."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_kit import cli
from dino_kit.assemble import Prepare, build_learner, build_loader, view_groups
from dino_kit.commands import recipe as command
from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.proposal import machine, rules, speed
from dino_kit.proposal.fit import Speed
from dino_kit.proposal.machine import Machine

CPU = torch.device("cpu")
TINY = {
    "arch": "vit", "embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4,
    "global_crops_size": 12, "local_crops_size": 8, "local_crops_number": 2, "out_dim": 32,
    "head_hidden_dim": 32, "head_bottleneck_dim": 16, "drop_path_rate": 0,
    "data_path": "digits", "output_dir": "out", "num_workers": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A short look at how busy the machine is, which is said of a free one."""
    monkeypatch.setattr(machine, "_share_of_a_core", lambda: 1.0)
    monkeypatch.setattr(speed, "_SECONDS", 0.02)


@pytest.fixture
def known(monkeypatch):
    """Speeds of a table in place of measured ones, and the precisions that were asked for."""
    asked = []

    def measure(learner, load, prepare, images, first):
        asked.append(learner.autocast_dtype)
        seconds = 1e-4 if learner.autocast_dtype is None else known.half
        return Speed(1e-3, seconds, 1e-5, 0.01, 10**6, 10**4)

    known = SimpleNamespace(half=9e-5, asked=asked)
    monkeypatch.setattr(speed, "measure", measure)
    return known


@pytest.fixture
def pictures(tmp_path):
    """Eight pictures of 32 pixels, of which one could make a batch of four."""
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f"pictures/train/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "pictures/test").mkdir()
    return tmp_path / "pictures"


def made(capsys, *words) -> tuple[str, str]:
    assert cli.main(["recipe", *map(str, words)]) == 0
    return capsys.readouterr()


def test_only_the_recipe_goes_to_standard_output(pictures, known, capsys, tmp_path):
    out, err = made(capsys, pictures, "--hours", "0.01")
    assert out.startswith("# A recipe for 8 images of about 32 × 32 pixels, ")
    assert f"{pictures} is split: training reads" in err
    assert "images a second in fp32" in err
    (tmp_path / "mine.yaml").write_text(out, encoding="utf-8")
    values = recipe.read(TrainConfig, str(tmp_path / "mine.yaml"))
    assert values["data_path"] == str(pictures) and values["total_batch_size"] == 4
    flat = " ".join(out.replace("\n#", " ").split())  # the heading breaks long lines
    assert f"made by dino-kit recipe {pictures} --hours 0.01" in flat


def test_a_written_recipe_trains_as_it_is_and_its_differences_can_be_shown(
    pictures, known, capsys, tmp_path
):
    mine, out = tmp_path / "mine.yaml", tmp_path / "out"
    said, _ = made(capsys, pictures, "--hours", "1.3e-5", "--output", mine)
    assert said.splitlines()[-1] == f"  dino-kit train {mine} --output_dir {out.name.upper()}"
    text = mine.read_text(encoding="utf-8")
    assert f"dino-kit train {mine} --output_dir OUT" in text
    epochs = recipe.read(TrainConfig, str(mine))["epochs"]
    assert 0 < epochs < 6

    assert cli.main(["train", str(mine), "--output_dir", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 * epochs and all(np.isfinite(line["loss"]) for line in lines)

    capsys.readouterr()
    assert cli.main(["config", str(mine), "--diff", "vits16_100ep"]) == 0
    shown = capsys.readouterr().out
    changed = {line.split("│")[1].strip() for line in shown.splitlines() if "│" in line}
    beside = {line.partition(":")[0] for line in text.splitlines() if "# the paper: " in line}
    assert beside == changed - {"data_path", ""}  # a long value goes on in the next line


def test_a_file_that_exists_is_not_replaced(pictures, known, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    words = ["recipe", str(pictures), "--output", str(tmp_path / "mine.yaml")]
    assert cli.main(words) == 2
    assert "mine.yaml exists; remove it" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "epochs: 3\n" and not known.asked


def test_half_precision_is_taken_on_a_cpu_where_it_is_clearly_faster(pictures, known, capsys):
    out, _ = made(capsys, pictures, "--hours", "0.01")
    assert "\nprecision: fp32 " in out and {None, torch.bfloat16} == set(known.asked)
    known.half = 5e-5
    out, err = made(capsys, pictures, "--hours", "0.01")
    assert "\nprecision: bf16 " in out and "Measured: 2.0 times as fast as fp32." in out
    assert "images a second in bf16" in err


def test_flags_reach_the_recipe(pictures, known, capsys):
    words = ["--hours", "0.01", "--total_batch_size", "3", "--arch", "deit_tiny", "--device", "cpu"]
    out, _ = made(capsys, pictures, *words)
    for line in ("arch: vit_tiny ", "total_batch_size: 3 ", "device: cpu\n"):
        assert f"\n{line}" in out
    assert "--total_batch_size 3 --arch vit_tiny --device cpu" in " ".join(
        out.replace("\n#", " ").split()
    )
    assert "device:" not in made(capsys, pictures, "--hours", "0.01")[0]


def test_a_broken_image_is_noticed(pictures, known, capsys):
    (pictures / "train/class0/x.png").write_bytes(b"")
    out, err = made(capsys, pictures, "--hours", "0.01")
    assert "notice: 1 of 9 images that were tried cannot be used; a run takes others in" in err
    assert "the file is empty" in out


def test_a_busy_machine_is_noticed(pictures, known, capsys, monkeypatch):
    monkeypatch.setattr(machine, "_share_of_a_core", lambda: 0.4)
    _, err = made(capsys, pictures, "--hours", "0.01")
    assert "notice: The machine is busy: other programs leave 40% of a core" in err


def test_a_network_that_does_not_fit_ends_the_search(pictures, known, capsys, monkeypatch):
    whole = command._try

    def small_only(candidate, *rest):
        if candidate.network != rules.NETWORKS[0]:
            raise MemoryError
        return whole(candidate, *rest)

    monkeypatch.setattr(command, "_try", small_only)
    out, err = made(capsys, pictures, "--hours", "1")
    assert "does not fit into memory" in err and "\nembed_dim: 64 " in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--data_path is missing."),
        (["x", "--hours", "0"], "--hours is '0'; it takes a number above 0."),
        (["x", "--hours", "nan"], "--hours is 'nan'; it takes a number above 0."),
        (["x", "--total_batch_size", "0"], ("--total_batch_size is '0'; it takes a whole number "
                                            "from 1.")),
        (["x", "--arch", "resnet50"],
         "--arch torchvision:resnet50 is a library's, whose recipes nobody here knows"),
        (["x", "--device", "gpu"], "--device is 'gpu'; it takes auto, cpu, cuda, cuda:N or mps."),
        (["nowhere"], "nowhere should be a folder of images, and there is nothing."),
        (["digit:x"], "digit:x is neither a path nor a known kind"),
        (["digits", "--total_batch_size", "5000", "--hours", "1"],
         "There are 1438 images, fewer than one batch of 5000; give --total_batch_size 1438"),
        (["digits", "--hours", "1e-9"], "--hours 1e-09 does not suffice for one epoch: "),
    ],
)  # fmt: skip
def test_a_fault_is_one_sentence(words, sentence, known, capsys):
    assert cli.main(["recipe", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith(f"dino-kit: error: {sentence}")


def test_a_batch_of_too_many_images_is_refused_before_anything_is_timed(pictures, known):
    assert cli.main(["recipe", str(pictures), "--total_batch_size", "9"]) == 2
    assert not known.asked


def test_unreadable_images_are_refused(tmp_path, known, capsys):
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"no picture")
    assert cli.main(["recipe", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "2 of 2 images that were tried cannot be used. " in err and not known.asked


def test_a_single_image_will_do(tmp_path, known, capsys):
    Image.new("L", (40, 30), 7).save(tmp_path / "one.png")
    out, _ = made(capsys, tmp_path, "--hours", "1e-5")
    assert out.startswith("# A recipe for 1 image of about 40 × 30 pixels")
    assert "\ntotal_batch_size: 1 " in out and "\nhue: 0.0 " in out


# Measuring


def learner_and_load(precision="fp32", **changes):
    config = fields.from_plain(TrainConfig, TINY | {"total_batch_size": 1} | changes)
    source = DigitsSource("train")

    def load(images):
        sized = replace(config, total_batch_size=images, batch_size_per_gpu=images)
        return next(iter(build_loader(sized, source, view_groups(sized), CPU, 0)))

    return build_learner(config, 10, CPU, precision), load, source


def test_a_real_measurement_ends_in_a_recipe(capsys):
    out, err = made(capsys, "digits", "--hours", "0.02", "--device", "cpu")
    assert "images a second" in err
    assert "\nepochs: " in out and "\nflip_prob: 0.0 " in out


def test_measured_costs_are_those_of_the_networks():
    learner, load, source = learner_and_load()
    found = speed.measure(learner, load, Prepare(CPU), len(source))
    # The images' own cost is a difference of two times, and so may be nothing for a tiny network.
    assert found.image >= 0 and found.step >= 0 and found.crop > 0 and found.save > 0
    assert found.image + found.step > 0
    parameters = sum(p.numel() for p in learner.student.parameters())
    assert found.fixed_bytes >= 5 * 4 * parameters
    # Of an image's tokens: two crops of 10 and two of 5, in two blocks of width 24 and more.
    assert 2 * (2 * 10 + 2 * 5) * 24 * 4 * 8 < found.image_bytes < 10**6


def test_wider_networks_and_more_crops_need_more_memory():
    needs = {}
    for name, changes in {
        "plain": {}, "wide": {"embed_dim": 48}, "crops": {"local_crops_number": 8}
    }.items():  # fmt: skip
        learner, load, source = learner_and_load(**changes)
        needs[name] = speed.measure(learner, load, Prepare(CPU), len(source)).image_bytes
    assert needs["wide"] > 1.4 * needs["plain"] and needs["crops"] > 1.4 * needs["plain"]


@pytest.mark.parametrize(("step", "image"), [(0.05, 0.001), (0.0, 0.002)])
def test_what_two_sizes_of_step_differ_by_is_the_images_own_cost(step, image, monkeypatch):
    learner, load, source = learner_and_load("bf16")
    monkeypatch.setattr(speed, "_SECONDS", 10)

    def seconds(learner, prepare, batches, repeats=1):
        return step + image * sum(len(batch.places) for batch in batches)

    monkeypatch.setattr(speed, "_seconds", seconds)
    found = speed.measure(learner, load, Prepare(CPU), len(source))
    assert (found.step, found.image) == (pytest.approx(step, abs=1e-9), pytest.approx(image))
    monkeypatch.setattr(speed, "_SECONDS", 1e-6)  # few images only
    few = speed.measure(learner, load, Prepare(CPU), len(source))
    # What a step keeps however few its images, weights in half precision, is no cost of an image.
    assert 0.5 * few.image_bytes < found.image_bytes < few.image_bytes
    assert found.fixed_bytes > few.fixed_bytes


def test_slow_networks_are_timed_on_few_images(monkeypatch):
    learner, load, source = learner_and_load()
    sizes = []

    def seconds(learner, prepare, batches, repeats=1):
        sizes.append(sum(len(batch.places) for batch in batches))
        return 60.0

    monkeypatch.setattr(speed, "_seconds", seconds)
    found = speed.measure(learner, load, Prepare(CPU), len(source))
    assert len(sizes) == 1 and found.image == 60 / sizes[0]


def test_what_the_device_does_to_a_batch_counts_as_of_the_step():
    calls = []
    learner = SimpleNamespace(device=CPU, step=lambda step, batches: calls.append(batches))
    speed._seconds(learner, lambda batch: calls.append("prepared") or batch + 1, [1], 2)
    assert calls == ["prepared", [2]] * 2


def test_the_machine_is_this_one(monkeypatch):
    monkeypatch.undo()
    found = machine.find_machine(CPU, 3, 2)
    assert isinstance(found, Machine)
    assert (found.device, found.cores, found.workers) == ("cpu", 3, 2)
    assert found.memory is None or found.memory > 10**8
    assert 0 < found.share <= 1
