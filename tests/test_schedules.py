"""Schedules against the reference's arrays, and what every schedule must satisfy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_kit.schedules import cosine, linear_warmup


def test_cosine_golden(golden):
    arrays = golden("schedules")
    config = json.loads(str(arrays["config"]))
    assert config["cases"]
    for number, case in enumerate(config["cases"]):
        args = dict(zip(config["args"], case, strict=True))
        expected = arrays[str(number)]
        got = [
            cosine(
                step,
                base=args["base_value"],
                final=args["final_value"],
                total_steps=args["epochs"] * args["niter_per_ep"],
                warmup_steps=args["warmup_epochs"] * args["niter_per_ep"],
                warmup_start=args["start_warmup_value"],
            )
            for step in range(len(expected))
        ]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_teacher_temperature_golden(golden):
    arrays = golden("loss")
    config = json.loads(str(arrays["config"]))
    got = [
        linear_warmup(
            epoch,
            start=config["warmup_teacher_temp"],
            end=config["teacher_temp"],
            warmup_epochs=config["warmup_teacher_temp_epochs"],
        )
        for epoch in range(config["nepochs"])
    ]
    np.testing.assert_allclose(got, arrays["teacher_temp_schedule"], rtol=0, atol=1e-9)


values = st.floats(0.0, 10.0)


@given(st.data(), values, values, values, st.integers(1, 300))
def test_cosine_is_a_ramp_and_then_a_half_cosine(data, base, final, start, total):
    warmup = data.draw(st.integers(0, total))
    got = np.array(
        [
            cosine(
                step,
                base=base,
                final=final,
                total_steps=total,
                warmup_steps=warmup,
                warmup_start=start,
            )
            for step in range(total)
        ]
    )
    np.testing.assert_allclose(got[:warmup], np.linspace(start, base, warmup), atol=1e-9)
    rest = got[warmup:]
    if len(rest):
        assert rest[0] == pytest.approx(base, abs=1e-9)
        assert np.all(np.diff(rest) * np.sign(final - base) >= -1e-9)
        assert min(base, final) - 1e-9 <= rest.min() <= rest.max() <= max(base, final) + 1e-9


def test_a_warmup_of_one_is_its_start():
    assert cosine(0, base=1.0, final=0.0, total_steps=4, warmup_steps=1, warmup_start=0.25) == 0.25
    assert linear_warmup(0, start=0.04, end=0.07, warmup_epochs=1) == 0.04
    assert linear_warmup(1, start=0.04, end=0.07, warmup_epochs=1) == 0.07
    assert linear_warmup(0, start=0.04, end=0.07, warmup_epochs=0) == 0.07


@pytest.mark.parametrize(("step", "warmup"), [(-1, 0), (5, 0), (0, 6)])
def test_a_step_outside_the_run_is_refused(step, warmup):
    with pytest.raises(ValueError, match="5"):
        cosine(step, base=1.0, final=0.0, total_steps=5, warmup_steps=warmup)
