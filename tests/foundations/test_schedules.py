"""Schedules: 1 while full, never rising, exactly 0 from the end on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymask.errors import SettingError, UnknownName
from anymask.schedules import SHAPES, Schedule


@st.composite
def schedules(draw):
    full, end = sorted(draw(st.tuples(st.integers(0, 100), st.integers(0, 100))))
    return Schedule(draw(st.sampled_from(sorted(SHAPES))), full=f"{full}%", end=f"{end}%")


@settings(max_examples=50)
@given(schedules(), st.integers(1, 400))
def test_one_while_full_never_rising_zero_from_the_end(schedule, total):
    begin, end = schedule.span(total=total)
    strengths = [schedule.strength(step, total=total) for step in range(total + 2)]
    assert all(s == 1.0 for s in strengths[: min(begin + 1, end)])
    assert all(0.0 < s <= 1.0 for s in strengths[:end])
    assert all(s == 0.0 for s in strengths[end:])
    assert strengths == sorted(strengths, reverse=True)


def test_each_shape_by_hand():
    halves = {shape: Schedule(shape, full="20%", end="60%").strength(30, total=100) for shape in SHAPES}
    assert halves == {"linear": 0.75, "cosine": pytest.approx(0.5 + 0.5 * 2**-0.5), "step": 1.0}


def test_a_step_to_the_end_lasts_the_whole_training():
    assert {Schedule("step", end="100%").strength(step, total=50) for step in range(50)} == {1.0}


def test_units_may_be_mixed_and_full_never_outlasts_the_end():
    schedule = Schedule("linear", full="90it", end="2ep")
    assert schedule.span(total=1000, per_epoch=100) == (90, 200)
    assert schedule.span(total=1000, per_epoch=10) == (20, 20)
    assert schedule.strength(19, total=1000, per_epoch=10) == 1.0


@pytest.mark.parametrize("kwargs", [{"full": "70%"}, {"end": "60"}, {"full": "x"}, {"full": "9ep", "end": "8ep"}])
def test_bad_settings_are_refused_when_made(kwargs):
    with pytest.raises(SettingError):
        Schedule("linear", **kwargs)


def test_an_unknown_shape_suggests_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'cosine'"):
        Schedule("cosin")
