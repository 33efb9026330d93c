"""The probe: what it measures, what it draws, and what a run keeps by it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino_kit import cli, files, geometry
from dino_kit.assemble import Run, assemble
from dino_kit.backbones.build import create_backbone
from dino_kit.backbones.interface import Features
from dino_kit.data.crops import View
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.source import Subset
from dino_kit.evaluators import probe as probes
from dino_kit.evaluators.knn import knn
from dino_kit.evaluators.probe import Probe, evenly, sentence
from dino_kit.features import embed, extract
from dino_kit.training import checkpoint
from dino_kit.weights import EvalTransform

VIEWS = [View(size=8, scale=(0.5, 1.0)), View(size=8, scale=(0.25, 1.0))]
SMALL = (
    "--data_path digits --arch vit --embed_dim 24 --depth 2 --num_heads 2 --patch_size 4 "
    "--global_crops_size 8 --local_crops_number 0 --out_dim 64 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --batch_size_per_gpu 256 --num_workers 0 --epochs 4 --device cpu "
    "--warmup_epochs 1 --lr 0.01 --saveckp_freq 1"
).split()


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch):
    monkeypatch.setattr(probes, "_WATCHED", 60)
    monkeypatch.setattr(probes, "_CROPPED", 20)


def backbone():
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "image_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return create_backbone("vit", **sizes)


def probe(folder, labelled=True, source=None) -> Probe:
    pair = (DigitsSource("train"), DigitsSource("test")) if labelled else None
    return Probe(
        source or DigitsSource("train"), pair, views=VIEWS, seed=3, transform=EvalTransform(8),
        folder=folder, device=torch.device("cpu"),
    )  # fmt: skip


def lines(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "probe.jsonl").read_text().splitlines()]


def train(out, *flags) -> int:
    return cli.main(["train", *SMALL, "--output_dir", str(out), *map(str, flags)])


@pytest.mark.parametrize(
    ("images", "most", "expected"),
    [(10, 5, [0, 2, 4, 6, 8]), (7, 3, [0, 2, 4]), (4, 9, [0, 1, 2, 3]), (1, 8, [0])],
)
def test_a_part_is_spread_evenly_over_the_whole(images, most, expected):
    assert evenly(Subset(DigitsSource("test"), range(images)), most).indices == expected


def test_what_is_measured_is_what_it_says(tmp_path):
    network, source = backbone(), DigitsSource("train")
    result = probe(tmp_path)(network, 5)
    some = evenly(source, 60)
    z = F.normalize(embed(network, some, image_size=8, description="").features, dim=1)
    assert result["effective_rank"] == pytest.approx(float(geometry.effective_rank(z)))
    sets = [extract(network, s, image_size=8, description="")[:2] for s in (source, DigitsSource("test"))]
    expected = knn(*sets[0], *sets[1], [20], 0.07)[20]["top1"]
    assert result["knn_top1"] == pytest.approx(expected)
    assert (result["epoch"], result["images"], result["knn_k"]) == (5, 60, 20)
    assert (result["knn_bank"], result["knn_queries"]) == (len(source), len(DigitsSource("test")))
    assert 0 <= result["view_retrieval"] <= 1


def test_a_network_that_sees_only_what_crops_share_finds_every_view(tmp_path):
    """The mean colour of a picture in one colour survives every crop of it."""

    class Plain:
        root, classes = "plain", None

        def __len__(self):
            return 30

        def read(self, index):
            return np.full((9, 9, 3), (8 * index, 255 - 8 * index, 3 * index), dtype=np.uint8)

        def name(self, index):
            return str(index)

    class Colour(torch.nn.Module):
        embed_dim, patch_size = 3, 4

        def forward(self, images):
            return images.mean(dim=(2, 3))

        def forward_features(self, images):
            patches = F.avg_pool2d(images, 4).flatten(2).mT
            return Features(self(images), patches, (2, 2))

    one = probe(tmp_path, labelled=False, source=Plain())
    for crops in one.crops:
        crops.view = View(size=8, scale=(0.2, 1.0), jitter_prob=0, gray_prob=0, blur_prob=0)
    assert one(Colour(), 0)["view_retrieval"] == 1.0


def test_a_probe_is_the_same_each_time_and_leaves_the_network_as_it_was(tmp_path):
    network, one = backbone().train(), probe(tmp_path)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, second = one(network, 1), one(network, 1)
    for result in (first, second):
        result.pop("seconds")
    assert first == second and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_without_labels_there_is_a_sheet_and_no_accuracy(tmp_path):
    result = probe(tmp_path, labelled=False)(backbone(), 12)
    assert result["sheet"] == "looks/epoch0012.png" and "knn_top1" not in result
    with Image.open(tmp_path / result["sheet"]) as sheet:
        # Eight rows of an image, its attention and five neighbours.
        assert sheet.width > 7 * 112 and sheet.height > 8 * 112


def test_a_network_without_attention_is_drawn_by_the_similarity_of_its_patches(tmp_path):
    network = create_backbone("resmlp", patch_size=4, image_size=8, embed_dim=24, depth=2)
    result = probe(tmp_path, labelled=False)(network, 1)
    with Image.open(tmp_path / result["sheet"]) as sheet:
        assert sheet.width > 7 * 112


@pytest.mark.parametrize("images", [1, 2, 5])
def test_few_images_are_enough(tmp_path, images):
    source = Subset(DigitsSource("train"), range(images))
    result = probe(tmp_path, labelled=False, source=source)(backbone(), 0)
    assert (tmp_path / result["sheet"]).exists() and np.isfinite(result["effective_rank"])


def at(rank, retrieval, epoch=10, **more) -> dict:
    return {"epoch": epoch, "effective_rank": rank, "view_retrieval": retrieval, **more}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (at(6.0, 0.5, 20), "both still rise (since epoch 10)"),
        (at(6.0, 0.4, 20), "of the two, effective rank still rises (since epoch 10)"),
        (at(5.0, 0.5, 20), "of the two, view retrieval still rises (since epoch 10)"),
        (at(4.0, 0.4, 20), "neither effective rank nor view retrieval has risen since epoch 10"),
    ],
)
def test_the_sentence_says_what_still_rises(now, said):
    told = sentence(now, [at(9.0, 0.9, 0), at(5.0, 0.4)])
    assert said in told and f"effective rank {now['effective_rank']:.1f}" in told


def test_the_first_sentence_compares_with_nothing():
    told = sentence(at(5.0, 0.25, 0, knn_top1=31.25), [])
    assert told == "k-NN 31.2 %, effective rank 5.0, view retrieval 25.0 %."


@pytest.mark.parametrize(
    ("scores", "best"),
    [([], False), ([None], False), ([None, 3.0], True), ([5.0, 4.0], False), ([5.0, 5.0], False),
     ([4.0, None, 5.0], True), ([5.0, None], False)],
)  # fmt: skip
def test_the_best_is_above_all_before_it(scores, best):
    assert checkpoint.is_best(scores) is best


def test_a_run_is_probed_before_it_every_so_many_epochs_and_at_the_end(tmp_path, capsys):
    assert train(tmp_path / "run", "--probe_freq", 3) == 0
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [0, 3, 4]
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 15, 20]
    assert {path.name for path in (tmp_path / "run" / "looks").iterdir()} == {
        "epoch0000.png", "epoch0003.png", "epoch0004.png"}  # fmt: skip
    assert "epoch 3: effective rank" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoint_best.pth").exists()  # nothing says which is best


def test_no_probe_where_none_is_wanted(tmp_path):
    assert train(tmp_path / "run", "--probe_freq", 0, "--epochs", 1) == 0
    assert not (tmp_path / "run" / "looks").exists()
    assert not (tmp_path / "run" / "probe.jsonl").exists()


def test_probing_changes_nothing_of_the_run(tmp_path):
    for name, freq in (("with", 1), ("without", 0)):
        assert train(tmp_path / name, "--probe_freq", freq, "--probe_data", "digits") == 0
    one, other = (
        files.read_weights(tmp_path / n / "checkpoint.pth")["teacher"] for n in ("with", "without")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)


def scores(monkeypatch, values) -> None:
    """Let the probe's accuracy be each of ``values`` in turn."""
    waiting = iter(values)
    monkeypatch.setattr(Probe, "_classify", lambda self, network: {"knn_top1": next(waiting)})


