from __future__ import annotations

import pickle

import pytest

from histill import errors
from histill.errors import ConfigError, HistillError, nearest


def test_the_text_holds_every_given_part_in_order_and_no_other() -> None:
    error = ConfigError("a value that is not offered", where="config.kind", got="sgdx", allowed="adamw, sgd")
    assert str(error).splitlines() == [
        "a value that is not offered",
        "  where:   config.kind",
        "  got:     sgdx",
        "  allowed: adamw, sgd",
    ]
    assert error.what == "a value that is not offered"
    assert str(ConfigError("only what")) == "only what"


def test_falsy_values_are_still_shown() -> None:
    assert str(ConfigError("too few", got=0)).splitlines() == ["too few", "  got:     0"]


def test_every_error_of_the_tree_is_a_histill_error_and_a_value_error() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert len(kinds) == 6
    for kind in kinds:
        assert issubclass(kind, HistillError)
        assert issubclass(kind, ValueError)
        assert kind.__name__ in (errors.__doc__ or "")


def test_errors_cross_process_borders_with_kind_and_text() -> None:
    error = errors.DataError("cannot decode", where="a.jpg", remedy="remove it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.DataError
    assert str(again) == str(error)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h-optimus0", "did you mean h-optimus-0 or h-optimus-1?"),
        ("H-OPTIMUS-1", "did you mean h-optimus-1 or h-optimus-0?"),
        ("uni", "did you mean UNI?"),
        ("zzzzzz", None),
    ],
)
def test_nearest_names(name: str, expected: str | None) -> None:
    assert nearest(name, ["h-optimus-0", "h-optimus-1", "UNI"]) == expected


def test_nearest_gives_at_most_count_names() -> None:
    assert nearest("teacher1", (f"teacher{index}" for index in range(9)), count=1) == "did you mean teacher1?"
