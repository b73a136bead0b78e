"""How a command gets its app: imports it with its modules, starts it and stops it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

from qtasks.app import App, default_app, import_app, import_named
from qtasks.bridge.crossing import block_on
from qtasks.cli.output import JsonLog
from qtasks.declare.routers import Router
from qtasks_core.errors import ConfigurationError
from qtasks_core.urls import redact

CONNECT_TIMEOUT = 3.0
"""Seconds that a command waits for its servers. A worker (`run`) waits without a limit."""
LEVELS = ("debug", "info", "warning", "error")


class Session:
    """The global options, and the log if it is printed as JSON."""

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
        """Import the app and the included modules. Raises `ConfigurationError`.

        Modules in the working directory can be imported, as with `python -m`.
        """
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        app = default_app() if self.path is None else import_app(self.path, "-A")
        if self.broker is not None and app.addresses()[0] != redact(self.broker):
            raise ConfigurationError(
                f"-b {redact(self.broker)}: the app {app.name!r} sets its broker in its code, "
                f"{app.addresses()[0]}; leave out -b, or remove the broker from the code"
            )
        for name in include:
            for value in list(vars(import_named(name, "--include")).values()):
                if isinstance(value, Router):
                    value.included_by(app)
        return app

    @contextmanager
    def started(self, include: Iterable[str] = ()) -> Iterator[App]:
        """Yield the connected app for one command; stop it afterwards.

        Raises `Unavailable` if a server cannot be reached within `CONNECT_TIMEOUT`, and
        `ConfigurationError`.
        """
        app = self.quiet(include)
        block_on(app.connect, CONNECT_TIMEOUT)
        try:
            yield app
        finally:
            block_on(app.disconnect)

    def quiet(self, include: Iterable[str] = ()) -> App:
        """Return the app for one command, without connecting. Raises `ConfigurationError`."""
        logging.basicConfig(format="qtasks: %(message)s", level=logging.WARNING)
        app = self.app(include)
        if self.log_level is None:
            # From here on every error is raised, and `main` prints it: do not log it as well.
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
    """Return the names in a list like `a,b`."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