def test_the_best_checkpoint_is_that_of_the_best_probe(tmp_path, monkeypatch):
    scores(monkeypatch, [10.0, 12.0, 30.0, 20.0, 29.0])
    assert train(tmp_path / "run", "--probe_freq", 1, "--probe_data", "digits") == 0
    best = files.read_weights(tmp_path / "run" / "checkpoint_best.pth")
    kept = files.read_weights(tmp_path / "run" / "checkpoint0001.pth")
    assert best["epoch"] == kept["epoch"] == 2
    assert all(torch.equal(best["teacher"][n], kept["teacher"][n]) for n in kept["teacher"])


def test_no_checkpoint_is_best_that_is_below_the_untrained_network(tmp_path, monkeypatch):
    scores(monkeypatch, [50.0, 12.0, 30.0, 20.0, 29.0])
    assert train(tmp_path / "run", "--probe_freq", 1, "--probe_data", "digits") == 0
    assert not (tmp_path / "run" / "checkpoint_best.pth").exists()


def test_no_older_weights_are_called_best_where_those_of_the_best_probe_found_no_room(
    tmp_path, monkeypatch, capsys
):
    save = checkpoint.save

    def refused(folder, content, *more):
        if content["step"] == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, content, *more)

    monkeypatch.setattr(checkpoint, "save", refused)
    scores(monkeypatch, [10.0, 12.0, 11.0, 30.0, 29.0])
    assert train(tmp_path / "run", "--probe_freq", 1, "--probe_data", "digits") == 0
    best = files.read_weights(tmp_path / "run" / "checkpoint_best.pth")
    kept = files.read_weights(tmp_path / "run" / "checkpoint0000.pth")
    assert best["epoch"] == kept["epoch"] == 1
    assert "checkpoint_best.pth is not of the best probe, that after step 15" in capsys.readouterr().err


