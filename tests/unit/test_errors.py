"""The chain of an error's causes, as drivers leave it."""

from __future__ import annotations

from qtasks_core.errors import chain_of


def test_the_chain_of_an_error() -> None:
    first, second, third = OSError("first"), ValueError("second"), KeyError("third")
    third.__cause__, second.__context__ = second, first
    assert chain_of(third) == [third, second, first]
    assert chain_of(first) == [first]


def test_a_chain_that_is_a_circle_has_each_error_once() -> None:
    kept = OSError("kept")
    try:
        try:
            raise kept
        except OSError as error:
            raise ValueError("while it was handled") from error
    except ValueError as error:
        other = error
    kept.__cause__ = other
    assert chain_of(other) == [other, kept]
    assert chain_of(kept) == [kept, other]
