"""What is said of exceptions, here and from another process."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from unittest.mock import patch

from qtasks.execution.failures import RemoteError, line_of, remote_error, trace_of


class Declined(ConnectionError):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Odd(Exception):
    def __new__(cls, needed: int) -> Odd:
        return super().__new__(cls)


class Final(Exception):
    def __init_subclass__(cls) -> None:
        raise ValueError("it is final")


def told(kind: type[BaseException]) -> RemoteError:
    """Return an exception of this class as another process tells of it."""
    kinds = [(each.__module__, each.__qualname__) for each in kind.__mro__]
    return remote_error(kinds, "its line", "its trace")


def test_it_is_of_the_same_class() -> None:
    error = told(Declined)
    assert isinstance(error, Declined)
    assert isinstance(error, ConnectionError)
    assert (str(error), line_of(error), trace_of(error)) == ("its line", "its line", "its trace")
    assert isinstance(told(json.JSONDecodeError), json.JSONDecodeError)
    assert isinstance(told(UnicodeDecodeError), UnicodeDecodeError)


def test_of_a_class_that_cannot_be_had_it_is_of_the_next() -> None:
    unknown = [("elsewhere", "Error"), (__name__, "Missing"), ("builtins", "KeyError")]
    assert isinstance(remote_error(unknown, "l", "t"), KeyError)
    assert type(told(Odd)).__mro__[1:3] == (RemoteError, Exception)
    # What would pass for the end of a process or of a run here.
    assert not isinstance(told(KeyboardInterrupt), KeyboardInterrupt)
    assert line_of(told(KeyboardInterrupt)) == "its line"


def test_nothing_is_imported_to_tell_of_an_exception() -> None:
    lazy = ModuleType("lazy")
    asked: list[str] = []
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    with patch.dict(sys.modules, lazy=lazy):
        error = remote_error([("lazy", "Error"), ("lazy.deeper", "Error")], "l", "t")
    assert (type(error), asked) == (RemoteError, [])


def test_a_class_that_refuses_to_be_derived_from() -> None:
    assert type(told(Final)).__mro__[1:3] == (RemoteError, Exception)


def test_an_exception_whose_traceback_cannot_be_made() -> None:
    odd = SyntaxError("no", ("file", 1, "x", "text"))  # type: ignore[arg-type]
    assert trace_of(odd) == "(its traceback cannot be made: TypeError)"
    assert line_of(odd).startswith("SyntaxError: no")
