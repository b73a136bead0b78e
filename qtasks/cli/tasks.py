"""Commands for tasks: `call`, `status`, `tasks` and `cancel`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from difflib import get_close_matches
from typing import Any, get_args
from uuid import UUID

import click
from msgspec.structs import replace

from qtasks import control
from qtasks.app import App
from qtasks.bridge.crossing import block_on
from qtasks.cli.arguments import read_arguments
from qtasks.cli.batches import apply
from qtasks.cli.output import (
    Row,
    decoded,
    json_option,
    print_fields,
    print_json,
    print_rows,
    task_row,
)
from qtasks.cli.session import Session, include_option, pass_session
from qtasks.declare.handle import Handle
from qtasks.declare.tasks import message_of
from qtasks.execution.definition import TaskDefinition
from qtasks_core import DONE, Outcome, Status, Task, TaskQuery
from qtasks_core.errors import QTasksError, UnknownTask

_PAGE = 500


class NoSuchRecord(QTasksError):
    """The storage has no record of the task."""


class DidNotSucceed(QTasksError):
    """`call --wait`: the task failed or was cancelled."""


class Interrupted(QTasksError):
    """`call --wait`: the user stopped waiting with Ctrl-C."""

    def __init__(self, message: str, uuid: str) -> None:
        super().__init__(message)
        self.uuid = uuid


def no_option(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Raise `NoSuchOption` for text that looks like an unknown option; `-1` is a number."""
    for text in [value] if isinstance(value, str) else value:
        if text.startswith("-") and not text[1:2].isdigit():
            name = text.partition("=")[0]
            options = [option for known in context.command.params for option in known.opts]
            near = get_close_matches(name, options)
            raise click.NoSuchOption(name, possibilities=near, ctx=context)
    return value


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", callback=no_option)
@click.argument("arguments", nargs=-1, metavar="[JSON | NAME=JSON]…", callback=no_option)
@click.option(
    "--wait",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds to wait for the result.",
)
@click.option("--delay", type=click.FloatRange(min=0), help="Seconds before it may start.")
@click.option("--queue", help="The queue. Default: the task's queue.")
@click.option("--priority", type=click.IntRange(0, 9), help="9 runs first.")
@click.option("--key", help="Enqueue once: a second call with this key adds no task.")
@include_option
@json_option
@pass_session
def call(
    session: Session,
    /,
    name: str,
    arguments: tuple[str, ...],
    wait: float | None,
    include: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Enqueue a task and print its uuid, or with --wait its result.

    Each argument is a JSON value: 1, true, '"text"', '[1, 2]', or name='"text"'. If the parameter
    is annotated as str, a date or the like, the quotes can be left out: 2030-01-31.
    """
    with session.started(include) as app:
        definition = known(app, name)
        args, kwargs = read_arguments(definition, arguments)
        message = message_of(app, definition, args, kwargs, **options)
        try:
            record = block_on(app.submit, message, wait)
        except KeyboardInterrupt:
            uuid = message.uuid
            raise Interrupted(
                f"no longer waiting for task {name} {uuid}, which is not cancelled: see "
                f"`qtasks status {uuid}`",
                uuid,
            ) from None
        if as_json:
            print_fields(task_row(app, record), True)
        if record.status in ("error", "cancel"):
            why = f": {record.error}" if record.error else ""
            raise DidNotSucceed(f"task {name} {record.uuid} ended in {record.status!r}{why}")
        if not as_json and wait is None:
            click.echo(record.uuid)
        elif not as_json:
            handle: Handle[Any] = Handle(app, record, definition.decode_result)
            print_json(decoded(lambda: handle.returning))


def known(app: App, name: str) -> TaskDefinition:
    """Return a task of the app. Raises `UnknownTask` with suggestions."""
    if not app.definitions:
        raise UnknownTask(
            f"no task {name!r}: the app has no tasks; name your app with -A module:app, "
            "or modules with routers with --include"
        )
    if name in app.definitions:
        return app.definitions[name]
    # Tasks are named `module.function` by default, but people remember the function.
    near = [one for one in app.definitions if one.rpartition(".")[2] == name]
    near = near or get_close_matches(name, app.definitions, n=1) or sorted(app.definitions)
    more = f" and {len(near) - 3} more" if len(near) > 3 else ""
    known = ", ".join(near[:3]) + more
    raise UnknownTask(f"the app {app.name!r} knows no task {name!r}; it knows {known}")


@click.command()
@click.argument("uuid", type=click.UUID)
@json_option
@pass_session
def status(session: Session, uuid: UUID, as_json: bool) -> None:
    """Show the record of one task."""
    with session.started() as app:
        record = block_on(app.get, uuid)
        if record is None:
            raise NoSuchRecord(f"there is no record of a task {uuid}")
        print_fields(task_row(app, record), as_json)


def moment(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """Return the Unix time of an ISO 8601 date or time; it is local unless it has an offset."""
    try:
        return None if value is None else datetime.fromisoformat(value).timestamp()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a time like 2030-01-31T12:00") from None


def filters(command: Any) -> Any:
    """Add the options that filter tasks."""
    for option in (
        click.option(
            "--before",
            metavar="TIME",
            callback=moment,
            help="Enqueued before this time, e.g. 2030-01-31T12:00.",
        ),
        click.option("--after", metavar="TIME", callback=moment, help="Enqueued after this time."),
        click.option("--name", help="The task's name."),
        click.option("--queue", help="The task's queue."),
    ):
        command = option(command)
    return command


@click.command()
@click.option(
    "--status", multiple=True, type=click.Choice(get_args(Status)), help="Can be repeated."
)
@filters
@click.option("--dead", is_flag=True, help="Only dead tasks: failed, with no retry to come.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@json_option
@pass_session
def tasks(
    session: Session,
    /,
    status: tuple[Status, ...],
    dead: bool,
    limit: int,
    as_json: bool,
    **by: Any,
) -> None:
    """List tasks, newest first."""
    wanted = query_of(status=status or None, dead=dead or None, **by)
    with session.started() as app:
        rows = (task_row(app, record) for record in records_of(app, wanted, limit))
        columns = ("uuid", "task_name", "status", "queue", "attempt", "created_at", "error")
        print_rows(rows, columns, as_json, nothing_in(app, "task"))


def nothing_in(app: App, what: str) -> str:
    """Return the message that no task or worker was found, with the place of the search."""
    return f"no {what} of the app {app.name!r} found in its storage, {app.addresses()[1]}"


@click.command()
@click.argument("uuids", nargs=-1, required=True, type=click.UUID, metavar="UUID…")
@json_option
@pass_session
def cancel(session: Session, uuids: tuple[UUID, ...], as_json: bool) -> None:
    """Cancel tasks, queued or running."""
    with session.started() as app:

        def operation(batch: list[str]) -> Iterator[Outcome]:
            return (cancelled(app, uuid) for uuid in batch)

        def fields(outcome: Outcome) -> Row:
            return {"cancelled": outcome.status == "done"}

        named = [str(uuid) for uuid in uuids]
        apply(operation, named, as_json, "cancelling", "{uuid} cancelled".format_map, fields)


def cancelled(app: App, uuid: str) -> Outcome:
    """Cancel one task. `refused`: there is no such task, or it has already finished."""
    try:
        if block_on(app.cancel_task, uuid):
            return DONE
    except UnknownTask:
        return Outcome("refused", f"there is no record of a task {uuid}")
    return Outcome("refused", f"task {uuid} cannot be cancelled: it has already finished")


def query_of(
    *, name: str | None, after: float | None, before: float | None, **fields: Any
) -> TaskQuery:
    """Return the query for the options of `filters`."""
    return TaskQuery(task_name=name, created_after=after, created_before=before, **fields)


def records_of(app: App, query: TaskQuery, limit: int | None = None) -> Iterator[Task]:
    """Yield the records that match, at most `limit`, reading page by page.

    Raises `NotSupported`.
    """
    left = limit
    while left is None or left > 0:
        size = _PAGE if left is None else min(left, _PAGE)
        page = app.control_blocking(control.query, replace(query, limit=size))
        yield from page.tasks
        if page.cursor is None:
            return
        left = None if left is None else left - len(page.tasks)
        query = replace(query, cursor=page.cursor)
