"""Durations: read as written, never longer than the training."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymask.durations import Duration
from anymask.errors import SettingError

AMOUNTS = st.one_of(st.integers(0, 10**12), st.integers(1, 10**9).map(lambda n: n / 1000))
DURATIONS = st.one_of(
    st.builds(Duration, st.integers(0, 100_000).map(lambda n: n / 1000), st.just("%")),
    st.builds(Duration, AMOUNTS.map(float), st.sampled_from(["ep", "it"])),
)


@settings(max_examples=50)
@given(DURATIONS)
def test_what_is_written_reads_back(duration):
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "steps"), [("0%", 0), ("60%", 600), ("100%", 1000), ("3ep", 300), ("2.5ep", 250), (" 17 it ", 17), ("5000it", 1000)]
)
def test_steps_by_hand(text, steps):
    assert Duration.parse(text).steps(total=1000, per_epoch=100) == steps


@settings(max_examples=50)
@given(DURATIONS, st.integers(1, 10**6), st.integers(1, 10**4))
def test_steps_lie_within_the_training(duration, total, per_epoch):
    assert 0 <= duration.steps(total=total, per_epoch=per_epoch) <= total


@settings(max_examples=50)
@given(DURATIONS, DURATIONS, st.integers(1, 10**6))
def test_a_longer_duration_has_no_fewer_steps(first, second, total):
    short, long = sorted((first.amount, second.amount))
    assert Duration(short, first.unit).steps(total=total, per_epoch=7) <= Duration(long, first.unit).steps(total=total, per_epoch=7)


@pytest.mark.parametrize("text", ["", "60", "60 percent", "-1%", "101%", "100.5%", "1e3it", "nan%", "ep", "5 epochs", None, 0.6])
def test_other_text_is_refused(text):
    with pytest.raises(SettingError, match="write the unit"):
        Duration.parse(text)


def test_epochs_need_the_length_of_an_epoch():
    with pytest.raises(SettingError, match="duration 90ep counts epochs"):
        Duration.parse("90ep").steps(total=1000)
