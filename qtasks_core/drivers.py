"""Importing a driver that may not be installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qtasks_core.errors import MissingDriver


@contextmanager
def importing_driver(backend: str, requirement: str) -> Iterator[None]:
    """Raise `MissingDriver` if an import inside fails. The arguments are those of the error.

        with importing_driver("shelf://", "qtasks-shelf[driver]"):
            import shelves

    Import only the driver inside. The error's cause says which module is missing.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDriver(backend, requirement) from error
