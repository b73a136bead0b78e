"""Commands for the broker and the storage of an app: `guarantees` and `migrate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import click
from msgspec.structs import asdict

from qtasks import control
from qtasks.bridge.crossing import block_on, io_thread
from qtasks.cli.output import json_option, print_fields, print_json
from qtasks.cli.session import CONNECT_TIMEOUT, Session, pass_session
from qtasks.client.retrying import retry
from qtasks_core import Guarantees

T = TypeVar("T")

NEEDED_BY = {
    "depth": "qtasks queues",
    "purge": "qtasks purge",
    "broadcast": "stopping a cancelled task at once",
    "commands": "stopping a cancelled task at once",
    "migrate": "qtasks migrate",
    "query": "qtasks tasks, qtasks dead",
    "claim": "deleting old records",
    "release": "deleting old records",
    "delete": "qtasks dead drop",
    "expire": "deleting old records",
    "set": "qtasks workers",
    "get_value": "qtasks workers",
    "values": "qtasks workers",
    "watch_value": "qtasks workers",
    "append": "progress of tasks",
    "read": "progress of tasks",
}
"""What does not work for an operator if a broker or storage does not support a method."""


@click.command()
@json_option
@pass_session
def guarantees(session: Session, as_json: bool) -> None:
    """Show what the broker and the storage guarantee.

    It depends on their configuration, and on that of their servers.
    """
    with session.started() as app:
        both = app.guarantees()
    if as_json:
        broker, storage = map(shown_fields, both)
        print_json({"broker": broker, "storage": storage})
        return
    for title, part in zip(("broker", "storage"), both, strict=True):
        fields = shown_fields(part)
        del fields["unsupported"]
        missing = ", ".join(missing_in(part)) or None
        print_fields({title: fields.pop("part"), **fields, "not supported": missing}, False)
        click.echo()


def shown_fields(guarantees: Guarantees) -> dict[str, object]:
    """Return the guarantees to show: all but transactions, which no command can use."""
    fields = asdict(guarantees)
    del fields["transactions"]
    return fields


def missing_in(guarantees: Guarantees) -> list[str]:
    """Return what does not work for an operator with this broker or storage, each once."""
    return list(dict.fromkeys(NEEDED_BY.get(method, method) for method in guarantees.unsupported))


@click.command()
@click.option(
    "--sql", "as_sql", is_flag=True, help="Print what it would do as SQL. Change nothing."
)
@json_option
@pass_session
def migrate(session: Session, as_sql: bool, as_json: bool) -> None:
    """Create or update what the servers must have.

    You can run it again, and while others run it.
    """
    app = session.quiet()
    if as_sql:
        scripts = on_servers(partial(control.migration, app))
        if as_json:
            print_json(scripts)
            return
        # A broker and a storage on one server have the same script.
        for text in dict.fromkeys(script_of(part, script) for part, script in scripts.items()):
            click.echo(text)
        return
    done = on_servers(partial(control.migrate, app))
    if as_json:
        print_json(done)
        return
    print_fields({part: summary_of(changes) for part, changes in done.items()}, False)


def on_servers(operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return the result of an operation for which the app need not be started."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    done: T = block_on(io_thread().ask, partial(retry, operation, deadline=deadline))
    return done


def script_of(part: str, script: str | None) -> str:
    """Return the script, or a comment if there is none."""
    if script is None:
        return f"-- {part}: no SQL, run `qtasks migrate`"
    return script or f"-- {part}: up to date"


def summary_of(changes: list[str] | None) -> str:
    """Return one line about the changes; None means that there is nothing to migrate."""
    if changes is None:
        return "has nothing to migrate"
    return "; ".join(changes) or "up to date"
