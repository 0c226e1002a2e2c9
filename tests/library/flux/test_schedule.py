"""The sampler's noise levels against recorded ones."""

import math

import pytest
from golden_files import facts, tensors

from library.flux.schedule import timestep_schedule

RECORDED = sorted(facts("schedule")["values"])


@pytest.mark.parametrize("name", RECORDED)
def test_levels_are_the_originals(name):
    steps, *tokens, shift = name.removeprefix("steps").split("_")
    count = int(tokens[0].removeprefix("len")) if tokens else 1024
    actual = timestep_schedule(int(steps), count, shift=shift == "shift")
    assert actual == facts("schedule")["values"][name]
    assert actual == tensors("schedule")[name].tolist()


def test_the_shift_is_linear_in_the_tokens_and_not_clamped():
    for tokens, mu in ((64, 0.4675), (256, 0.5), (1024, 0.63), (4096, 1.15), (16384, 3.23)):
        halfway = timestep_schedule(2, tokens)[1]  # from t = 1/2: e^mu / (e^mu + 1)
        assert math.log(halfway / (1 - halfway)) == pytest.approx(mu, abs=1e-5)


def test_levels_fall_from_one_to_zero():
    levels = timestep_schedule(7, 100)
    assert (levels[0], levels[-1], len(levels)) == (pytest.approx(1, abs=1e-7), 0.0, 8)
    assert all(a > b for a, b in zip(levels[:-1], levels[1:], strict=True))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps 0: at least 1 is needed"):
        timestep_schedule(0, 256)
