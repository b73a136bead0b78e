"""The command `qtasks`: its options, and what becomes of errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import NoReturn

import click

from qtasks.cli import dead, parts, queues, tasks, work
from qtasks.cli.output import log_json
from qtasks.cli.session import Session
from qtasks_core.errors import (
    ConfigurationError,
    NotSupported,
    QTasksError,
    SerializationError,
    SignatureMismatch,
    TaskTimeout,
    Unavailable,
    UnknownTask,
)

EXIT_CODES: tuple[tuple[type[QTasksError], int], ...] = (
    (ConfigurationError, 2),
    (SignatureMismatch, 2),
    (SerializationError, 2),
    (UnknownTask, 2),
    (Unavailable, 3),
    (NotSupported, 4),
    (TaskTimeout, 5),
)
"""Every other error ends with 1."""


def code_of(error: QTasksError) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-A",
    "--app",
    "path",
    metavar="MODULE:APP",
    help="The app. Else QTASKS_APP, QTASKS_BROKER_URL, or the embedded default.",
)
@click.version_option(package_name="qtasks")
@click.pass_context
def qtasks(context: click.Context, path: str | None) -> None:
    """Run workers of a QTasks app, enqueue, and look after its tasks."""
    context.obj = Session(path)


for command in (
    work.run,
    tasks.call,
    tasks.status,
    tasks.tasks,
    tasks.cancel,
    dead.dead,
    queues.queues,
    queues.purge,
    queues.workers,
    parts.guarantees,
    parts.migrate,
):
    qtasks.add_command(command)


def main() -> None:
    """Be the command, under one name however it was started.

    An error of ours is one line and an exit code; others are bugs.
    """
    # Asked here, since what cannot be parsed has no options yet.
    as_json = "--json" in sys.argv
    if as_json:
        log_json()
    try:
        check_encoding(sys.argv)
        sys.exit(qtasks.main(prog_name="qtasks", standalone_mode=False))
    except QTasksError as error:
        end(message_of(error), code_of(error), as_json)
    except click.Abort:
        end("Aborted!", 1, as_json)
    except click.ClickException as error:
        error = with_hint(error)
        if not as_json:
            error.show()
            sys.exit(error.exit_code)
        end(error.format_message(), error.exit_code, True)


def end(message: str, code: int, as_json: bool) -> NoReturn:
    """Say in one line why the command has failed, and exit."""
    said = json.dumps({"error": message, "exit_code": code}, ensure_ascii=False)
    click.echo(said if as_json else f"qtasks: {message}", err=True)
    sys.exit(code)


def message_of(error: QTasksError) -> str:
    """Return the line that tells of an error."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, NotSupported):
        return f"{line}; `qtasks guarantees` lists what yours cannot do, another part may"
    return line


def with_hint(error: click.ClickException) -> click.ClickException:
    """Where other programs have `-A` behind the command, too, say where ours stands."""
    if not isinstance(error, click.NoSuchOption) or error.option_name not in ("-A", "--app"):
        return error
    command = error.ctx.command_path.removeprefix("qtasks ") if error.ctx else ""
    hint = f"{error.option_name} stands before the command: qtasks -A MODULE:APP {command}"
    return click.UsageError(hint, error.ctx)


def check_encoding(arguments: Iterable[str]) -> None:
    """Refuse bytes that are no text, which no part could take. Raises `UsageError`."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{argument!a} is not UTF-8 text") from None
