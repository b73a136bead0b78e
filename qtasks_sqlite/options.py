"""URLs of SQLite and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import LEASE_TIME, RETENTION_TIME, one_of
from qtasks_core.urls import redact, refuse_options

Synchronous: TypeAlias = Literal["normal", "full"]

SYNCHRONOUS = one_of("normal", "full")
OPTIONS = {"lease": LEASE_TIME, "synchronous": SYNCHRONOUS, "retention": RETENTION_TIME}


def path_of(url: str) -> Path:
    """Return the absolute path that a URL without options names.

    Raises `ConfigurationError` if the URL has a host, no path, or options.
    """
    refuse_options(url, OPTIONS)
    scheme, _, location = url.partition("?")[0].partition("://")
    if scheme != "sqlite" or not location.startswith("/") or location == "/":
        raise ConfigurationError(
            f"{redact(url)} names no file: write sqlite:///relative.db or sqlite:////absolute.db"
        )
    if location == "/:memory:":
        raise ConfigurationError("sqlite keeps tasks in a file; use memory:// for memory")
    # Resolve links, so that all processes find the same doorbells by any path.
    return Path(location[1:]).resolve()


def durability(synchronous: Synchronous) -> tuple[Literal["server crash", "machine crash"], str]:
    """Return the worst event that a level survives, and why.

    Raises `ConfigurationError` for an unknown level.
    """
    if SYNCHRONOUS.checked("synchronous", synchronous) == "full":
        return "machine crash", "WAL, synchronous=FULL: a commit is synced to the disk"
    return (
        "server crash",
        "WAL, synchronous=NORMAL: any process may be killed; a crash of the machine may lose the "
        "last commits, and never corrupts the file (?synchronous=full syncs each)",
    )
