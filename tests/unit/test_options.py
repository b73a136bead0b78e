"""Kinds of options: which values fit, from a URL's text and from a constructor."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import (
    LEASE_TIME,
    RETENTION_TIME,
    SWITCH,
    TEXT,
    Kind,
    checked_retention,
    integer,
    one_of,
    seconds,
)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (seconds(), "2.5", 2.5),
        (LEASE_TIME, "1e3", 1000.0),
        (RETENTION_TIME, "0", 0.0),
        (RETENTION_TIME, "None", math.inf),
        (integer(1, 5), "5", 5),
        (one_of("a", "b"), "b", "b"),
        (TEXT, "x", "x"),
        (SWITCH, "Yes", True),
        (SWITCH, "0", False),
    ],
)
def test_a_text_that_fits(kind: Kind, text: str, value: object) -> None:
    assert kind(text) == value
    assert type(kind(text)) is type(value)
    assert kind.checked("option", value) is value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (seconds(), "nan"), (seconds(), "inf"), (seconds(), "0"), (seconds(3, 9), "10"),
        (LEASE_TIME, "none"), (RETENTION_TIME, "-1"), (RETENTION_TIME, "1e12"),
        (integer(1), "0"), (integer(1), "1.0"), (integer(0), "\N{SUPERSCRIPT TWO}"),
        (integer(0), "-1"), (integer(0), "9" * 20), (integer(0), "9" * 5000), (integer(0), ""),
        (one_of("a", "b"), "A"), (one_of("a", "b"), ""), (TEXT, ""), (SWITCH, "on"),
    ],
)  # fmt: skip
def test_a_text_that_does_not_fit(kind: Kind, text: str) -> None:
    with pytest.raises(ValueError):  # what it says is never shown
        kind(text)


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (LEASE_TIME, 0, "lease=0 must be a number of seconds of at least 0.001"),
        (LEASE_TIME, "5", "lease='5' must be a number of seconds of at least 0.001"),
        (LEASE_TIME, None, "lease=None must be a number of seconds of at least 0.001"),
        (seconds(3, 196605), 2.5, "lease=2.5 must be a number of seconds from 3 to 196605"),
        (integer(1, 9), 10, "lease=10 must be an integer from 1 to 9"),
        (one_of("a", "b"), "c", "lease='c' must be one of a, b"),
    ],
)
def test_a_wrong_argument(kind: Kind, value: Any, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        kind.checked("lease", value)
    assert str(caught.value) == told


def test_a_retention() -> None:
    assert checked_retention(None) == checked_retention(math.inf) == math.inf
    assert checked_retention(0) == 0
    for wrong in (-1.0, math.nan, 1e12):
        with pytest.raises(ConfigurationError, match="seconds of at least 0, or None: for ever"):
            checked_retention(wrong)
