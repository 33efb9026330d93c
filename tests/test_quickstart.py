"""The first command: its table, its pictures, what it says, and that it repeats."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
import torch

from dino_kit import cli, files
from dino_kit.assemble import build_learner, untrained_backbone
from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig


@pytest.fixture(scope="module", autouse=True)
def short():
    """Two epochs in place of the recipe's; and the threads are as before at the end."""
    read = recipe.read

    def read_short(schema, name):
        return read(schema, name) | {"epochs": 2, "warmup_epochs": 1, "num_workers": 0}

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "read", read_short)
        yield
    torch.set_num_threads(threads)


def quickstart(out, *flags) -> dict:
    assert cli.main(["quickstart", "--output_dir", str(out), *flags]) == 0
    return json.loads((out / "quickstart.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder, the numbers and the words of a run with seed 0."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = quickstart(out)
    return out, result, said.getvalue()


def test_it_pretrains_measures_shows_and_says_what_is_next(first):
    out, result, said = first
    for row in ("raw pixels", "untrained backbone", "teacher"):
        assert row in said
    assert "dino-kit train --arch vit_small --patch_size 16 --data_path FOLDER" in said
    assert str(out) in said and "attention.html" in said

    percents = result["top1_percent"]
    assert percents["pixels"]["digits"] > 97
    assert percents["pixels"]["digits:moved"] < 50
    for row in percents.values():
        for percent in row.values():
            assert 0 < percent < 100
            assert f"{percent:.1f}" in said
    assert result["checkpoint"]["sha256"] == files.sha256(out / "checkpoint.pth")

    for digit in range(10):
        pictures = {path.name for path in (out / f"attention/digit{digit}").iterdir()}
        assert pictures >= {f"attn-head{head}.png" for head in range(4)} | {"sheet.png"}
    page = (out / "attention/attention.html").read_text(encoding="utf-8")
    assert page.count("test digit ") == 10


def test_it_ends_by_writing_the_run_as_one_page(first):
    out, result, said = first
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"Open in a browser {out / 'report.html'}, the whole run on one page" in " ".join(
        said.split()
    )
    percents = result["top1_percent"]
    for network in ("untrained", "teacher"):
        for percent in percents[network].values():
            assert f"{percent:.2f}" in page
    assert page.count(", overlay") == 8 and "The nearest of 1,438 training images" in page


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(first, tmp_path):
    _, result, _ = first
    assert quickstart(tmp_path / "again")["top1_percent"] == result["top1_percent"]
    other = quickstart(tmp_path / "other", "--seed", "1")["top1_percent"]
    assert other["teacher"] != result["top1_percent"]["teacher"]
    assert other["pixels"] == result["top1_percent"]["pixels"]


def test_a_second_call_shows_the_finished_run_again(first):
    out, result, _ = first
    written = (out / "checkpoint.pth").stat().st_mtime_ns
    assert quickstart(out)["top1_percent"] == result["top1_percent"]
    assert (out / "checkpoint.pth").stat().st_mtime_ns == written


def test_another_seed_in_the_same_folder_is_refused_unless_the_run_may_go(first, tmp_path, capsys):
    out = shutil.copytree(first[0], tmp_path / "copy")
    words = ["quickstart", "--output_dir", str(out), "--seed", "1"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "seed was 0 and is now 1" in said and said.count("\n") == 1
    assert "--resume never" in said
    assert quickstart(out, "--seed", "1", "--resume", "never")["settings"]["seed"] == 1


def test_something_of_the_name_of_its_data_is_not_taken_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert cli.main(["quickstart"]) == 2
    assert f"because {tmp_path / 'digits'} takes their name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_the_untrained_backbone_is_what_the_run_starts_from():
    settings = recipe.read(TrainConfig, "quickstart") | {"output_dir": "out", "drop_path_rate": 0.1}
    config = fields.create(TrainConfig, settings)
    learner = build_learner(config, 10, torch.device("cpu"), "fp32")
    untrained = untrained_backbone(config)
    assert not untrained.training
    for network in (learner.student, learner.teacher):
        own = network.backbone.state_dict()
        assert own.keys() == untrained.state_dict().keys()
        assert all(torch.equal(own[name], w) for name, w in untrained.state_dict().items())
