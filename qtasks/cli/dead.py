"""Commands for dead letters: tasks that will not be tried again."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import click

from qtasks import control
from qtasks.app import App
from qtasks.cli.batches import apply, progress
from qtasks.cli.output import Row, confirm, json_option, print_rows, task_row
from qtasks.cli.session import Session, pass_session
from qtasks.cli.tasks import filters, nothing_in, query_of, records_of
from qtasks_core import Outcome


@click.group()
def dead() -> None:
    """List, revive and drop dead tasks."""


@dead.command("list")
@filters
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@json_option
@pass_session
def list_dead(session: Session, /, limit: int, as_json: bool, **by: Any) -> None:
    """List dead tasks and why they are dead, newest first."""
    with session.started() as app:
        rows = (
            task_row(app, record) for record in records_of(app, query_of(dead=True, **by), limit)
        )
        columns = ("uuid", "task_name", "queue", "attempt", "finished_at", "dead", "error")
        print_rows(rows, columns, as_json, nothing_in(app, "dead task"))


def choosing(command: Any) -> Any:
    """Add the arguments and options that choose dead tasks."""
    command = filters(command)
    command = click.option("--all", "every", is_flag=True, help="All dead tasks that match.")(
        command
    )
    return click.argument("uuids", nargs=-1, type=click.UUID, metavar="[UUID]…")(command)


@dead.command()
@choosing
@json_option
@pass_session
def revive(
    session: Session, /, uuids: tuple[UUID, ...], every: bool, as_json: bool, **by: Any
) -> None:
    """Enqueue dead tasks again, as new tasks; print each new uuid.

    The dead record stays. A task that was revived before is not enqueued a second time.
    """
    check_choice(uuids, every, by)
    with session.started() as app:
        no_result = [d.name for d in app.definitions.values() if not d.options.store_result]

        def operation(batch: list[str]) -> list[Outcome]:
            return app.control_blocking(control.revive, batch, no_result)

        def fields(outcome: Outcome) -> Row:
            new = outcome.current if outcome.status == "done" else None
            again = new is not None and bool(outcome.reason)
            return {"revived_as": new and new.uuid, "revived_before": again}

        def line(row: Row) -> str:
            before = " (revived before)" if row["revived_before"] else ""
            return f"{row['uuid']} -> {row['revived_as']}{before}"

        chosen = chosen_uuids(app, uuids, by, False)
        apply(operation, chosen, as_json, "reviving", line, fields)


@dead.command()
@choosing
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_session
def drop(
    session: Session, /, uuids: tuple[UUID, ...], every: bool, yes: bool, as_json: bool, **by: Any
) -> None:
    """Delete the records of dead tasks."""
    check_choice(uuids, every, by)
    if every:
        confirm("Delete the records of all these dead tasks?", yes, as_json)
    with session.started() as app:

        def operation(batch: list[str]) -> list[Outcome]:
            return app.control_blocking(control.drop, batch)

        def fields(outcome: Outcome) -> Row:
            return {"dropped": outcome.status == "done"}

        chosen = chosen_uuids(app, uuids, by, True)
        apply(operation, chosen, as_json, "dropping", "{uuid}".format_map, fields)


def check_choice(uuids: tuple[UUID, ...], every: bool, by: dict[str, Any]) -> None:
    """Raise `UsageError` unless either uuids are given, or --all with or without filters."""
    filtered = any(value is not None for value in by.values())
    if bool(uuids) == every or (filtered and not every):
        raise click.UsageError(
            "give the uuids of tasks, or --all with any of --name, --queue, --before, --after"
        )


def chosen_uuids(
    app: App, uuids: tuple[UUID, ...], by: dict[str, Any], undecodable: bool
) -> list[str]:
    """Return the uuids of the chosen tasks.

    The list is complete before the first task is changed. Otherwise a revived task that dies
    again would be chosen a second time.
    """
    if uuids:
        return [str(uuid) for uuid in uuids]
    with progress("choosing", records_of(app, query_of(dead=True, **by))) as records:
        return [r.uuid for r in records if undecodable or r.encoding != "raw"]
