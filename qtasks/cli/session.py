"""How a command gets its app: found, with the modules it should include, started and stopped."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

from qtasks.app import App, default_app, import_app, import_named
from qtasks.routers import Router

CONNECT_TIMEOUT = 3.0
"""Seconds: a person waits. A worker waits for its servers instead."""


class Session:
    """What the options before the command said."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def app(self, include: Iterable[str] = ()) -> App:
        """Import the app and the modules beside it. Raises `ConfigurationError`.

        The working directory is importable, as it is for `python -m`.
        """
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        app = default_app() if self.path is None else import_app(self.path, "-A")
        for name in include:
            for value in list(vars(import_named(name, "--include")).values()):
                if isinstance(value, Router):
                    value.included_by(app)
        return app

    @contextmanager
    def started(self, include: Iterable[str] = ()) -> Iterator[App]:
        """Give the app, connected, for one command. Raises `Unavailable`, `ConfigurationError`."""
        logging.basicConfig(format="qtasks: %(message)s", level=logging.WARNING)
        app = self.app(include)
        # From here on an error is raised, and told in the one line that its command ends with.
        logging.disable(logging.ERROR)
        app.start_blocking(CONNECT_TIMEOUT)
        try:
            yield app
        finally:
            app.stop_blocking()


pass_session = click.make_pass_decorator(Session)
include_option = click.option(
    "--include",
    "include",
    metavar="MODULE,…",
    callback=lambda context, option, value: split(value),
    help="Modules to import; their routers are included in the app.",
)


def split(text: str | None) -> tuple[str, ...]:
    """Return the names of a list like `a,b`."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
