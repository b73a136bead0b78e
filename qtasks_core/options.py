"""The values that an option may have, the same in a URL and in a constructor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

from qtasks_core.errors import ConfigurationError
from qtasks_core.schemas import LONGEST

T = TypeVar("T")

_YES = ("1", "t", "true", "y", "yes")
_NO = ("0", "f", "false", "n", "no")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """The values that an option may have."""

    allowed: str
    """The text that follows "must be" in an error."""
    fits: Callable[[Any], bool]
    read: Callable[[str], Any] = str
    """Turns the text in a URL into a value, or raises `ValueError`."""

    def __call__(self, text: str) -> Any:
        """Return the value of a text in a URL, for `take_options`. Raises `ValueError`."""
        value = self.read(text)
        if not self.fits(value):
            raise ValueError(f"it must be {self.allowed}")
        return value

    def checked(self, name: str, value: T) -> T:
        """Return an argument of a constructor if it fits. Raises `ConfigurationError`."""
        if not self.fits(value):
            raise ConfigurationError(f"{name}={value!r} must be {self.allowed}")
        return value


def seconds(least: float = 0.001, most: float = LONGEST) -> Kind:
    """Return the kind of a time in seconds, from `least` to `most`. Infinity does not fit."""
    return Kind(
        f"a number of seconds {_range(least, most, LONGEST)}",
        lambda value: isinstance(value, int | float) and least <= value <= most,
        float,
    )


def integer(least: int, most: int = _LARGEST) -> Kind:
    """Return the kind of a whole number. In a URL it has only decimal digits."""
    return Kind(
        f"an integer {_range(least, most, _LARGEST)}",
        lambda value: isinstance(value, int) and least <= value <= most,
        _integer,
    )


def one_of(*words: str) -> Kind:
    """Return the kind of an option whose value is one of a few words."""
    return Kind(f"one of {', '.join(words)}", lambda value: value in words)


def _range(least: float, most: float, largest: float) -> str:
    if most == largest:
        return f"of at least {least:.12g}"
    return f"from {least:.12g} to {most:.12g}"


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("it has other characters than digits")
    return int(text)


def _switch(text: str) -> bool:
    if text.lower() not in _YES + _NO:
        raise ValueError("it is neither yes nor no")
    return text.lower() in _YES


ANY = Kind("a text", lambda value: isinstance(value, str))
TEXT = Kind("a text that is not empty", bool)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool), _switch)
LEASE_TIME = seconds()
"""For brokers that have no narrower limits."""
RETENTION_TIME = Kind(
    "a number of seconds of at least 0, or None: for ever",
    lambda value: isinstance(value, int | float) and (0 <= value <= LONGEST or value == inf),
    lambda text: inf if text.lower() == "none" else float(text),
)
"""`inf` is another way to write None."""


def checked_retention(retention: float | None) -> float:
    """Return the `retention=` of a constructor in seconds, infinity for None.

    Raises `ConfigurationError`.
    """
    return inf if retention is None else RETENTION_TIME.checked("retention", retention)
