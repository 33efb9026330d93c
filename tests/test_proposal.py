"""A proposal: what is seen of images and of a machine, what follows from it, and its text."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig
from dino_kit.data.sources.digits import DigitsSource
from dino_kit.data.sources.folder import FolderSource
from dino_kit.data.sources.source import Subset
from dino_kit.errors import UserError
from dino_kit.proposal import machine as machine_module
from dino_kit.proposal import rules
from dino_kit.proposal.fit import Request, Speed, Trial, fit, ladder, suffices, worth_trying
from dino_kit.proposal.machine import Machine, host_memory
from dino_kit.proposal.propose import propose
from dino_kit.proposal.survey import Survey, look
from dino_kit.proposal.text import as_text

PAPER = recipe.read(TrainConfig, "vits16_100ep")


def survey_of(images=5000, side=32, **more) -> Survey:
    known = {"width": side, "height": side, "shorter": (side,) * 3, "sampled": min(images, 256)}
    return Survey(images=images, **(known | more))


def machine_of(device="cpu", cores=2, memory=16e9, **more) -> Machine:
    memory = None if memory is None else int(memory)
    return Machine(device, "", cores, cores, memory, "the machine", **more)


def trials_of(survey: Survey, fast=1.0, arch=None, **speed) -> list[Trial]:
    """Each candidate three times as slow as the one before, and twice as large."""
    known = {"step": 0.02, "crop": 0.002, "save": 0.1}
    return [
        Trial(
            candidate,
            "fp32",
            Speed(
                **{name: seconds / fast for name, seconds in known.items()} | speed,
                image=0.006 * 3**place / fast,
                fixed_bytes=10**8 * 2**place,
                image_bytes=10**7 * 2**place,
            ),
        )
        for place, candidate in enumerate(ladder(survey, arch))
    ]


def proposal_of(survey=None, machine=None, fast=1.0, **request):
    survey, machine = survey or survey_of(), machine or machine_of()
    asked = Request(**({"data_path": "images", "hours": 8.0} | request))
    return propose(survey, machine, trials_of(survey, fast, asked.arch), asked)


def read_back(text: str, tmp_path_factory) -> TrainConfig:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    values = recipe.read(TrainConfig, str(path))
    return fields.create(TrainConfig, values | {"output_dir": "out"})


# Whatever is seen, the recipe can be run


@settings(max_examples=150, deadline=None)
@given(
    images=st.one_of(st.integers(1, 300), st.integers(300, 2_000_000)),
    sides=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    gray=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    memory=st.sampled_from([None, 6e9, 80e9]),
    fast=st.sampled_from([0.5, 3.0, 100.0, 2000.0]),
    hours=st.floats(0.02, 1e5),
    batch=st.sampled_from([None, 1, 48, 300]),
    arch=st.sampled_from([None, "vit", "vit_small", "vit_large"]),
)
def test_a_recipe_is_valid_fits_the_hours_and_the_memory_and_reads_back_to_the_same(
    tmp_path_factory, images, sides, gray, device, memory, fast, hours, batch, arch
):
    width, height = sides
    survey = survey_of(images, min(sides), width=width, height=height, gray=gray, kinds=("PNG",))
    machine = machine_of(device, 4, memory)
    try:
        proposal = proposal_of(
            survey, machine, fast, hours=hours, total_batch_size=batch, arch=arch
        )
    except UserError as error:
        needs = "fewer than one batch" if (batch or 0) > images else "does not suffice"
        assert needs in str(error) and "\n" not in str(error)
        return
    text = as_text(proposal, "dino-kit recipe images", "mine.yaml")
    assert max(map(len, text.splitlines())) <= 100
    config = read_back(text, tmp_path_factory)
    for name, value in proposal.settings.items():
        assert getattr(config, name) == value, name
    assert config.total_batch_size <= images
    assert batch in (None, config.total_batch_size)
    assert 1 <= config.batch_size_per_gpu <= config.total_batch_size
    assert not config.use_bn_in_head or config.batch_size_per_gpu == config.total_batch_size
    assert config.warmup_epochs < config.epochs and config.freeze_last_layer < config.epochs
    assert config.local_crops_size < config.global_crops_size <= 224
    run = proposal.run
    assert 0 < run.seconds < hours * 3600
    assert run.steps == config.epochs * (images // config.total_batch_size)
    if memory:
        speed = run.trial.speed
        assert speed.fixed_bytes + config.batch_size_per_gpu * speed.image_bytes < memory


@pytest.mark.parametrize("images", [100, 5_000, 40_000, 1_281_167])
@pytest.mark.parametrize("batch", [None, 64])
@pytest.mark.parametrize("fast", [1.0, 300.0])
def test_more_time_never_means_a_smaller_network_or_less_of_it(images, batch, fast):
    survey = survey_of(images)
    before = None
    for hours in np.geomspace(0.05, 1e4, 60):
        try:
            run = proposal_of(survey, fast=fast, hours=hours, total_batch_size=batch).run
        except UserError:
            assert before is None  # what fitted once does not cease to
            continue
        if before and run.trial == before.trial:
            assert run.epochs >= before.epochs
            assert batch is None or run.steps >= before.steps
        elif before:
            order = [candidate for candidate, *_ in trials_of(survey)]
            assert order.index(run.trial.candidate) > order.index(before.trial.candidate)
        before = run
    assert before is not None


def test_crops_share_the_cores_with_the_networks_but_not_a_gpu():
    survey, request = survey_of(6400), Request("images", 8, 64)
    speed = Speed(0.1, 0.01, 0.02, 0.5, 0, 0)  # 100 steps an epoch, 0.74 s each without crops
    trial = Trial(ladder(survey, None)[0], "fp32", speed)

    def epoch(device, cores):
        return fit(trial, survey, machine_of(device, cores), request).epoch_seconds

    assert epoch("cpu", 1) == pytest.approx(100 * (0.74 + 64 * 0.02) + 0.5)
    assert epoch("cpu", 4) == pytest.approx(100 * (0.74 + 64 * 0.02 / 4) + 0.5)
    assert epoch("cuda", 4) == pytest.approx(100 * 0.74 + 0.5)
    assert epoch("cuda", 1) == pytest.approx(100 * 64 * 0.02 + 0.5)  # the crops hold it back


@pytest.mark.parametrize("hours", [0.2, 1, 8, 100])
def test_more_memory_never_means_fewer_images_at_a_time(hours):
    survey = survey_of(side=224)
    trials = trials_of(survey, fast=100)[-1:]
    request = Request("images", hours)
    micros = [
        fit(trials[0], survey, machine_of(memory=memory), request).micro
        for memory in np.geomspace(1e9, 1e12, 30)
    ]
    assert micros == sorted(micros) and micros[0] == 0 and micros[-1] > 1


def test_the_same_measurements_give_the_same_text():
    texts = {as_text(proposal_of(), "dino-kit recipe images", "mine.yaml") for _ in range(2)}
    assert len(texts) == 1


def test_each_value_has_a_reason_and_says_what_the_paper_has():
    text = as_text(proposal_of(), "dino-kit recipe images", "mine.yaml")
    blocks = [block for block in text.split("\n\n") if "data_path" not in block]
    values = [block for block in blocks if not all(x.startswith("#") for x in block.splitlines())]
    assert len(values) > 15
    for block in values:
        assert block.startswith("# ")
        for line in block.splitlines():
            assert line.startswith("# ") or "# the paper: " in line or "# as in the paper" in line
    assert "epochs: " in text and "# the paper: 100\n" in text
    assert "student_temp: 0.1                   # as in the paper\n" in text
    assert "embed_dim: 192                      # the paper: 384\n" in text


@pytest.mark.parametrize(("classes", "said"), [
    (None, "no labels, and none are needed"), (1, "no labels, and none are needed"),
    (10, "10 folders, which may be classes"),
])  # fmt: skip
def test_one_folder_is_no_class_and_the_hours_are_told_as_they_were_given(classes, said):
    text = as_text(proposal_of(survey_of(classes=classes), hours=1.0), "dino-kit recipe images", "mine.yaml")
    text = " ".join(text.replace("# ", "").split())
    assert said in text and "of --hours 1, for" in text and "what --hours 1 holds" in text
    assert "1 hours" not in text


def test_what_stands_beside_a_value_is_what_the_papers_recipe_has():
    text = as_text(proposal_of(), "dino-kit recipe images", "mine.yaml")
    paper = fields.create(TrainConfig, PAPER, missing_ok=True)
    own = proposal_of().settings
    for line in text.splitlines():
        name = line.partition(":")[0]
        if name in own and name not in ("data_path", "embed_dim", "depth", "num_heads"):
            assert line.endswith("# as in the paper") == (getattr(paper, name) == own[name]), line


def test_a_path_with_odd_characters_breaks_no_comment(tmp_path_factory):
    path = "a\nepochs: 7\u2028b: #c"
    proposal = proposal_of(data_path=path)
    config = read_back(as_text(proposal, f"dino-kit recipe '{path}'", "m.yaml"), tmp_path_factory)
    assert config.data_path == path and config.epochs == proposal.run.epochs


# Rules


@pytest.mark.parametrize(
    ("side", "patch", "globals_", "locals_", "number"),
    [
        (8, 4, 12, 8, 4),
        (28, 4, 20, 12, 4),
        (32, 4, 24, 12, 4),
        (48, 4, 36, 16, 4),
        (64, 8, 48, 24, 4),
        (96, 8, 72, 32, 4),
        (128, 16, 96, 48, 4),
        (224, 16, 160, 80, 4),
        (300, 16, 224, 96, 8),
        (3000, 16, 224, 96, 8),
    ],
)
def test_crops_are_of_three_quarters_of_the_pictures_and_the_papers_at_most(
    side, patch, globals_, locals_, number
):
    crops = rules.crop_sizes(survey_of(side=side))
    assert (crops.patch, crops.globals, crops.locals, crops.number) == (
        patch, globals_, locals_, number
    )  # fmt: skip


def test_large_pictures_may_be_cropped_to_half_the_side_and_small_ones_not():
    sides = [candidate.crops.globals for candidate in ladder(survey_of(side=500), None)]
    assert sides == [112, 112, 224, 224, 224, 224, 224]
    assert {c.crops.globals for c in ladder(survey_of(side=128), None)} == {96}


@pytest.mark.parametrize(
    ("images", "prototypes"),
    [(1, 1024), (10_000, 1024), (40_000, 4096), (50_000, 4096), (1_281_167, 65536), (10**9, 65536)],
)
def test_prototypes_grow_with_the_images(images, prototypes):
    assert rules.out_dim(images) == prototypes


@pytest.mark.parametrize(
    ("steps", "batch", "momentum"),
    [(1, 64, 0.99), (1_500, 64, 0.99), (10_000, 64, 0.9985), (10**6, 64, 0.9995),
     (10**6, 16, 0.9995), (10**6, 256, 0.998), (250_000, 512, 0.996), (10**6, 1024, 0.992)],
)  # fmt: skip
def test_the_momentum_suits_the_length_and_the_batch(steps, batch, momentum):
    assert rules.momentum(steps, batch) == pytest.approx(momentum, abs=1e-4)


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 1), (3, 1), (5, 2), (100, 32), (128, 64), (10**6, 64)]
)
def test_few_images_make_small_batches(images, batch):
    assert rules.small_batch(images) == batch


def test_a_long_run_has_a_larger_batch_and_no_batch_norm():
    long = proposal_of(survey_of(1_281_167, 224), machine_of("cuda", 16), fast=3000, hours=100)
    assert long.settings["total_batch_size"] == 512
    assert long.settings["use_bn_in_head"] is False
    assert (long.settings["arch"], long.settings["teacher_temp"]) == ("vit_base", 0.07)
    assert long.settings["warmup_teacher_temp_epochs"] == long.settings["warmup_epochs"] > 0
    assert long.settings["out_dim"] == 65536
    short = proposal_of().settings
    assert (short["total_batch_size"], short["use_bn_in_head"]) == (64, True)
    assert short["teacher_temp"] == short["warmup_teacher_temp"] == 0.04


def test_a_batch_that_does_not_fit_is_accumulated_without_batch_norm():
    proposal = proposal_of(machine=machine_of(memory=2e9), hours=2, total_batch_size=100)
    run = proposal.run
    assert run.micro < run.batch == 100 and proposal.settings["use_bn_in_head"] is False
    parts = -(-run.batch // run.micro)
    text = as_text(proposal, "", "")
    assert f"accumulated from {parts} parts" in " ".join(text.replace("# ", "").split())


def test_blur_has_the_same_share_of_a_small_crop():
    small = proposal_of(survey_of(side=32)).settings
    assert small["blur_radius_min"] == (0.011,) * 3 and small["blur_radius_max"] == (0.21,) * 3
    assert "blur_radius_max" not in proposal_of(survey_of(side=500)).settings


def test_gray_images_keep_their_lack_of_colour_and_digits_their_side():
    gray = proposal_of(survey_of(gray=1.0)).settings
    assert gray["hue"] == gray["saturation"] == gray["gray_prob"] == (0.0,) * 3
    assert gray["flip_prob"] == (0.5,) * 3
    assert "hue" not in proposal_of(survey_of(gray=0.5)).settings
    digits = proposal_of(survey_of(1438, 8, gray=1.0, digits=True)).settings
    assert digits["flip_prob"] == digits["blur_prob"] == digits["solarize_prob"] == (0.0,) * 3


def test_an_epoch_that_is_the_whole_run_is_no_warm_up():
    proposal = proposal_of(survey_of(40_000), hours=0.14)
    assert proposal.run.epochs == 1
    assert proposal.settings["warmup_epochs"] == proposal.settings["freeze_last_layer"] == 0
    assert "625 steps is the whole run" in as_text(proposal, "", "").replace("\n# ", " ")


def test_what_is_repeated_has_an_end():
    proposal = proposal_of(hours=1e6)
    assert proposal.run.epochs == rules.MOST_EPOCHS
    assert "the longest that is proposed" in as_text(proposal, "", "")
    assert proposal_of(survey_of(100), hours=1e6).run.steps == pytest.approx(50_000, rel=0.01)


def test_a_long_epoch_is_saved_within():
    settings_ = proposal_of(survey_of(1_000_000), hours=100).settings
    assert settings_["save_every_steps"] > 0
    assert "save_every_steps" not in proposal_of().settings


def test_an_architecture_that_is_asked_for_is_taken_though_the_hours_are_few():
    proposal = proposal_of(arch="vit_large", hours=40)
    assert proposal.settings["arch"] == "vit_large"
    assert "asked for by --arch" in as_text(proposal, "", "")


def test_only_what_may_suffice_is_measured():
    survey, machine = survey_of(), machine_of()
    trials = trials_of(survey)
    candidates = [trial.candidate for trial in trials]

    def measured(hours):
        taken: list[Trial] = []
        for candidate, trial in zip(candidates, trials, strict=True):
            if not worth_trying(candidate, taken, survey, machine, Request("images", hours)):
                break
            taken.append(trial)
        return taken

    for hours in np.geomspace(0.05, 1e4, 40):
        request = Request("images", hours)
        taken = measured(hours)
        assert taken and len(taken) < len(trials)
        try:
            chosen = propose(survey, machine, trials, request).run
        except UserError:
            continue
        assert propose(survey, machine, taken, request).run == chosen
        left = trials[len(taken) :]
        assert not any(suffices(fit(trial, survey, machine, request), survey) for trial in left)
    assert len(measured(0.01)) == 1


# What cannot be


def test_too_few_hours_are_refused_with_what_would_do():
    with pytest.raises(UserError) as caught:
        proposal_of(survey_of(40_000), hours=0.05)
    sentence = str(caught.value)
    assert sentence.startswith("--hours 0.05 does not suffice for one epoch: the least that is")
    enough = float(sentence.partition("give --hours ")[2].partition(" ")[0])
    assert 0.05 < enough < 1
    assert proposal_of(survey_of(40_000), hours=enough).run.epochs == 1


def test_too_little_memory_is_refused():
    with pytest.raises(UserError, match=r"needs 0\.1 GB for a single image, and the machine has 0"):
        proposal_of(machine=machine_of(memory=1e8))


def test_a_batch_of_more_images_than_there_are_is_refused():
    with pytest.raises(UserError, match="There are 10 images, fewer than one batch of 64; give"):
        proposal_of(survey_of(10), total_batch_size=64)


# Images


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)

    def write(name: str, height: int, width: int, colour: bool = True):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shape = (height, width, 3) if colour else (height, width)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        return path

    write.root = tmp_path
    return write


def test_a_survey_counts_measures_and_sees_colour(folder):
    for i in range(4):
        folder(f"a/{i}.png", 20 + i, 40)
    folder("b/gray.png", 10, 90, colour=False)
    folder("b/gray.jpg", 16, 16, colour=False)
    survey = look(FolderSource(folder.root))
    assert (survey.images, survey.sampled, survey.classes) == (6, 6, 2)
    assert (survey.width, survey.height, survey.shorter) == (40, 20, (10, 20, 23))
    assert survey.gray == pytest.approx(2 / 6) and survey.kinds == ("PNG", "JPEG")
    assert not survey.digits and not survey.unreadable


def test_equal_channels_are_gray_even_after_jpeg(tmp_path):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "a.jpg", quality=60)
    assert look(FolderSource(tmp_path)).gray == 1.0


def test_a_large_collection_is_sampled_from_end_to_end():
    asked = []

    class Counted(DigitsSource):
        def read(self, index):
            asked.append(index)
            return super().read(index)

    survey = look(Counted("train"))
    assert survey.images == 1438 and survey.sampled == 256 == len(asked)
    assert asked[0] == 0 and asked[-1] == 1437 and asked == sorted(set(asked))
    assert survey.digits and survey.gray == 1 and survey.shorter == (8, 8, 8)
    assert survey.classes == 10 and survey.kinds == ()


def test_a_single_image_is_enough_to_look_at():
    survey = look(Subset(DigitsSource("train"), [5]))
    assert (survey.images, survey.sampled, survey.shorter) == (1, 1, (8, 8, 8))
    assert proposal_of(survey, hours=0.01).settings["total_batch_size"] == 1


def test_broken_images_are_counted_and_where_most_are_is_refused(folder):
    (folder.root / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError) as caught:
        look(FolderSource(folder.root))
    assert str(caught.value).startswith("1 of 1 images that were tried cannot be used. ")
    (folder.root / "empty.png").write_bytes(b"")
    folder("whole.png", 32, 32)
    with pytest.raises(UserError, match="2 of 3 images that were tried cannot be used. "):
        look(FolderSource(folder.root))
    folder("too.png", 32, 32)
    survey = look(FolderSource(folder.root))
    assert len(survey.unreadable) == 2 and survey.shorter == (32, 32, 32)
    said = as_text(proposal_of(survey, hours=0.1), "", "").replace("\n#           ", " ")
    assert "2 cannot be used; a run takes others in their place, and ends beyond" in said


def test_a_header_that_lies_is_found_where_pixels_are_read(folder):
    path = folder("cut.png", 64, 64)
    path.write_bytes(path.read_bytes()[:3000])
    assert Image.open(io.BytesIO(path.read_bytes())).size == (64, 64)
    with pytest.raises(UserError, match="cut.png cannot be read as an image"):
        look(FolderSource(folder.root))


# Machines

MEMINFO = "MemTotal:       32000000 kB\nMemFree: 5 kB\nMemAvailable:   16000000 kB\n"


@pytest.fixture
def system(tmp_path):
    """Files below a root, as /proc and /sys have them."""

    def write(files: dict[str, str]):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "memory", "whose"),
    [
        ({}, 16_384_000_000, "the machine"),
        # Version 2: no limit, a limit, one of a group above, one that does not bind.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n",
          "sys/fs/cgroup/memory.current": "5\n"}, 16_384_000_000, "the machine"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "8000000000\n",
          "sys/fs/cgroup/memory.current": "3000000000\n",
          "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1000000000\n"},
         6_000_000_000, "this container or job"),
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": "4000\n",
          "sys/fs/cgroup/job/memory.current": "1000\n", "sys/fs/cgroup/job/step/memory.max": "max",
          "sys/fs/cgroup/job/step/memory.current": "900"}, 3000, "this container or job"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "99000000000\n",
          "sys/fs/cgroup/memory.current": "0\n"}, 16_384_000_000, "the machine"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100\n",
          "sys/fs/cgroup/memory.current": "200\n"}, 0, "this container or job"),
        # Version 1, whose path leads nowhere inside a container.
        ({"proc/self/cgroup": "3:cpu:/x\n2:memory:/docker/abc\n",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
          "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 500\n"},
         5500, "this container or job"),
    ],
)  # fmt: skip
def test_memory_is_what_the_system_and_the_container_leave(system, files, memory, whose):
    root = system({"proc/meminfo": MEMINFO} | files)
    assert host_memory(root) == (memory, whose)


def test_where_a_system_tells_less_that_is_said(tmp_path, monkeypatch, system):
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine_module.os, "sysconf", pages.get, raising=False)
    assert host_memory(tmp_path) == (2_048_000, "the machine, half of all it has,")
    monkeypatch.delattr(machine_module.os, "sysconf")
    assert host_memory(tmp_path) == (None, "the machine")
    said = as_text(proposal_of(machine=machine_of(memory=None)), "", "")
    assert "how much memory is free, the system does not say" in said.replace("\n#           ", " ")


def test_a_busy_machine_is_said_to_be():
    assert not machine_of(share=0.95).is_busy
    proposal = proposal_of(machine=machine_of(share=0.3))
    said = as_text(proposal, "", "").replace("\n#           ", " ")
    assert "It was busy: other programs left 30% of a core to a thread" in said


def test_several_gpus_are_said_to_be_faster():
    machine = replace(machine_of("cuda", 16), devices=8)
    said = as_text(proposal_of(machine=machine), "", "").replace("\n#           ", " ")
    assert "torchrun --nproc_per_node=8 launch/train.py" in said