def test_a_probe_that_an_interruption_left_out_is_made_up_for(tmp_path, monkeypatch):
    out = tmp_path / "run"
    look = Run.look

    def interrupted(self, done):
        if done == 10:
            raise KeyboardInterrupt
        look(self, done)

    flags = ("--probe_freq", 1, "--probe_data", "digits")
    monkeypatch.setattr(Run, "look", interrupted)
    assert train(out, *flags) == 130
    assert [line["step"] for line in lines(out)] == [0, 5]
    monkeypatch.setattr(Run, "look", look)
    assert train(out, *flags) == 0
    assert [line["step"] for line in lines(out)] == [0, 5, 10, 15, 20]
    whole = tmp_path / "whole"
    assert train(whole, *flags) == 0
    for one, other in zip(lines(out), lines(whole), strict=True):
        for line in (one, other):
            line.pop("seconds")
        assert one == other


def test_probe_data_without_labels_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    out = tmp_path / "run"
    assert train(out, "--probe_data", tmp_path / "flat") == 2
    assert "has no labels" in capsys.readouterr().err and not out.exists()


def test_the_time_of_a_probe_is_not_the_runs(tmp_path, monkeypatch):
    """A probe that takes three seconds of a stopped clock leaves the speed as it was."""
    config = cli.parse("train", [*SMALL, "--output_dir", str(tmp_path / "run")])
    run = assemble(config)
    began = run.monitor._began
    from dino_kit.training import monitor as module

    now = iter([100.0, 103.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    with run.monitor.paused():
        pass
    assert run.monitor._began == began + 3.0
