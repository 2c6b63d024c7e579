"""Unknown names suggest the nearest ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymask.errors import UnknownName
from anymask.registry import lookup, nearest, unknown

TABLE = {"snip": 1, "synflow": 2, "GraSP": 3}


def test_lookup_gives_the_value():
    assert [lookup(TABLE, name, what="method") for name in TABLE] == [1, 2, 3]


def test_an_unknown_name_is_refused_with_the_nearest_and_with_all():
    with pytest.raises(UnknownName) as caught:
        lookup(TABLE, "synflw", what="mask method")
    assert caught.value.came == "unknown mask method 'synflw'"
    assert caught.value.allowed == "snip, synflow, GraSP"
    assert caught.value.fix == "did you mean 'synflow'; `anymask list` lists them"


def test_a_name_like_no_other_gets_no_suggestion():
    assert unknown("zzz", TABLE, what="method").fix == "choose one of these"
    assert unknown("zzz", [], what="method").allowed == "nothing here"


def test_case_does_not_count_and_the_tables_spelling_is_given():
    assert nearest("grasp", TABLE) == nearest("GRASP", TABLE) == ["GraSP"]


def test_at_most_as_many_as_asked_best_first():
    assert nearest("resnet32", ["resnet20", "resnet32x", "vgg11", "resnet30"], most=2) == ["resnet32x", "resnet30"]


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=3, unique=True), st.data())
def test_a_dropped_letter_finds_the_name(letters, data):
    name = "".join(letters)  # each once: of repeated ones difflib may pair the wrong ones ("bba" with "baba": 0.57, below the cutoff)
    at = data.draw(st.integers(0, len(name) - 1))
    assert nearest(name[:at] + name[at + 1 :], [name, "0123456789"]) == [name]
