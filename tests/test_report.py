"""What a report says of runs that never ran: reading, curves, verdict, recipe, results, film, page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import synthetic_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import COLLAPSES, EACH, WARMUP, settings, write_lines

from dino_kit.config import fields, recipe
from dino_kit.config.train import TrainConfig
from dino_kit.errors import UserError
from dino_kit.report import curves, paper, pictures, record, results, summary
from dino_kit.report.look import Looks, Map, Neighbours, Seen, Tile
from dino_kit.report.page import LARGEST, page
from dino_kit.report.verdict import ADVICE, judge

NOTHING = Looks("", [], "No network.", [], "No network.")


def judged(folder):
    read, faults = record.read(folder), []
    return judge(read, results.read(folder, faults))


def words(verdict) -> str:
    return " ".join([verdict.headline, *verdict.sentences, verdict.advice])


class Read(HTMLParser):
    """The page's elements, its text and its data, as a browser finds them."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.body = [], [], ""
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data
        elif self.lasttag != "style":
            self.body += data


def made(folder, looks: Looks = NOTHING) -> Read:
    return Read(page(record.read(folder), looks, "Made by a test from what the folder held at"))


# Reading.


def test_a_run_is_read_whole(tmp_path):
    read = record.read(synthetic_run.make(tmp_path))
    assert read.faults == [] and read.config == settings() and not read.by_epoch
    assert read.steps_per_epoch == EACH and read.total_steps == read.last_step == 20 * EACH
    assert read.finished and len(read.probes) == 6
    assert read.column("loss")[0] == read.lines[0]["loss"]


def test_a_half_written_last_line_is_passed_over_in_silence(tmp_path):
    path = synthetic_run.make(tmp_path) / "metrics.jsonl"
    whole = record.read(tmp_path).lines
    path.write_text(path.read_text() + '{"step": 900, "lo')
    read = record.read(tmp_path)
    assert read.lines == whole and read.faults == []


def test_damage_in_the_middle_is_named_and_the_rest_is_read(tmp_path):
    path = synthetic_run.make(tmp_path) / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:4], "gar\udce4bage", *rows[5:]]) + "\n", "utf-8", "surrogateescape")
    read = record.read(tmp_path)
    assert len(read.lines) == len(rows) - 1
    assert read.faults == ["Line 5 of metrics.jsonl is damaged and was passed over."]
    path.write_text("\n".join([*rows[:3], "[]", "{", "7", *rows[6:], "{"]) + "\n")
    (fault,) = record.read(tmp_path).faults
    assert fault == "4 lines of metrics.jsonl are damaged and were passed over: 4, 5, 6 …."


