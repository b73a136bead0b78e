"""Commands for dead letters: tasks that will not be tried again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias
from uuid import UUID

import click

from qtasks import control
from qtasks.app import App
from qtasks.cli.output import Row, json_option, print_json, print_rows, task_row
from qtasks.cli.session import Session, pass_session
from qtasks.cli.tasks import filters, query_of, records_of
from qtasks_core import Outcome
from qtasks_core.errors import Refused

_BATCH = 200
Operation: TypeAlias = Callable[[list[str]], list[Outcome]]


@click.group()
def dead() -> None:
    """Look after dead tasks: list, revive, drop."""


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
        print_rows(rows, columns, as_json)


def choosing(command: Any) -> Any:
    """Add what says which dead tasks are meant."""
    command = filters(command)
    command = click.option("--all", "every", is_flag=True, help="All that the options choose.")(
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

    The dead record stays. What was revived before is not enqueued twice.
    """
    refuse_both(uuids, every, by)
    with session.started() as app:
        no_result = [d.name for d in app.definitions.values() if not d.options.store_result]

        def operation(batch: list[str]) -> list[Outcome]:
            return app.control_blocking(control.revive, batch, no_result)

        def row(uuid: str, outcome: Outcome) -> Row:
            return {"uuid": uuid, "revived_as": outcome.there and outcome.there.uuid}

        apply(operation, named(app, uuids, by, False), as_json, "reviving", row)


@dead.command()
@choosing
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_session
def drop(
    session: Session, /, uuids: tuple[UUID, ...], every: bool, yes: bool, as_json: bool, **by: Any
) -> None:
    """Delete the records of dead tasks."""
    refuse_both(uuids, every, by)
    if every and not yes:
        click.confirm("Delete the records of all these dead tasks?", abort=True, err=True)
    with session.started() as app:

        def operation(batch: list[str]) -> list[Outcome]:
            return app.control_blocking(control.drop, batch)

        chosen = named(app, uuids, by, True)
        apply(operation, chosen, as_json, "dropping", lambda uuid, _: {"uuid": uuid})


def refuse_both(uuids: tuple[UUID, ...], every: bool, by: dict[str, Any]) -> None:
    """Raise `UsageError` unless the tasks are named, or --all chooses them."""
    filtered = any(value is not None for value in by.values())
    if bool(uuids) == every or (filtered and not every):
        raise click.UsageError("name the tasks by uuid, or choose them by --all and its options")


def named(app: App, uuids: tuple[UUID, ...], by: dict[str, Any], undecodable: bool) -> list[str]:
    """Return the chosen tasks, all of them before the first is touched: what a revived task
    becomes meanwhile is not among them.
    """
    return [str(uuid) for uuid in uuids] or [
        record.uuid
        for record in records_of(app, query_of(dead=True, **by))
        if undecodable or record.encoding != "raw"
    ]


def apply(
    operation: Operation,
    uuids: list[str],
    as_json: bool,
    label: str,
    row: Callable[[str, Outcome], Row],
) -> None:
    """Work through tasks, batch by batch; raise `Refused` in the end if any was."""
    refused: list[str] = []
    with click.progressbar(length=len(uuids), label=label, file=sys.stderr, hidden=quiet()) as bar:
        for at in range(0, len(uuids), _BATCH):
            batch = uuids[at : at + _BATCH]
            for uuid, outcome in zip(batch, operation(batch), strict=True):
                if outcome.status == "refused":
                    refused.append(outcome.reason)
                elif as_json:
                    print_json(row(uuid, outcome))
                else:
                    click.echo(" -> ".join(str(cell) for cell in row(uuid, outcome).values()))
            bar.update(len(batch))
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise Refused(refused[0] + more)


def quiet() -> bool:
    """Whether a progress bar would stand in a file, or between the lines of a terminal."""
    return not sys.stderr.isatty() or sys.stdout.isatty()
