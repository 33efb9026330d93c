"""``dino-kit bench``: what its numbers are made of, and what they add up to. No time is asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import TINY

from dino_kit import cli
from dino_kit.backbones import products
from dino_kit.bench import data, fit, knn, step
from dino_kit.bench import machine as bench_machine
from dino_kit.checking import feeding
from dino_kit.checking.feeding import Cost, Device
from dino_kit.config import fields
from dino_kit.config.commands import COMMANDS
from dino_kit.config.train import TrainConfig
from dino_kit.errors import RunFailed
from dino_kit.evaluators.knn import knn as classify
from dino_kit.proposal import machine, speed
from dino_kit.proposal.fit import Speed
from dino_kit.proposal.machine import Machine

CROPS = [
    "--global_crops_size", "16", "--local_crops_size", "8", "--local_crops_number", "2",
    "--batch_size_per_gpu", "4",
]  # fmt: skip
ABOUT = {"images_per_second", "peak_bytes", "phases", "command", "machine", "versions", "settings"}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_share_of_a_core", lambda: 1.0)
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    monkeypatch.setattr(feeding, "_SAMPLE", 3)
    monkeypatch.setattr(bench_machine, "_MATMUL_SECONDS", 1e-6)
    monkeypatch.setattr(bench_machine, "_SMALLER_SIDE", 64)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 255, (40, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def bench(*words, status: int = 0) -> dict:
    """The numbers that the command writes, each of the kind that it is to be."""
    assert cli.main(["bench", *map(str, words), "--json", "numbers.json"]) == status
    with open("numbers.json") as file:
        numbers = json.load(file)
    assert set(numbers) >= ABOUT
    assert numbers["machine"]["cores"] >= 1 and numbers["machine"]["cpu"]
    assert numbers["versions"]["torch"]
    assert all(type(seconds) is float and seconds >= 0 for seconds in numbers["phases"].values())
    return numbers


# data


@pytest.mark.parametrize("workers", [0, 2])
def test_data_tells_the_rate_and_where_an_image_s_time_goes(folder, workers):
    told = bench("data", folder, *CROPS, "--num_workers", workers, "--seconds", "0.01")
    assert told["images_per_second"] > 0 and told["images_per_second_per_core"] > 0
    assert told["num_workers"] == workers and told["images"] >= 4
    assert list(told["phases"]) == [
        "read", "decode", "parameters", "global_resize", "global_photometric", "local_resize",
        "local_photometric", "batch",
    ]  # fmt: skip
    whole = 1 / told["images_per_second_in_process"]
    assert sum(told["phases"].values()) == pytest.approx(whole, rel=1e-6)
    assert (told["images_per_second"] == told["images_per_second_in_process"]) == (workers == 0)
    assert told["peak_bytes"] is None or told["peak_bytes"] >= 0


def test_data_takes_a_recipe_and_says_how_to_repeat_it(folder):
    told = bench("data", "cifar10_vit_tiny", folder, "--num_workers", "0", "--seconds", "0.01")
    assert told["settings"]["global_crops_size"] == 32
    words = told["command"].split()
    assert words[:3] == ["dino-kit", "bench", "data"] and "--json" not in words
    again = cli.parse("bench data", words[3:])
    assert fields.to_plain(again) == {**told["settings"], "json": None}


def test_data_without_local_crops_has_no_such_phase(folder):
    told = bench(
        "data", folder, "--local_crops_number", "0", "--num_workers", "0", "--seconds", "0.01",
        "--global_crops_size", "16",
    )  # fmt: skip
    assert not [name for name in told["phases"] if name.startswith("local")]


def test_data_counts_more_than_an_epoch_and_passes_over_what_is_broken(folder):
    (folder / "broken.png").write_bytes(b"no image")
    told = bench("data", folder, *CROPS, "--num_workers", "0", "--seconds", "2")
    assert told["images"] > 13


@pytest.mark.parametrize(("pixels", "used"), [("fast", "open_raster"), ("exact", "decode")])
def test_what_is_timed_reads_images_as_the_run_does(folder, monkeypatch, pixels, used):
    from dino_kit import assemble

    calls = {"decode": 0, "open_raster": 0}
    real = {name: getattr(assemble, name) for name in calls}
    for name in calls:
        def counted(*arguments, name=name):
            calls[name] += 1
            return real[name](*arguments)

        monkeypatch.setattr(assemble, name, counted)
    alone = ["--num_workers", "0", "--seconds", "0.01", "--pixels", pixels]
    told = bench("data", folder, *CROPS, *alone)
    # The first image once by itself, and all once in the loader and once stage by stage.
    assert calls.pop(used) == 2 * (1 + told["images"]) and set(calls.values()) == {0}
    calls |= {"decode": 0, "open_raster": 0}
    bench("fit", *TINY, "--data_path", folder, "--pixels", pixels)
    assert calls.pop(used) > 3 and set(calls.values()) == {0}


def test_data_leaves_out_what_is_left_to_the_device(folder, capsys):
    alone = ["--num_workers", "0", "--seconds", "0.01"]
    for where, told in (("cpu", False), ("device", True)):
        phases = bench("data", folder, *CROPS, *alone, "--augment", where)["phases"]
        colours = [phases["global_photometric"], phases["local_photometric"]]
        assert colours == [0.0, 0.0] if told else any(colours)
        assert ("left to the device" in capsys.readouterr().out) == told


def test_stages_never_add_up_to_more_than_the_whole():
    phases = data._within({"read": 1.0, "decode": 5.0, "global_resize": -1.0}, 3.0, 2)
    assert phases == pytest.approx(
        {"read": 0.25, "decode": 1.25, "global_resize": 0.0, "batch": 0.0}
    )
    phases = data._within({"read": 1.0}, 3.0, 2)
    assert phases == pytest.approx({"read": 0.5, "batch": 1.0})


def test_every_setting_of_data_is_as_train_has_it():
    """Under one name stands one thing, so that a recipe means here what it means there."""
    for name in ("bench data", "bench knn"):
        ours = COMMANDS[name].schema
        for field in set(fields.names(ours)) & set(fields.names(TrainConfig)) - {"embed_dim"}:
            assert fields._kind(ours, field) == fields._kind(TrainConfig, field)
            default = fields._field(TrainConfig, field).default
            assert fields._field(ours, field).default == default


# step


def test_step_tells_rate_memory_phases_and_utilisation():
    told = bench("step", *TINY, "--seconds", "0.01")
    assert told["images_per_second"] > 0 and told["images_a_step"] == 8
    assert tuple(told["phases"]) == step.PHASES
    assert all(told["phases"].values())
    whole = 1 / told["images_per_second"]
    assert sum(told["phases"].values()) == pytest.approx(whole, rel=1e-6)
    assert told["utilisation"] == pytest.approx(
        told["flops_a_step"] / told["seconds_a_step"] / told["matmul_flops_a_second"]
    )
    words = told["command"].split()
    assert "--output_dir" not in words and "--data_path" not in words
    assert cli.parse("bench step", words[3:]).depth == 2


@pytest.mark.parametrize("by_onednn", [False, True])
def test_step_counts_the_operations_of_matrix_products_and_attention(monkeypatch, by_onednn):
    if by_onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch comes without oneDNN")
    monkeypatch.setattr(products, "_FEW", 1)
    monkeypatch.setattr(products, "_prefers_onednn", lambda: by_onednn)

    def flops(*more: str) -> int:
        still = ["--drop_path_rate", "0", "--local_crops_number", "0", "--seconds", "0.01"]
        return bench("step", *TINY, *still, *more)["flops_a_step"]

    one, two = flops(), flops("--depth", "3")
    # Per block and crop: linear layers (qkv, proj, MLP), forward and twice that backward in the
    # student, forward in the teacher; attention has two products forward and five backward.
    tokens, width, crops = 17, 24, 16
    linear = 2 * tokens * 12 * width**2
    attention = 2 * 2 * tokens**2 * width
    assert two - one == crops * (4 * linear + (2 + 2.5) * attention)


def test_step_tells_of_few_operations_more_than_none(capsys):
    told = bench("step", *TINY, "--seconds", "0.01")
    said = re.search(r"A step takes (\S+)\s+billion", capsys.readouterr().out)[1]
    assert float(said) == pytest.approx(told["flops_a_step"] / 1e9, rel=0.1)


def test_step_in_parts_takes_the_same_images():
    told = bench("step", *TINY, "--batch_size_per_gpu", "3", "--seconds", "0.01")
    assert told["images_a_step"] == 8
    assert all(told["phases"].values())


def test_step_in_half_precision():
    told = bench("step", *TINY, "--precision", "bf16", "--seconds", "0.01")
    assert told["precision"] == "bf16"


def test_hooks_of_the_clock_are_removed():
    hooks = {}
    learner = SimpleNamespace(
        device=torch.device("cpu"),
        student=torch.nn.Linear(2, 2),
        teacher=SimpleNamespace(head=torch.nn.Linear(2, 2)),
    )
    learner.optimizer = torch.optim.SGD(learner.student.parameters(), 0.1)
    with step._clock(learner) as lap:
        hooks["during"] = len(learner.student._forward_hooks)
        phases = lap(lambda: None)
    assert hooks["during"] == 1 and not learner.student._forward_hooks
    assert not learner.student._forward_pre_hooks and not learner.teacher.head._forward_hooks
    assert not learner.optimizer._optimizer_step_pre_hooks
    assert tuple(phases) == step.PHASES


def test_a_step_that_is_not_finite_ends_the_measurement():
    outcomes = [SimpleNamespace(committed=False, overflowed=True)] * 3
    outcomes += [SimpleNamespace(committed=True, overflowed=False)]
    learner = SimpleNamespace(step=lambda step, batches: outcomes.pop(0))
    step._committed(learner, 0, [])  # overflows only lower the scale of fp16
    assert not outcomes
    outcomes += [SimpleNamespace(committed=False, overflowed=False)]
    with pytest.raises(RunFailed, match="not finite"):
        step._committed(learner, 0, [])


# knn

SMALL = [
    "--num_train", "300", "--num_queries", "50", "--embed_dim", "8", "--num_classes", "5",
    "--nb_knn", "3", "10",
]  # fmt: skip


def test_knn_finds_the_same_by_every_way():
    told = bench("knn", *SMALL)
    ways = ["faiss", "torch", "reference"]
    assert list(told["seconds"]) == list(told["top1"]) == ways
    assert told["top1"]["faiss"] == told["top1"]["torch"] == told["top1"]["reference"]
    assert 20 < told["top1"]["faiss"]["10"] <= 100
    assert told["times_the_reference"]["reference"] == 1
    whole = 1 / told["images_per_second"]
    assert sum(told["phases"].values()) == pytest.approx(whole, rel=1e-6)


def test_the_way_that_is_compared_with_is_knn_too():
    features = knn.random_features(200, 41, 8, 7, seed=3)
    train, labels, test, truth = features
    assert train.shape == (200, 8) and test.shape == (41, 8)
    assert torch.allclose(train.norm(dim=1), torch.ones(200))
    for k in (1, 5, 20):
        ours = classify(train, labels, test, truth, [k], 0.07)[k]["top1"]
        theirs = knn.votes_of_a_matrix_product(features, k, 0.07, 7)
        assert theirs == pytest.approx(ours)


# fit

NIGHT = Machine("cuda", "A GPU", cores=4, workers=4, memory=10_000, memory_of="the GPU")


def asked(**changes) -> fit.Asked:
    return fit.Asked(**{"images": 1000, "epochs": 10, "batch": 100, "at_a_time": 50,
                        "num_workers": 4, **changes})  # fmt: skip


def speed_of(**changes) -> Speed:
    return Speed(**{"step": 0.0, "image": 0.01, "crop": 0.0, "save": 0.0, "fixed_bytes": 3000,
                    "image_bytes": 100, **changes})  # fmt: skip


def test_fit_by_hand():
    quick_data, slow_data = Cost(0.0, 0.001, 0.001, 3), Cost(0.0, 0.04, 0.04, 3)
    told = fit.judge(asked(), speed_of(), quick_data, NIGHT)
    assert told.fits and told.largest_batch == 60 and told.needed_bytes == 8000
    assert told.allowed_bytes == pytest.approx(9000)  # a tenth of a GPU stays free
    assert told.rate == told.compute_rate == pytest.approx(100)
    assert told.limit == "compute"
    assert told.hours == pytest.approx(10 * 1000 / 100 / 3600)
    told = fit.judge(asked(at_a_time=61), speed_of(), quick_data, NIGHT)
    assert not told.fits
    told = fit.judge(asked(), speed_of(save=5.0), slow_data, NIGHT)
    assert told.rate == pytest.approx(4 / 0.08) and told.limit == "data"
    assert told.hours == pytest.approx(10 * (1000 / 50 + 5) / 3600)
    told = fit.judge(asked(num_workers=1), speed_of(), slow_data, NIGHT)
    assert told.rate == pytest.approx(12.5) and told.limit == "data"
    told = fit.judge(asked(num_workers=0), speed_of(), quick_data, NIGHT)
    assert told.rate == pytest.approx(1 / 0.012) and told.limit == "compute"
    told = fit.judge(asked(num_workers=0), speed_of(), slow_data, NIGHT)
    assert told.limit == "data"


def test_fit_on_a_cpu_shares_its_cores():
    here = Machine("cpu", "", cores=2, workers=2, memory=None, memory_of="")
    told = fit.judge(asked(), speed_of(), Cost(0.0, 0.005, 0.005, 3), here)
    assert told.fits and told.largest_batch is None
    assert told.rate == pytest.approx(1 / 0.015) and told.limit == "compute"
    told = fit.judge(asked(), speed_of(), Cost(0.0, 0.02, 0.02, 3), here)
    assert told.rate == pytest.approx(1 / 0.03) and told.limit == "data"


def test_pace_without_a_number_of_workers_is_with_as_many_as_it_takes():
    cost, device = Cost(0.0, 0.01, 0.01, 3), Device("cuda", "", 1000.0, 8)
    assert feeding.pace(cost, device) == feeding.pace(cost, device, 8) == pytest.approx(400)
    assert feeding.pace(cost, device, 2) == pytest.approx(100)


def test_fit_judges_a_run(folder, capsys):
    line = ["fit", *TINY, "--data_path", folder, "--epochs", "7"]
    told = bench(*line)
    assert told["fits"] is True and told["limit"] in ("data", "compute")
    assert told["images"] == 12 and told["hours"] > 0 and told["num_workers"] == 0
    assert told["largest_batch"] is None or told["largest_batch"] >= 8
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "7 epochs of 12 images take about" in shown


def test_fit_says_what_would_fit(folder, monkeypatch, capsys):
    from dino_kit.commands import bench as command

    few = Machine("cpu", "", cores=2, workers=2, memory=1000, memory_of="the machine")
    monkeypatch.setattr(command, "find_machine", lambda *_: few)
    line = ["fit", *TINY, "--data_path", folder]
    monkeypatch.setattr(command, "measure_step", lambda *_: speed_of(fixed_bytes=0))
    told = bench(*line, status=1)
    assert told["fits"] is False and told["largest_batch"] == 7
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--batch_size_per_gpu 7 would, with --total_batch_size 8 the same run in parts" in shown
    monkeypatch.setattr(command, "measure_step", lambda *_: speed_of(fixed_bytes=5000))
    assert bench(*line, status=1)["largest_batch"] == 0
    assert "not even one image does" in re.sub(r"\s+", " ", capsys.readouterr().out)

    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(command, "measure_step", no_room)
    told = bench(*line, status=1)
    assert told["fits"] is False and told["images_per_second"] is None
    assert "not even a step of a few images" in re.sub(r"\s+", " ", capsys.readouterr().out)


# faults


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("data", "--data_path is missing."),
        ("data nowhere", "nowhere"),
        ("data images --seconds 0", "--seconds is '0'; it takes a number above 0."),
        ("fit --arch vit_small", "--data_path is missing: which images is the run to read?"),
        ("fit --data_path images --total_batch_size 99", "fewer than one batch of 99"),
        ("step --arch resnet-50", "did you mean resnet50?"),
        ("step --precision fp16 --device cpu", "--precision fp16 needs a CUDA device"),
        ("step --global_crops_size 30", "not a multiple of --patch_size"),
        ("knn --nb_knn 30 --num_train 20", "--nb_knn 30 is more than the 20 images"),
        ("knn --json images", "--json images is a folder"),
    ],
)  # fmt: skip
def test_faults_are_told_before_any_work(folder, capsys, line, sentence):
    assert cli.main(["bench", *line.split()]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.startswith("dino-kit: error: ")


def test_data_of_which_no_image_can_be_read(tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    for number in range(8):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"no image")
    for line in (["data", "bad", *CROPS, "--num_workers", "0"], ["fit", *TINY, "--data_path", "bad"]):
        assert cli.main(["bench", *line]) == 2
        assert capsys.readouterr().err.startswith("dino-kit: error: ")


# machine


def test_the_processor_is_named_where_the_system_tells(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : A fast one\n")
    assert bench_machine.cpu_model(tmp_path / "cpuinfo") == "A fast one"
    assert bench_machine.cpu_model(tmp_path / "none")


def test_peak_is_what_was_taken_since():
    """In a process of its own: what earlier tests leave to be freed would be missing in between."""
    program = """
import numpy as np
from dino_kit.bench.machine import Peak
peak = Peak()
held = np.ones(8_000_000)
print(peak.bytes())
del held
print(peak.bytes())
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    if run.stdout.startswith("None"):
        pytest.skip("this system does not tell")
    held, after = map(int, run.stdout.split())
    assert held >= 0.9 * 64_000_000 and after >= 0.9 * 64_000_000