def test_lines_without_a_step_and_the_first_of_two_for_one_step_do_not_count(tmp_path):
    synthetic_run.make(tmp_path, probes=0)
    rows = [{"loss": 1}, {"step": "9"}, {"step": True, "loss": 4}, {"step": 2, "loss": 1.0},
            {"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 1e3}]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", rows)
    read = record.read(tmp_path)
    assert read.steps.tolist() == [1, 2] and read.column("loss").tolist() == [2.0, 3.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0", None, True, [1], 10**400])
def test_what_is_no_finite_number_is_a_gap(value):
    assert math.isnan(record.number(value))


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 12), st.floats(0.02, 1))
def test_the_length_of_an_epoch_is_told_from_the_lines(each, every, epochs, done):
    steps = range(every, max(every, int(done * each * epochs)) + 1, every)
    lines = [{"step": step, "epoch": (step - 1) // each} for step in steps]
    read = record.Record(None, settings(epochs=epochs), lines, [], False, [])
    found = read.steps_per_epoch
    if lines[-1]["epoch"] and every == 1:
        assert found == each
    elif found is not None:  # what is told fits every line
        assert all(line["epoch"] == (line["step"] - 1) // found for line in lines)


def test_a_folder_of_the_reference_is_read_from_its_log(tmp_path):
    rows = [{"train_loss": 9.0 - n, "train_lr": 0.1, "train_wd": 0.04, "epoch": n} for n in range(4)]
    write_lines(tmp_path / "log.txt", rows)
    read = record.read(tmp_path)
    assert read.by_epoch and read.steps.tolist() == [1, 2, 3, 4]
    assert read.column("weight_decay").tolist() == [0.04] * 4
    shown = made(tmp_path)
    assert shown.data["byEpoch"] and "the curves come from log.txt" in shown.body
    assert "There is no config.yaml" in shown.body and "Done so far: 4 epochs." in shown.body


@pytest.mark.parametrize("config", ["epochs: -1\n", "epochs: [\n", "epohcs: 3\n", "\0"])
def test_a_recipe_that_cannot_be_read_is_said_and_the_curves_are_there(tmp_path, config):
    (synthetic_run.make(tmp_path) / "config.yaml").write_text(config)
    shown = made(tmp_path)
    assert "The recipe cannot be read." in shown.body
    assert ("figure", "chart-loss") in [(tag, a.get("id")) for tag, a in shown.elements]


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other"])
def test_what_is_no_runs_folder_is_refused(tmp_path, kind):
    folder = tmp_path / "x"
    if kind == "file":
        folder.write_text("")
    elif kind != "missing":
        folder.mkdir()
    if kind == "other":
        (folder / "picture.png").write_text("")
    expected = {"missing": "There is no folder", "file": "is a file; give the folder of a run",
                "empty": "holds nothing", "other": "holds picture.png"}  # fmt: skip
    with pytest.raises(UserError, match=expected[kind]):
        record.read(folder)


# Curves.


def test_a_short_curve_is_drawn_as_it_is_and_a_gap_stays_a_gap():
    drawn = curves.thin(np.arange(4), np.array([1.0, math.nan, 3.0, 1 / 3]))
    assert drawn == {"x": [0, 1, 2, 3], "y": [1.0, None, 3.0, 0.33333]}


@given(st.integers(1, 5000), st.integers(2, 50), st.integers(0, 2**32 - 1))
def test_a_thinned_curve_keeps_its_mean_its_peaks_and_its_end(count, points, seed):
    rng = np.random.default_rng(seed)
    steps, values = np.arange(1, count + 1) * 10, rng.normal(size=count)
    drawn = curves.thin(steps, values, points)
    assert len(drawn["x"]) <= points and drawn["x"][-1] == steps[-1]
    assert drawn["x"] == sorted(set(drawn["x"]))
    if count > points:
        assert max(drawn["high"]) == pytest.approx(values.max(), rel=1e-4)
        assert min(drawn["low"]) == pytest.approx(values.min(), rel=1e-4)
        sizes = [len(part) for part in np.array_split(steps, points)]
        assert np.average(drawn["y"], weights=sizes) == pytest.approx(values.mean(), abs=1e-4)


def test_a_thinned_curve_is_a_mean_of_what_is_known():
    values = np.tile([math.nan, 2.0, 4.0, math.nan], 100)
    values[200:] = math.nan
    drawn = curves.thin(np.arange(400), values, 100)
    assert drawn["y"] == [3.0] * 50 + [None] * 50
    assert drawn["low"][0] == 2.0 and drawn["high"][0] == 4.0


def test_states_become_spans_and_a_fault_among_many_lines_is_seen():
    steps = np.arange(10, 60, 10)
    states = ["warming up", "learning", "learning", None, "learning"]
    expected = [(0, 10, "warming up"), (10, 30, "learning"), (40, 50, "learning")]
    assert curves.spans(steps, states) == expected
    assert curves.spans(steps, [None] * 5) == [] == curves.spans(steps[:0], [])
    many = ["learning"] * 100_000
    many[5000] = "uniform collapse"
    found = curves.spans(np.arange(1, 100_001), many)
    assert [state for _, _, state in found] == ["learning", "uniform collapse", "learning"]
    assert found[0][0] == 0 and found[-1][1] == 100_000


def figures(folder) -> dict:
    read = record.read(folder)
    drawn = curves.draw(read, results.read(folder, []))
    return {one["key"]: one for group in drawn["groups"] for one in group["figures"]}


EVERY = {figure.key for group in curves.GROUPS.values() for figure in group}


def test_every_measure_of_a_line_and_of_a_probe_has_a_figure(tmp_path):
    found = figures(synthetic_run.make(tmp_path))
    assert found.keys() == EVERY
    told = {curve.key for group in curves.GROUPS.values() for f in group for curve in f.curves}
    line = record.read(tmp_path).lines[-1]
    assert told == line.keys() - {"step", "epoch", "state", "loss_ratio"}
    assert found["knn"]["points"][0]["y"][-1] == pytest.approx(93.751, abs=1e-3)
    assert len(found["rank"]["points"]) == len(found["retrieval"]["points"]) == 1


def test_lines_that_mean_something_stand_where_they_belong(tmp_path):
    found = figures(synthetic_run.make(tmp_path))
    lines = {key: [(one["label"], one["value"]) for one in f["lines"]] for key, f in found.items()}
    assert lines["loss"] == lines["entropy"] == [("ln 1024", 6.9315)]
    assert lines["retrieval"] == [("chance, in a batch", 100 / 32)]
    assert lines["prototypes"] == [("all 1,024", 1024)]
    assert "At most 64 in a batch." in found["rank"]["about"]
    read = record.read(tmp_path)
    assert curves.draw(read, [])["warmup"] == WARMUP * EACH


def test_what_an_older_run_did_not_measure_is_said_in_place_of_the_figure(tmp_path):
    shown = made(synthetic_run.make(tmp_path, health=False, probes=0))
    ids = {attributes.get("id", "") for _, attributes in shown.elements}
    lacking = {"entropy", "kl", "information", "prototypes", "spread", "knn", "rank", "retrieval"}
    assert {name.removeprefix("chart-") for name in ids if name.startswith("chart-")} == (
        EVERY - lacking
    )
    assert "Teacher entropy, KL(teacher‖student), Information" in shown.body
    assert "numbers are not in the run's files" in shown.body
    assert shown.data["states"] == []


def test_accuracies_of_kept_checkpoints_are_a_curve(tmp_path):
    synthetic_run.make(tmp_path, probes=0)
    for step in (200, 400, 800):
        write_knn(tmp_path / f"knn_{step}.json", step)
    (points,) = figures(tmp_path)["knn"]["points"]
    assert points["name"] == "dino-kit knn, k 20"
    assert points["x"] == [200, 400, 800] and points["y"] == [22.0, 24.0, 28.0]
    assert figures(tmp_path)["knn"]["lines"][0]["label"] == "largest class"
    write_knn(tmp_path / "knn_other.json", 10_000)  # of a longer run that was here
    assert "knn" not in figures(tmp_path)


# The verdict.


def test_a_run_that_learnt_is_told_so(tmp_path):
    found = judged(synthetic_run.make(tmp_path))
    assert (found.state, found.tone, found.advice) == ("learning", "good", "")
    assert found.headline == "The run is finished, and it learnt."
    assert 2 <= len(found.sentences) <= 5
    text = words(found)
    assert "All 20 epochs are done: 800 steps in 0:" in text
    assert "40 % of ln 1024 = 6.93" in text and "how good the features are it cannot tell" in text
    assert "k-NN went from 60.0 % before training to 93.8 %" in text
    assert "one step (0.12 %) was dropped" in text
    assert "best" not in text and "lowest" not in text


@pytest.mark.parametrize("state", COLLAPSES)
def test_a_collapse_is_told_with_its_beginning_and_the_knobs_to_turn(tmp_path, state):
    found = judged(synthetic_run.make(tmp_path, state, done=0.6))
    assert (found.state, found.tone, found.advice) == (state, "bad", ADVICE[state])
    assert re.search(r"--[a-z_]+", found.advice)
    assert "It has been so since step 170 (epoch 4.2)." in found.sentences
    assert "step 480 of 800, epoch 12.0 of 20" in words(found)
    assert "a longer run may give more" not in words(found)
    if state == "uniform collapse":
        assert "The loss of 6.93 is ln 1024 = 6.93" in words(found)
        assert "after the warm-up that is not normal" in words(found)
    else:
        assert "is no success here" in words(found)


def test_every_flag_of_the_advice_exists():
    for sentence in ADVICE.values():
        for flag in re.findall(r"--([a-z_]+)", sentence):
            assert flag in fields.names(TrainConfig)


def test_a_collapse_that_a_run_came_out_of_is_told(tmp_path):
    synthetic_run.make(tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in rows[20:23]:
        row["state"] = "uniform collapse"
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = judged(tmp_path)
    assert found.tone == "good"
    sentence = "There were signs of uniform collapse between step 210 (epoch 5.2) and step 230"
    assert sentence in words(found)


def test_commands_and_flags_of_the_verdict_are_not_broken_in_two(tmp_path):
    shown = page(record.read(synthetic_run.make(tmp_path, "uniform collapse", probes=0)), NOTHING, "")
    assert "<code>dino-kit knn</code> does" in shown
    assert "<code>--norm_last_layer true</code>" in shown


def test_a_run_at_its_start_is_not_scolded(tmp_path):
    found = judged(synthetic_run.make(tmp_path, done=0.05, probes=0))
    assert (found.state, found.tone, found.advice) == ("warming up", "open", "")
    assert "at the start that is normal" in words(found)


@pytest.mark.parametrize("done, advice", [(0.05, ""), (0.9, ADVICE["uniform collapse"])])
def test_without_a_state_a_loss_at_ln_k_is_explained_and_after_the_warmup_is_a_fault(
    tmp_path, done, advice
):
    synthetic_run.make(tmp_path, "uniform collapse", done=done, health=False, probes=0)
    found = judged(tmp_path)
    assert found.state == "" and found.advice == advice
    assert "every prototype is equally likely" in words(found)


def test_an_old_run_that_learnt_is_not_said_to_have(tmp_path):
    found = judged(synthetic_run.make(tmp_path, health=False, probes=0))
    assert found.headline == "The run is finished; its health was not measured."
    assert found.tone == "open"
    assert "What the features are worth nothing here has measured" in words(found)


def test_a_run_that_has_logged_nothing_is_said_so(tmp_path):
    (tmp_path / "config.yaml").write_text(recipe.dump(settings()))
    (tmp_path / "metrics.jsonl").write_text("")
    assert judged(tmp_path).headline == "The run has not logged a step yet."
    shown = made(tmp_path)
    assert not any("data-key" in attributes for _, attributes in shown.elements)


@pytest.mark.parametrize(
    "values, said",
    [
        ([50, 60, 70, 80, 90], "and still rose at the end: a longer run may give more."),
        ([50, 80, 85, 86, 86], "and no longer rose at the end."),
        ([50, 90, 92, 91, 80], "; it was highest, 92.0 %, after epoch 2, and it fell at the end."),
        ([50, 60], "to 60.0 %."),
        ([50], "k-NN is 50.0 % before training."),
    ],
)
def test_whether_accuracy_still_rose_is_told_beyond_what_chance_does(tmp_path, values, said):
    synthetic_run.make(tmp_path, probes=0)
    probes = [{"step": n * EACH, "epoch": n, "knn_top1": value, "knn_queries": 1000}
              for n, value in enumerate(values)]  # fmt: skip
    write_lines(tmp_path / "probe.jsonl", probes)
    assert said in words(judged(tmp_path))


@pytest.mark.parametrize(("end", "in_vain"), [(49.0, True), (51.0, True), (55.0, False)])
def test_a_run_whose_features_got_no_better_is_not_praised(tmp_path, end, in_vain):
    """Its answers depend on what it sees; what they are worth only labels tell."""
    synthetic_run.make(tmp_path, probes=0)
    write_lines(tmp_path / "probe.jsonl", [
        {"step": n * EACH, "epoch": n, "knn_top1": value, "knn_queries": 1000}
        for n, value in ((0, 50.0), (20, end))])  # fmt: skip
    found = judged(tmp_path)
    assert (found.tone == "open") is in_vain
    assert ("no better than before training" in found.headline) is in_vain


def test_nor_one_whose_untrained_network_the_quickstart_finds_as_good(tmp_path):
    synthetic_run.make(tmp_path, probes=0)
    for end, tone in ((64.0, "open"), (95.0, "good")):
        (tmp_path / "quickstart.json").write_text(json.dumps({
            "top1_percent": {"untrained": {"digits": 64.0}, "teacher": {"digits": end}}, "k": 20,
            "checkpoint": {"step": 800, "epoch": 20}}))  # fmt: skip
        assert judged(tmp_path).tone == tone


def test_without_labels_the_probe_s_own_sentence_is_told(tmp_path):
    found = judged(synthetic_run.make(tmp_path, labels=False))
    assert "Effective rank 36.9, view retrieval 88.0 %; both still rise (since epoch 16)." in found.sentences


def test_a_run_held_back_by_its_data_is_told_what_helps(tmp_path):
    synthetic_run.make(tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A slow line counts for longer: 10 steps at 10 images a second against 790 at 1,000.
    speeds = [(10.0, 0.9)] + [(1000.0, 0.0)] * (len(rows) - 1)
    write_lines(
        tmp_path / "metrics.jsonl",
        [row | {"images_per_second": speed, "data_wait": wait}
         for row, (speed, wait) in zip(rows, speeds, strict=True)],
    )  # fmt: skip
    read = record.read(tmp_path)
    assert read.seconds() == pytest.approx(32 + 32 * 0.79)
    assert read.waited() == pytest.approx(0.9 * 32 / (32 + 32 * 0.79))
    assert "50 % of the time went into waiting for data (more --num_workers" in words(judged(tmp_path))


def test_the_numbers_beside_the_verdict_are_the_newest(tmp_path):
    read = record.read(synthetic_run.make(tmp_path))
    found = {one.label: one.value for one in summary.numbers(read, [])}
    assert found["k-NN"] == "93.8 %" and found["view retrieval"] == "99 %"
    assert found["loss"] == f"{read.lines[-1]['loss']:.2f}"


# The recipe.


@pytest.mark.parametrize("name", paper.RECIPES)
def test_a_recipe_of_the_paper_is_its_own_nearest_and_differs_in_nothing(name):
    given = recipe.read(TrainConfig, name) | {"data_path": "x", "output_dir": "y"}
    found = paper.compare(fields.create(TrainConfig, given))
    assert (found.recipe, found.differences) == (name, [])


def test_differences_are_told_with_both_values_and_their_meaning():
    given = recipe.read(TrainConfig, "vits16_800ep") | {"data_path": "x", "output_dir": "y"}
    config = fields.create(TrainConfig, given | {"out_dim": 4096, "seed": 3, "num_workers": 7})
    found = paper.compare(replace(config, hue=(0.0, 0.0, 0.0), batch_size_per_gpu=8))
    assert found.recipe == "vits16_800ep"
    told = [(one.name, one.ours, one.theirs) for one in found.differences]
    assert told == [("out_dim", "4096", "65536"), ("hue", "0", "0.1")]
    assert found.differences[0].help.startswith("Number of prototypes.")
    assert found.differences[0].group == "Projection head"


def test_a_network_of_other_sizes_is_held_against_the_nearest_width():
    found = paper.compare(settings(embed_dim=700, num_heads=7, patch_size=16,
                                   global_crops_size=32, local_crops_size=16))  # fmt: skip
    assert found.recipe == "vitb16"
    told = {one.name: (one.ours, one.theirs) for one in found.differences}
    assert told["embed_dim"] == ("700", "768") and told["depth"] == ("3", "12")


def test_sizes_that_go_by_a_name_are_told_as_numbers():
    giant = settings(arch="vit_giant", embed_dim=None, depth=None, num_heads=None, patch_size=14,
                     global_crops_size=28, local_crops_size=14)  # fmt: skip
    names = ("embed_dim", "depth", "mlp_ratio")
    told = [paper._told(giant, name, getattr(giant, name)) for name in names]
    assert paper.width(giant) == 1664 and told == ["1664", "48", "4.92308"]


# Results.


def write_knn(path, step: int, command: str = "dino-kit knn OUT --data_path digits"):
    path.write_text(json.dumps({
        "results": {"10": {"top1": 1.0, "top5": 2.0}, "20": {"top1": 20 + step / 100, "top5": None}},
        "largest_class_percent": 10.5, "checkpoint": {"step": step, "epoch": step // EACH,
        "network": "teacher"}, "data": {"data_path": "digits"}, "command": command,
    }))  # fmt: skip


def test_results_of_every_form_become_rows(tmp_path):
    write_knn(tmp_path / "knn.json", 800)
    (tmp_path / "linear.json").write_text(json.dumps({
        "results": {"top1": 71.5, "top5": 90.25}, "read": {"queries": "pictures/val"},
        "checkpoint": {"step": 400, "epoch": 10, "network": "student"}}))  # fmt: skip
    (tmp_path / "quickstart.json").write_text(json.dumps({
        "top1_percent": {"untrained": {"digits": 64.0}, "teacher": {"digits": 95.0}}, "k": 20,
        "checkpoint": {"step": 800, "epoch": 20}}))  # fmt: skip
    (tmp_path / "attention.json").write_text('{"images": [""]}')
    (tmp_path / "list.json").write_text("[1]")
    faults: list[str] = []
    rows = results.read(tmp_path, faults)
    assert faults == []
    told = [(r.evaluator, r.setting, r.data, r.metric, r.value, r.file, r.step) for r in rows]
    assert told == [
        ("k-NN", "k 10", "digits", "top-1, %", 1.0, "knn.json", 800),
        ("k-NN", "k 10", "digits", "top-5, %", 2.0, "knn.json", 800),
        ("k-NN", "k 20", "digits", "top-1, %", 28.0, "knn.json", 800),
        ("linear probe", "of the student", "pictures/val", "top-1, %", 71.5, "linear.json", 400),
        ("linear probe", "of the student", "pictures/val", "top-5, %", 90.25, "linear.json", 400),
        ("k-NN", "k 20, untrained backbone", "digits", "top-1, %", 64.0, "quickstart.json", None),
        ("k-NN", "k 20", "digits", "top-1, %", 95.0, "quickstart.json", 800),
    ]
    assert results.newest(rows).file == "quickstart.json"
    synthetic_run.make(tmp_path, probes=0)
    text = words(judged(tmp_path))
    assert "the teacher's features classify 95.0 % of digits rightly" in text
    assert "before training it was 64.0 % (quickstart.json)" in text


def test_of_a_linear_layer_accuracies_are_results_and_its_other_numbers_are_not(tmp_path):
    found = {"epochs": 4, "top1": 21.5, "top5": 74.7, "loss": 2.07, "largest_class_percent": 10.0,
             "images": 5000, "train_images": 1000}  # fmt: skip
    (tmp_path / "linear.json").write_text(json.dumps({
        "results": {"last": found, "best": found | {"epochs": 2, "top1": 21.8}}}))  # fmt: skip
    rows = [(r.setting, r.metric, r.value) for r in results.read(tmp_path, [])]
    assert rows == [
        ("at the end", "top-1, %", 21.5), ("at the end", "top-5, %", 74.7),
        ("at its best", "top-1, %", 21.8), ("at its best", "top-5, %", 74.7),
    ]  # fmt: skip


def test_a_damaged_file_of_results_is_named(tmp_path):
    synthetic_run.make(tmp_path)
    (tmp_path / "knn.json").write_text('{"results"')
    assert "knn.json is damaged, so its results are missing here." in made(tmp_path).body


# The film.


def test_a_film_has_the_first_and_the_last_sheet_and_not_too_many(tmp_path):
    config = settings(epochs=100)
    read = record.read(synthetic_run.make(tmp_path, probes=101, config=config, every=40))
    film = pictures.film(read)
    assert len(film.frames) == pictures.MOST_FRAMES and film.taken == 101
    epochs = [frame.facts["epoch"] for frame in film.frames]
    assert epochs[0] == 0 and epochs[-1] == 100 and epochs == sorted(set(epochs))
    assert max(np.diff(epochs)) <= 5
    assert film.frames[-1].facts.keys() == {"epoch", "knn", "rank", "retrieval"}


@pytest.mark.parametrize("name", ["../outside.png", "/outside.png", "looks/none.png", "", 7, "\0"])
def test_a_sheet_outside_of_the_folder_or_missing_is_not_shown(tmp_path, name):
    run = synthetic_run.make(tmp_path / "run", probes=2)
    synthetic_run.draw_sheet(0).save(tmp_path / "outside.png")
    probes = [json.loads(row) for row in (run / "probe.jsonl").read_text().splitlines()]
    if name == "/outside.png":
        name = str(tmp_path / "outside.png")
    write_lines(run / "probe.jsonl", [probes[0] | {"sheet": name}, probes[1]])
    film = pictures.film(record.read(run))
    assert [frame.facts["epoch"] for frame in film.frames] == [20]


def test_a_broken_sheet_is_counted(tmp_path):
    synthetic_run.make(tmp_path, probes=3)
    (tmp_path / "looks/epoch0010.png").write_bytes(b"\x89PNG no picture")
    film = pictures.film(record.read(tmp_path))
    assert (len(film.frames), film.missing) == (2, 1)
    assert "1 of the sheets cannot be read." in made(tmp_path).body
    for path in (tmp_path / "looks").iterdir():
        path.unlink()
    shown = made(tmp_path)
    assert "3 of the sheets cannot be read." in shown.body and shown.data["film"] == []


def test_a_film_of_sheets_that_cannot_be_compressed_keeps_to_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FILM_BYTES", 150_000)
    synthetic_run.make(tmp_path, probes=4)
    rng = np.random.default_rng(0)
    for path in (tmp_path / "looks").iterdir():
        Image.fromarray(rng.integers(0, 256, (900, 900, 3), dtype=np.uint8)).save(path)
    film = pictures.film(record.read(tmp_path))
    assert len(film.frames) == 4
    assert sum(len(frame.source) for frame in film.frames) < 150_000 * 4 / 3 + 400


# The page.


def tiles(name: str = "a") -> Looks:
    source = pictures.small(Image.new("RGB", (300, 200), "red"), 112)
    maps = [Map("mean", source), Map("head 0", source)]
    found = [Tile(name, source, "cat", 0.5)] * 5
    return Looks("the teacher", [Seen(name, source, source, maps)] * 8, name,
                 [Neighbours(Tile(name, source, "cat", None), found)] * 8, name)  # fmt: skip


def test_a_page_holds_every_part_and_asks_for_nothing_from_outside(tmp_path):
    synthetic_run.make(tmp_path)
    write_knn(tmp_path / "knn.json", 800)
    read = made(tmp_path, tiles())
    ids = {attributes.get("id") for _, attributes in read.elements}
    assert ids >= {f"chart-{key}" for key in EVERY} | {"movie", "seen", "nearest", "differences"}
    text = page(record.read(tmp_path), tiles(), "")
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|@import|url\(|\bfetch\(|XMLHttp", text)
    for tag, attributes in read.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    policy = next(a["content"] for _, a in read.elements if "http-equiv" in a)
    assert "default-src 'none'" in policy and "img-src data:;" in policy
    assert "{{" not in text


HOSTILE = "</script><script>window.hostile = 1</script><!-- \"'\\ & {{data}} é \u2028 <b>"


def test_nothing_from_a_file_becomes_an_element(tmp_path):
    def folder(name: str, word: str):
        run = synthetic_run.make(tmp_path / name, config=settings(data_path=word))
        rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
        write_lines(run / "metrics.jsonl", [row | {"state": word} for row in rows])
        probes = [json.loads(row) for row in (run / "probe.jsonl").read_text().splitlines()]
        plain = [{k: v for k, v in row.items() if k != "knn_top1"} for row in probes]
        write_lines(run / "probe.jsonl", [row | {"sentence": word} for row in plain])
        (run / "own.json").write_text(json.dumps(
            {"results": {word: {word: 1.0}}, "data": {"data_path": word}, "command": word}))
        return run

    hostile = made(folder("<img src=x onerror=hostile()>", HOSTILE), tiles(HOSTILE))
    plain = made(folder("plain", "a"), tiles("a"))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [set(a) for _, a in hostile.elements] == [set(a) for _, a in plain.elements]
    assert hostile.data["states"][0][2] == HOSTILE
    # The state, its headline, facts, the sentence, results, pictures, recipe, each as it is.
    assert hostile.body.count(HOSTILE) > 10


def test_a_name_that_is_no_text_is_written_nevertheless(tmp_path):
    text = page(record.read(synthetic_run.make(tmp_path)), tiles("caf\udce9"), "")
    assert "caf?" in text and text.encode("utf-8")


def test_a_page_of_a_huge_run_is_small(tmp_path):
    run = synthetic_run.make(tmp_path, lines=100_000, probes=2)
    text = page(record.read(run), NOTHING, "")
    shown = Read(text)
    assert shown.data["last"] == 1_000_000 and shown.data["each"] == 50_000
    for group in shown.data["groups"]:
        for figure in group["figures"]:
            assert all(len(curve["x"]) <= curves.POINTS for curve in figure["curves"])
    assert len(text) < 600_000 < LARGEST


def test_the_whole_recipe_is_there(tmp_path):
    shown = made(synthetic_run.make(tmp_path))
    for name in fields.names(TrainConfig):
        assert name in shown.body
