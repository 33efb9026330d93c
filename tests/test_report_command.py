"""``dino-kit report`` on real runs: what it looks at, and what stands there where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar
from test_report import Read
from tiny_run import TINY
from torch import nn

from dino_kit import cli, reporting, weights
from dino_kit.backbones.interface import Features
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.folder import FolderSource

FLAGS = [*TINY, *"--batch_size_per_gpu 8 --epochs 2 --warmup_epochs 1 --log_every_steps 1".split()]
CLASSES = ("cat", "dog", "owl")


def draw(path: Path, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    for n in range(count):
        pixels = rng.integers(0, 256, (24 + n, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{n}.png")


def train(data, out) -> Path:
    assert cli.main(["train", *FLAGS, "--data_path", str(data), "--output_dir", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pictures"
    for seed, name in enumerate(CLASSES):
        draw(root / name, 7, seed)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    return train(pictures, tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def report(run, *flags) -> Read:
    assert cli.main(["report", str(run), "--device", "cpu", *map(str, flags)]) == 0
    return Read((run / "report.html").read_text(encoding="utf-8"))


def pictures_in(read: Read, kind: str) -> list[str]:
    return [a["alt"] for tag, a in read.elements if tag == "img" and kind in a.get("alt", "")]


def test_the_page_is_written_beside_the_run_and_said_so(run, capsys):
    read = report(run)
    assert f"written to {run / 'report.html'} (0." in capsys.readouterr().out
    assert not list(run.glob(".*.tmp"))
    assert "of the teacher after 2 epochs" in read.body
    for kind in ("image", "overlay", "mean", "head 0", "head 1"):
        assert len(pictures_in(read, f", {kind}")) == 8
    assert pictures_in(read, ", head 2") == []
    assert "in 8 × 8 patches" in read.body  # twice the size of the crops
    assert "The nearest of 21 training images" in read.body


def test_another_file_can_be_named_and_an_older_page_makes_way(run, tmp_path):
    target = tmp_path / "new/page.html"
    for _ in range(2):
        report(run) and report(run, "--output", target)
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_neighbours_are_the_nearest_without_the_image_itself(trained, pictures):
    loaded = weights.load(trained)
    source = FolderSource(pictures)
    rows, note = reporting._neighbours(loaded, reporting._Data(source), torch.device("cpu"))
    assert len(rows) == 8 and "what is of the image's own class is in bold" in note
    everything = reporting.embed(loaded.backbone, source, **loaded.transform._asdict())[0]
    everything = nn.functional.normalize(everything, dim=1)
    names = [reporting._short(source, place) for place in range(len(source))]
    for row in rows:
        own = names.index(row.query.name)
        similarity = everything @ everything[own]
        similarity[own] = -2
        nearest = similarity.argsort(descending=True)[:5]
        assert [tile.name for tile in row.found] == [names[place] for place in nearest]
        expected = similarity[nearest].tolist()
        assert [tile.similarity for tile in row.found] == pytest.approx(expected, abs=1e-4)
        assert row.query.label == row.query.name.split("/")[0] and row.query.similarity is None
    assert {row.query.label for row in rows} == set(CLASSES)


def test_images_without_labels_have_neighbours_without_labels(tmp_path, capsys):
    draw(tmp_path / "flat", 9)
    read = report(train(tmp_path / "flat", tmp_path / "run"))
    assert "The nearest of 9 training images" in read.body and "in bold" not in read.body
    assert not any(a.get("class") == "same" for _, a in read.elements)
    shown = [a for tag, a in read.elements if tag == "figure" and a.get("class") == "found"]
    assert len(shown) == 8 * 5


def test_images_can_be_named(run, tmp_path, capsys):
    draw(tmp_path / "mine", 2)
    read = report(run, "--image_path", tmp_path / "mine")
    assert pictures_in(read, ", overlay") == ["0.png, overlay", "1.png, overlay"]
    one = report(run, "--image_path", tmp_path / "mine/1.png")
    assert pictures_in(one, ", overlay") == ["1.png, overlay"]
    pixels = {f"a/{n}.png": (tmp_path / f"mine/{n}.png").read_bytes() for n in range(2)}
    read = report(run, "--image_path", write_tar(tmp_path / "mine.tar", pixels))
    assert pictures_in(read, ", overlay") == ["a/0.png, overlay", "a/1.png, overlay"]
    (tmp_path / "mine/0.png").write_bytes(b"no image")
    read = report(run, "--image_path", tmp_path / "mine")
    assert pictures_in(read, ", overlay") == ["1.png, overlay"]
    assert "0.png cannot be read as an image" in read.body

    page = (run / "report.html").read_bytes()
    command = ["report", str(run), "--image_path", str(tmp_path / "mine/0.png")]
    assert cli.main(command) == 2
    assert "has nothing that can be shown" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "none")]) == 2
    assert "is neither an image nor a folder of images" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == page


def test_data_that_is_gone_leaves_a_sentence_and_named_images_are_shown_still(run, tmp_path):
    recipe = run / "config.yaml"
    text = recipe.read_text().splitlines()
    gone = [f"data_path: {tmp_path}/gone" if "data_path" in line else line for line in text]
    recipe.write_text("\n".join(gone))
    read = report(run)
    assert read.body.count("The run's images cannot be read here any more.") == 2
    assert pictures_in(read, ", overlay") == []
    draw(tmp_path / "mine", 1)
    read = report(run, "--image_path", tmp_path / "mine")
    assert read.body.count("The run's images cannot be read here any more.") == 1
    assert len(pictures_in(read, ", overlay")) == 1


@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_without_a_checkpoint_the_page_says_so_and_has_the_rest(run, kind):
    (run / "checkpoint.pth").unlink()
    if kind == "damaged":
        (run / "checkpoint.pth").write_bytes(b"PK no checkpoint")
    read = report(run)
    said = {"missing": "There is no checkpoint.pth yet", "damaged": "or is damaged"}[kind]
    assert read.body.count(said) == 2
    assert any(a.get("id") == "chart-loss" for _, a in read.elements)


class Mixer(nn.Module):
    """A network without attention, as thin as can be."""

    embed_dim, patch_size, num_prefix_tokens = 5, 4, 0

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 4, 4)

    def forward_features(self, images):
        x = self.stem(images)
        patches = x.flatten(2).transpose(1, 2)
        return Features(patches.mean(dim=1), patches, tuple(x.shape[2:]))

    def forward(self, images):
        return self.forward_features(images).pooled


def test_a_network_without_attention_shows_which_patches_are_like_the_whole(run, monkeypatch):
    load = weights.load

    def mixer(path):
        return load(path)._replace(backbone=Mixer(), architecture={"name": "mixer"})

    monkeypatch.setattr(weights, "load", mixer)
    read = report(run)
    assert "mixer has no self-attention, so this is what every network has" in read.body
    assert len(pictures_in(read, ", similarity")) == len(pictures_in(read, ", overlay")) == 8
    assert pictures_in(read, ", mean") == pictures_in(read, ", head") == []


def test_looking_ends_when_the_time_is_over_and_what_is_there_is_shown(trained, monkeypatch):
    monkeypatch.setattr(reporting, "_SECONDS", 0.0)
    loaded, data = weights.load(trained), reporting._Data(DigitsSource("train"))
    seen, _ = reporting._attention(loaded, data, torch.device("cpu"))
    assert len(seen) == 1
    rows, note = reporting._neighbours(loaded, data, torch.device("cpu"))
    assert len(rows) == 8 and "The nearest of 64 of 1,438 training images" in note


def test_a_large_collection_is_searched_in_part(trained, monkeypatch):
    monkeypatch.setattr(reporting, "_BANK", 100)
    data = reporting._Data(DigitsSource("train"))
    rows, note = reporting._neighbours(weights.load(trained), data, torch.device("cpu"))
    assert "The nearest of 100 of 1,438 training images" in note
    assert len({row.query.label for row in rows}) == 8  # of as many classes as there can be


def test_too_few_images_have_no_neighbours(trained, tmp_path):
    draw(tmp_path / "few", 5)
    data = reporting._Data(FolderSource(tmp_path / "few"))
    rows, note = reporting._neighbours(weights.load(trained), data, torch.device("cpu"))
    assert rows == [] and note == "The run has only 5 images, too few to have neighbours."


def test_results_and_recipe_of_the_run_are_on_the_page(run, pictures, capsys):
    assert cli.main(["knn", str(run), "--data_path", str(pictures), "--nb_knn", "3"]) == 0
    percents = json.loads((run / "knn.json").read_text())["results"]["3"]
    read = report(run)
    assert f"{percents['top1']:.2f}" in read.body and "k 3" in read.body
    assert "Of the paper's recipes" in read.body
    (figure,) = [f for g in read.data["groups"] for f in g["figures"] if f["key"] == "knn"]
    assert figure["points"][0]["y"] == [pytest.approx(percents["top1"], rel=1e-4)]


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "A run's folder is missing"),
        (["{tmp}/none"], "There is no folder"),
        (["{tmp}/data"], "is no run's folder"),
        (["{run}", "--output", "{tmp}"], "is a folder; give the name of a file in it"),
        (["{run}", "--device", "gpu"], "it takes auto, cpu, cuda"),
    ],
)
def test_a_fault_is_a_sentence_and_nothing_is_written(run, tmp_path, words, said, capsys):
    draw(tmp_path / "data", 1)
    words = [word.format(tmp=tmp_path, run=run) for word in words]
    assert cli.main(["report", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (run / "report.html").exists()


def test_where_a_browser_is_required_none_is_a_failure_and_no_skip(tmp_path):
    """``.ci/run`` asks for that."""
    environment = {**os.environ, "PATH": str(tmp_path)}
    for wish, status in ((None, 0), ("required", 1)):
        environment |= {"DINO_KIT_BROWSER": wish} if wish else {}
        done = subprocess.run(
            [sys.executable, "-c", "import browser"], cwd=Path(__file__).parent,
            env={k: v for k, v in environment.items() if wish or k != "DINO_KIT_BROWSER"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    assert "neither chromium nor google-chrome is installed" in done.stderr
