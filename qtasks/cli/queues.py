"""Commands for queues, and for the workers that receive from them."""

from __future__ import annotations

from contextlib import suppress

import click
from msgspec.structs import asdict

from qtasks import control
from qtasks.app import App
from qtasks.cli.output import confirm, json_option, print_json, print_rows
from qtasks.cli.session import Session, pass_session
from qtasks.cli.tasks import nothing_in
from qtasks.execution.definition import declared_queues
from qtasks_core.errors import NotSupported


@click.command()
@click.argument("names", nargs=-1, metavar="[QUEUE]…")
@json_option
@pass_session
def queues(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Show how many messages are in each queue.

    By default: in the queues of the app's tasks and of its workers. `-` (in JSON null) is a number
    that the broker does not know.
    """
    with session.started() as app:
        found = app.control_blocking(control.depths, names or known_queues(app))
        rows = ({"queue": name, **asdict(depth)} for name, depth in found.items())
        print_rows(rows, ("queue", "ready", "delayed", "in_flight", "oldest_age"), as_json)


def known_queues(app: App) -> list[str]:
    """Return the queues of the app's tasks and of all running workers."""
    names = declared_queues(app.definitions.values())
    # A storage without shared values has no registry of workers.
    with suppress(NotSupported):
        names.update(*(worker.queues for worker in app.control_blocking(control.workers)))
    return sorted(names)


@click.command()
@click.argument("queue")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_session
def purge(session: Session, queue: str, yes: bool, as_json: bool) -> None:
    """Drop the messages that wait in a queue, and cancel their tasks."""
    confirm(f"Drop all messages that wait in queue {queue!r}?", yes, as_json)
    with session.started() as app:
        count = app.control_blocking(control.purge, queue)
        storage = app.guarantees()[1]
    dropped = None if count < 0 else count
    if as_json:
        print_json({"queue": queue, "dropped": dropped})
        return
    kept = ""
    if "query" in storage.unsupported:
        kept = f"; their tasks are not cancelled, because {storage.part} cannot list them"
    number = "an unknown number of" if dropped is None else dropped
    click.echo(f"dropped {number} messages{kept}")


@click.command()
@json_option
@pass_session
def workers(session: Session, as_json: bool) -> None:
    """List the running workers and the tasks that they run."""
    with session.started() as app:
        rows = (
            {**asdict(w), "running": [t._asdict() if as_json else t.task_name for t in w.running]}
            for w in app.control_blocking(control.workers)
        )
        columns = (
            "id", "host", "pid", "queues", "concurrency", "started_at", "seen_at", "running",
        )  # fmt: skip
        print_rows(rows, columns, as_json, nothing_in(app, "worker"))
