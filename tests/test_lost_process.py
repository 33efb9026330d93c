"""Of several processes one dies, hangs or stops: all end, and it is said which, and where."""

from __future__ import annotations

import os
import re

import pytest
from processes import together
from test_train import pictures, words  # noqa: F401

# What each process does: the one that is named comes to grief in its third step.
PROGRAM = """
import os, signal, sys, time
from dino_kit import cli
from dino_kit.errors import UserError
from dino_kit.training import engine
from dino_kit.training.learner import Learner

what, mine = os.environ["FAULT"], os.environ["RANK"] == os.environ["WHO"]
take, load = Learner.step, engine._with_waiting_time

def a_place_where_it_hangs():
    time.sleep(3600)

def step(self, number, *arguments):
    if mine and number == 2:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stops":
            raise UserError("The image of this process is no image.")
        if what == "hangs in a step":
            a_place_where_it_hangs()
    return take(self, number, *arguments)

def loading(loader):
    for number, item in enumerate(load(loader)):
        if mine and number == 2 and what == "hangs in loading":
            a_place_where_it_hangs()
        yield item

Learner.step, engine._with_waiting_time = step, loading
sys.exit(cli.main(sys.argv[1:]))
"""


def run(pictures, out, fault: str, who: int, minutes: float = 5.0, processes: int = 2):  # noqa: F811
    flags = ("--total_batch_size", 4 * processes, "--batch_size_per_gpu", 4, "--save_every_steps", 1)
    line = words(pictures, out, *flags, "--dist_timeout_minutes", minutes)
    group = {"processes": processes, "timeout": 120}
    return together("-c", PROGRAM, *line, **group, FAULT=fault, WHO=str(who))


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_dies(pictures, tmp_path, who):  # noqa: F811
    ended = run(pictures, tmp_path, "dies", who)
    other = ended[1 - who]
    assert ended[who].status == -9 and other.status == 1
    assert (
        f"dino-kit: stopped: Process {who} (of 2) no longer answers; it has died, or its machine "
        f"cannot be reached. This one, process {1 - who}, has been in step 2 for "
    ) in other.said
    assert "Traceback" not in other.said and "goes on from the newest checkpoint" in other.said


@pytest.mark.parametrize(
    "fault, place",
    [
        ("hangs in loading", "loading the images of step 2"),
        pytest.param("hangs in a step", "in step 2", marks=pytest.mark.slow),
    ],
)
def test_one_that_hangs(pictures, tmp_path, fault, place):  # noqa: F811
    minutes = 0.1
    ended = run(pictures, tmp_path, fault, 1, minutes)
    assert [one.status for one in ended] == [1, 1]
    assert re.search(
        rf"stopped: The processes no longer come together: process 1 \(of 2\) has been {place} for "
        r"\d+ seconds, while process 0 has been in step 2 for \d+ seconds\.",
        ended[0].said,
    ), ended[0].said
    assert f"process 1 (of 2) has been {place} for" in ended[1].said
    assert "in a_place_where_it_hangs" in ended[1].said  # its stack
    assert "Traceback" not in ended[0].said


def test_one_that_stops_tells_the_others_why(pictures, tmp_path):  # noqa: F811
    ended = run(pictures, tmp_path, "stops", 1)
    assert [one.status for one in ended] == [1, 2]
    why = "Process 1 (of 2) has stopped: The image of this process is no image."
    assert f"dino-kit: stopped: {why}" in ended[0].said and "Traceback" not in ended[0].said


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "hangs in a step"])
def test_of_three_the_right_one_is_named_by_both_others(pictures, tmp_path, fault):  # noqa: F811
    ended = run(pictures, tmp_path, fault, 1, 0.1, processes=3)
    assert all(one.status not in (0, None) for one in ended)
    for rank in (0, 2):
        assert re.search(r"rocess 1 \(of 3\) (no longer|has been in step 2)", ended[rank].said)
