"""The k-NN vote, and `dino-kit knn` from end to end."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_kit import cli, files, log
from dino_kit.backbones.build import create_backbone
from dino_kit.errors import UserError
from dino_kit.evaluators import knn as evaluator
from dino_kit.evaluators.knn import knn, vote
from dino_kit.search import nearest


@pytest.mark.parametrize("search", [evaluator.nearest_by_faiss, nearest])
def test_golden_percentages_for_every_k_from_one_search(golden, search):
    arrays = golden("knn")
    config = json.loads(str(arrays.pop("config")))
    searches = []

    def counted(bank, queries, k):
        searches.append(len(queries))
        return search(bank, queries, k)

    results = knn(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        ks=[int(k) for k in config["percent"]],
        temperature=config["temperature"],
        search=counted,
    )
    for k, expected in config["percent"].items():
        for name, percent in expected.items():
            assert results[int(k)][name] == pytest.approx(percent, abs=1e-9), (k, name)
    assert sum(searches) == len(arrays["test"])


def brute_force(similarity, labels, num_classes, temperature):
    """Classes by votes, one neighbour at a time."""
    sums = [0.0] * num_classes
    for value, label in zip(similarity, labels, strict=True):
        sums[label] += np.exp(value / temperature)
    return sorted(range(num_classes), key=lambda c: (-sums[c], c))[:5]


@settings(deadline=None, max_examples=80)
@given(
    k=st.integers(1, 12),
    classes=st.integers(1, 8),
    temperature=st.sampled_from([0.05, 0.07, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_vote_is_the_sum_over_neighbours(k, classes, temperature, seed):
    rng = np.random.default_rng(seed)
    similarity = rng.uniform(-1, 1, (6, k))
    labels = rng.integers(0, classes, (6, k))
    ranked = vote(torch.from_numpy(similarity), torch.from_numpy(labels), classes, temperature)
    rows = zip(similarity, labels, strict=True)
    expected = [brute_force(*row, classes, temperature) for row in rows]
    assert ranked.tolist() == expected


def test_among_equal_votes_the_lower_class_comes_first():
    similarity = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    assert vote(similarity, torch.tensor([[6, 2, 5, 1]]), 8, 0.07).tolist() == [[2, 6, 1, 5, 0]]


def test_a_low_temperature_neither_overflows_nor_changes_the_nearest():
    similarity = torch.tensor([[0.99, 0.9, 0.9]])
    assert vote(similarity, torch.tensor([[1, 0, 0]]), 2, 1e-4).tolist() == [[1, 0]]


@pytest.mark.parametrize("queries, votes", [(4, 1 << 22), (4096, 1), (3, 7)])
def test_chunks_do_not_change_the_result(monkeypatch, queries, votes):
    rng = np.random.default_rng(0)
    arrays = [torch.from_numpy(rng.normal(size=(n, 6)).astype("f4")) for n in (50, 23)]
    labels = [torch.from_numpy(rng.integers(0, 7, n)) for n in (50, 23)]
    arguments = (arrays[0], labels[0], arrays[1], labels[1], [3, 1, 20], 0.07)
    expected = knn(*arguments)
    monkeypatch.setattr(evaluator, "_QUERIES", queries)
    monkeypatch.setattr(evaluator, "_VOTES", votes)
    done = []
    assert knn(*arguments, advance=done.append) == expected
    assert list(expected) == [1, 3, 20] and sum(done) == 23


def two_classes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % 2
    noise = 0.1 * torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    return torch.eye(3)[labels] + noise, labels


def test_k_above_the_bank_is_clipped_with_a_notice(capsys):
    results = knn(*two_classes(14), *two_classes(6), ks=[1, 10, 20, 200], temperature=0.07)
    assert results == {k: {"top1": 100.0, "top5": None} for k in (1, 10)} | {
        14: {"top1": 100.0, "top5": None}
    }
    assert "k 20, 200 is more than the bank's 14 images; k is 14" in capsys.readouterr().err


def test_features_are_normalised_first():
    bank = torch.tensor([[1.0, 0.0], [300.0, 400.0]])  # the second is longer, and less alike
    queries, labels = torch.tensor([[5.0, 0.1]]), torch.tensor([0, 1])
    results = knn(bank, labels, queries, torch.tensor([0]), ks=[1, 2], temperature=0.07)
    assert [results[k]["top1"] for k in (1, 2)] == [100.0, 100.0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x * float("nan"), y), "not finite"),
        (lambda x, y: (x, y[:-1]), "labels of shape"),
        (lambda x, y: (x[:0], y[:0]), "one image or more"),
        (lambda x, y: (x, y - 1), "no class numbers"),
        (lambda x, y: (x[:, :2], y), "2 wide and the queries' 3"),
    ],
)
def test_features_that_cannot_be_classified_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        knn(*change(*two_classes(14)), *two_classes(6), ks=[3], temperature=0.07)


@pytest.mark.parametrize("ks, temperature", [([0], 0.07), ([3], 0.0), ([], 0.07)])
def test_a_vote_without_sense_is_refused(ks, temperature):
    with pytest.raises(UserError, match="from 1, and the temperature is above 0"):
        knn(*two_classes(14), *two_classes(6), ks=ks, temperature=temperature)


SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_backbone("vit", image_size=16, **SIZES)


def save_checkpoint(path: Path, backbone) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    config = {"arch": "vit", "global_crops_size": 16, **SIZES}
    torch.save({"teacher": state, "student": state, "config": config, "epoch": 3, "step": 9}, path)
    return path


def save_images(root: Path, per_class: int, classes=("dark", "light")) -> Path:
    rng = np.random.default_rng(len(root.name))
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 60, (20, 30 + number, 3)) + 190 * place
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def small(tmp_path, backbone):
    """Seven images of each of two classes, with a checkpoint of a run."""
    save_images(tmp_path / "data/train", 7)
    save_images(tmp_path / "data/val", 3)
    save_checkpoint(tmp_path / "run/checkpoint.pth", backbone)
    return tmp_path


def knn_command(small, *flags) -> int:
    words = ["knn", small / "run", "--data_path", small / "data", "--num_workers", "0", *flags]
    return cli.main([str(word) for word in words])


def test_the_command_on_two_classes_of_seven_images(small, backbone, capsys):
    assert knn_command(small, "--nb_knn", "1", "20", "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert "k is 14 instead" in shown.err
    assert f"{len(backbone.state_dict())} tensors matched" in shown.out
    result = json.loads((small / "run/knn.json").read_text())
    assert result["results"] == {k: {"top1": 100.0, "top5": None} for k in ("1", "14")}
    assert result["largest_class_percent"] == 50.0
    checkpoint = result["checkpoint"]
    assert checkpoint["sha256"] == files.sha256(small / "run/checkpoint.pth")
    assert (checkpoint["network"], checkpoint["epoch"], checkpoint["step"]) == ("teacher", 3, 9)
    assert result["transform"]["resize"] == result["transform"]["center_crop"] == 16
    assert (result["train_images"], result["test_images"], result["classes"]) == (14, 6, 2)
    assert torch.__version__.startswith(result["versions"]["torch"].split("+")[0])
    assert set(result["versions"]) >= {"python", "dino_kit", "faiss-cpu"}
    assert {Path(place).parent for place in result["read"].values()} == {small / "data"}
    assert set(os.listdir(small / "run")) == {"checkpoint.pth", "knn.json"}


def test_the_recorded_command_repeats_the_result(small, tmp_path):
    assert knn_command(small, "--nb_knn", "3", "5", "--temperature", "0.1") == 0
    first = json.loads((small / "run/knn.json").read_text())
    words = shlex.split(first["command"])
    assert words[:2] == ["dino-kit", "knn"]
    assert cli.main([*words[1:], "--output_dir", str(tmp_path / "again")]) == 0
    second = json.loads((tmp_path / "again/knn.json").read_text())
    assert {**second, "command": 0, "settings": 0} == {**first, "command": 0, "settings": 0}


def test_every_checkpoint_and_network_has_a_result_of_its_own(small, backbone):
    kept = save_checkpoint(small / "run/checkpoint0003.pth", backbone)
    data = ["--data_path", str(small / "data"), "--num_workers", "0"]
    assert cli.main(["knn", str(kept), *data]) == 0
    assert cli.main(["knn", "--pretrained_weights", str(kept), "--checkpoint_key", "student",
                     *data]) == 0
    found = {path.name for path in (small / "run").glob("*.json")}
    assert found == {"knn_checkpoint0003.json", "knn_checkpoint0003_student.json"}


def test_dumped_features_give_the_same_result(small):
    assert knn_command(small, "--dump_features", small / "dump") == 0
    assert sorted(path.name for path in (small / "dump").iterdir()) == [
        "features.json", "testfeat.pth", "testlabels.pth", "trainfeat.pth", "trainlabels.pth",
    ]  # fmt: skip
    bank = torch.load(small / "dump/trainfeat.pth", weights_only=True)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(14))
    assert knn_command(small, "--load_features", small / "dump") == 0
    first = json.loads((small / "run/knn.json").read_text())
    second = json.loads((small / "dump/knn.json").read_text())
    assert first["results"] == second["results"]
    assert second["features"]["origin"]["checkpoint"] == first["checkpoint"]


def _untouched(small) -> set[str]:
    return {str(path.relative_to(small)) for path in small.rglob("*")}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--embed_dim", "48"], "--embed_dim 48 contradicts"),
        (["--checkpoint_key", "momentum"], "it holds teacher, student"),
        (["--image_size", "18"], "nearest that is: 16"),
        (["--load_features", "{}/data"], "lacks trainfeat.pth"),
        (["--output_dir", "{}/run/checkpoint.pth"], "is a file; a folder is needed"),
        (["--train_data", "{}/data/train"], "--data_path"),
    ],
)
def test_a_fault_is_a_sentence_and_writes_nothing(small, capsys, flags, message):
    before = _untouched(small)
    assert knn_command(small, *(flag.format(small) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("dino-kit: error: ") and error.count("\n") == 1
    assert _untouched(small) == before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_left_out_named_and_counted(small, capsys, monkeypatch, workers):
    monkeypatch.setattr(log, "_noticed", set())
    assert knn_command(small, "--num_workers", workers) == 0
    whole = json.loads((small / "run/knn.json").read_text())
    assert whole["left_out"] == {"bank": {}, "queries": {}}
    (broken := small / "data/val/light/1.png").write_bytes(b"no image")
    assert knn_command(small, "--num_workers", workers) == 0
    said = capsys.readouterr()
    assert "1.png cannot be read as an image" in said.err and "left out" in said.err
    found = json.loads((small / "run/knn.json").read_text())
    assert found["test_images"] == whole["test_images"] - 1
    assert found["train_images"] == whole["train_images"]
    assert f"{found['test_images']} images classified" in said.out
    assert found["left_out"]["bank"] == {} and list(found["left_out"]["queries"]) == [str(broken)]


def test_where_no_query_can_be_used_nothing_is_written(small, capsys):
    for path in (small / "data/val").rglob("*.png"):
        path.write_bytes(b"no image")
    before = _untouched(small)
    assert knn_command(small) == 2
    assert "None of the" in (said := capsys.readouterr().err) and "cannot be read" in said
    assert _untouched(small) == before


def test_a_result_that_is_no_tensor_is_refused_and_runs_nothing(small, capsys, monkeypatch):
    monkeypatch.chdir(small)
    assert knn_command(small, "--dump_features", small / "dump") == 0
    torch.save(_RunsCode(), small / "dump/testfeat.pth")
    assert knn_command(small, "--load_features", small / "dump") == 2
    assert "testfeat.pth is not a tensor" in capsys.readouterr().err
    assert not (small / "ran").exists()


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)
