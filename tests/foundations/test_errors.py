"""Every error says what came, what is allowed and what to do, and crosses process borders."""

import pickle

import pytest

from anymask import errors
from anymask.errors import AnymaskError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AnymaskError)]
ALSO = {
    "SettingError": ValueError,
    "UnknownName": LookupError,
    "MaskError": ValueError,
    "TechniqueError": RuntimeError,
    "DataError": ValueError,
    "FileFormatError": ValueError,
    "MissingFile": FileNotFoundError,
    "IsFolder": IsADirectoryError,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_message_has_three_parts(kind):
    error = kind("a came", allowed="b only", fix="do c")
    assert str(error) == "a came. Allowed: b only. To do: do c."
    assert (error.came, error.allowed, error.fix) == ("a came", "b only", "do c")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_pickles_whole(kind):
    again = pickle.loads(pickle.dumps(kind("a", allowed="b", fix="c")))
    assert type(again) is kind
    assert (str(again), again.came, again.allowed, again.fix) == ("a. Allowed: b. To do: c.", "a", "b", "c")


def test_each_error_is_a_builtin_one_too():
    assert {kind.__name__ for kind in KINDS} == {"AnymaskError", *ALSO}
    assert all(issubclass(getattr(errors, name), builtin) for name, builtin in ALSO.items())
    assert issubclass(errors.UnknownName, errors.SettingError)
