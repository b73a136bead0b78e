"""How a command gets its app: found, with the modules it should include, started and stopped."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

from qtasks.app import App, default_app, import_app, import_named
from qtasks.bridge.reply import block_on
from qtasks.cli.output import JsonLog
from qtasks.declare.routers import Router
from qtasks_core.errors import ConfigurationError
from qtasks_core.urls import redact

CONNECT_TIMEOUT = 3.0
"""Seconds: a person waits. A worker waits for its servers instead."""


LEVELS = ("debug", "info", "warning", "error")


class Session:
    """What the options before the command said, and the log where that is JSON."""

    def __init__(
        self, path: str | None, broker: str | None, log_level: str | None, json_log: JsonLog | None
    ) -> None:
        self.path = path
        self.broker = broker
        self.log_level = log_level
        self.json_log = json_log
        if broker is not None:
            os.environ["QTASKS_BROKER_URL"] = broker
        if log_level is not None:
            logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            logging.getLogger("qtasks").setLevel(log_level.upper())

    def app(self, include: Iterable[str] = ()) -> App:
        """Import the app and the modules beside it. Raises `ConfigurationError`.

        The working directory is importable, as it is for `python -m`.
        """
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        app = default_app() if self.path is None else import_app(self.path, "-A")
        if self.broker is not None and app.addresses()[0] != redact(self.broker):
            raise ConfigurationError(
                f"-b {redact(self.broker)}: the app {app.name!r} names its own broker in its code, "
                f"{app.addresses()[0]}"
            )
        for name in include:
            for value in list(vars(import_named(name, "--include")).values()):
                if isinstance(value, Router):
                    value.included_by(app)
        return app

    @contextmanager
    def started(self, include: Iterable[str] = ()) -> Iterator[App]:
        """Give the app, connected, for one command. Raises `Unavailable`, `ConfigurationError`."""
        app = self.quiet(include)
        block_on(app.connect, CONNECT_TIMEOUT)
        try:
            yield app
        finally:
            block_on(app.disconnect)

    def quiet(self, include: Iterable[str] = ()) -> App:
        """Return the app, not connected, for one command. Raises `ConfigurationError`."""
        logging.basicConfig(format="qtasks: %(message)s", level=logging.WARNING)
        app = self.app(include)
        if self.log_level is None:
            # From here on an error is raised, and told in the one line that its command ends with.
            logging.disable(logging.ERROR)
        return app


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
