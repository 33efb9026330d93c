"""The name of a run's state."""

from __future__ import annotations

import math

import pytest

from dino_kit.training.diagnosis import (
    COLLAPSED,
    DEAD,
    FAULTS,
    LEARNING,
    ONE_POINT,
    UNIFORM,
    UNSTEADY,
    WARMING_UP,
    Diagnosis,
)  # fmt: skip

K = 1024
EVEN = math.log(K)
HEALTHY = {
    "teacher_entropy": 4.0,
    "kl": 1.0,
    "prototypes_used": 200.0,
    "teacher_information": 1.2,
    "student_information": 0.4,
    "effective_rank": 6.0,
}
UNIFORM_LINE = HEALTHY | {
    "teacher_entropy": EVEN - 1e-3,
    "kl": 1e-3,
    "teacher_information": 1e-3,
    "student_information": 1e-4,
}
ONE_POINT_LINE = UNIFORM_LINE | {"teacher_entropy": 1e-4}
DEAD_LINE = HEALTHY | {"student_information": 1e-3}
FLAT_LINE = HEALTHY | {"effective_rank": 1.2}
FEW_LINE = HEALTHY | {"teacher_entropy": 0.01, "prototypes_used": 3.5, "teacher_information": 1.2}
KINDS = {UNIFORM: UNIFORM_LINE, ONE_POINT: ONE_POINT_LINE, DEAD: DEAD_LINE}


def diagnosis(warmup_steps=100) -> Diagnosis:
    return Diagnosis(out_dim=K, warmup_steps=warmup_steps)


def follow(one: Diagnosis, line: dict, steps) -> list[str]:
    return [one.update(step, line) for step in steps]


@pytest.mark.parametrize("line", [HEALTHY, *KINDS.values(), FLAT_LINE])
def test_a_run_warms_up_until_its_plan_says_otherwise(line):
    assert set(follow(diagnosis(), line, range(10, 101, 10))) == {WARMING_UP}


def test_a_healthy_run_learns():
    one = diagnosis()
    follow(one, HEALTHY, range(10, 101, 10))
    assert follow(one, HEALTHY, [110]) == [LEARNING] and one.alarm() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_named_within_fifty_steps_after_the_warm_up(kind):
    one = diagnosis()
    follow(one, HEALTHY, range(10, 101, 10))
    states = follow(one, KINDS[kind], range(110, 151, 10))
    assert states[-1] == kind
    ill = diagnosis()
    assert follow(ill, KINDS[kind], range(10, 111, 10))[-1] == kind


@pytest.mark.parametrize(("entropy", "kind"), [(0.9 * EVEN, UNIFORM), (0.1 * EVEN, ONE_POINT)])
def test_embeddings_that_all_point_the_same_way_are_a_collapse(entropy, kind):
    one = diagnosis()
    assert follow(one, FLAT_LINE | {"teacher_entropy": entropy}, range(10, 200, 10))[-1] == kind


def test_certain_answers_that_are_all_of_a_few_are_one_point():
    one = diagnosis()
    assert follow(one, FEW_LINE, range(10, 200, 10))[-1] == ONE_POINT
    many = diagnosis()
    assert follow(many, FEW_LINE | {"prototypes_used": 40.0}, range(10, 200, 10))[-1] == LEARNING


def test_a_teacher_that_swings_is_unsteady_and_one_that_drifts_is_not():
    one, drifting = diagnosis(0), diagnosis(0)
    for step, entropy in enumerate([0.2, 6.5, 0.5, 5.0, 1.0]):
        state = one.update(10 * step, HEALTHY | {"teacher_entropy": entropy})
    assert state == UNSTEADY and "--momentum_teacher" in one.alarm()
    for step, entropy in enumerate([6.5, 5.0, 4.0, 2.0, 0.8]):
        state = drifting.update(10 * step, HEALTHY | {"teacher_entropy": entropy})
    assert state == LEARNING


def test_one_odd_line_is_no_collapse():
    one = diagnosis()
    follow(one, HEALTHY, range(10, 200, 10))
    assert follow(one, UNIFORM_LINE, [200]) == [LEARNING]
    assert follow(one, DEAD_LINE, [210]) == [LEARNING]


def test_a_collapse_is_over_when_answers_depend_on_the_crop_again():
    """A student that lags behind a teacher that says nothing has not begun to learn."""
    one = diagnosis(0)
    assert follow(one, ONE_POINT_LINE, range(10, 60, 10))[-1] == ONE_POINT
    lagging = {"kl": 0.2, "teacher_information": 0.01}
    assert set(follow(one, ONE_POINT_LINE | lagging, range(60, 110, 10))) == {ONE_POINT}
    assert follow(one, UNIFORM_LINE | lagging, range(110, 160, 10))[-1] == UNIFORM
    assert follow(one, HEALTHY, range(160, 210, 10))[-1] == LEARNING


def test_a_state_is_not_told_from_fewer_than_three_lines():
    one = diagnosis(warmup_steps=0)
    assert follow(one, UNIFORM_LINE, (50, 100, 150)) == [WARMING_UP, WARMING_UP, UNIFORM]


def test_a_student_is_not_dead_while_the_teacher_has_little_to_say():
    one = diagnosis(0)
    line = HEALTHY | {"teacher_information": 0.2, "student_information": 1e-4}
    assert follow(one, line, range(10, 100, 10))[-1] == LEARNING


def test_a_dropped_step_leaves_the_state_as_it_is():
    one = diagnosis(0)
    follow(one, UNIFORM_LINE, (10, 20, 30))
    assert one.update(40, {}) == UNIFORM


def test_the_alarm_tells_what_is_wrong_and_names_flags_that_exist():
    from dataclasses import fields

    from dino_kit.config.train import TrainConfig

    flags = {field.name for field in fields(TrainConfig)}
    assert set(FAULTS) == set(COLLAPSED)
    for kind, line in KINDS.items():
        one = diagnosis(0)
        follow(one, line, (10, 20, 30))
        assert one.alarm().lower().startswith(kind)
        named = {word.strip(".,()").removeprefix("--") for word in one.alarm().split() if "--" in word}
        assert len(named) >= 3 and named <= flags
    assert f"{EVEN:.2f}" in follow_and_alarm(UNIFORM_LINE)


def follow_and_alarm(line) -> str:
    one = diagnosis(0)
    follow(one, line, (10, 20, 30))
    return one.alarm()


@pytest.mark.parametrize("cut", [1, 2, 4, 7])
def test_a_diagnosis_goes_on_where_it_stopped(cut):
    steps = range(10, 101, 10)
    whole = diagnosis(0)
    expected = [whole.update(s, UNIFORM_LINE if s > 30 else HEALTHY) for s in steps]
    first, second = diagnosis(0), diagnosis(0)
    states = [first.update(s, UNIFORM_LINE if s > 30 else HEALTHY) for s in steps[:cut]]
    second.load_state_dict(first.state_dict())
    states += [second.update(s, UNIFORM_LINE if s > 30 else HEALTHY) for s in steps[cut:]]
    assert states == expected
