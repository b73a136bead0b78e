"""The command `qtasks`: its options, and what becomes of errors."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from qtasks.cli import dead, parts, queues, tasks, work
from qtasks.cli.output import JsonLog
from qtasks.cli.session import LEVELS, Session
from qtasks.cli.tasks import Interrupted
from qtasks_core.distribution import HOME, our_distribution
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
    (Interrupted, 130),
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
@click.option(
    "-b",
    "--broker",
    metavar="URL",
    help="The broker, instead of QTASKS_BROKER_URL. `ps` shows a password in it to everybody.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    metavar="LEVEL",
    help="What is logged to stderr. Default: info of `run`, and warning.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, option, value: print_version(context, value),
    help="Show the version and exit.",
)
@click.pass_context
def qtasks(
    context: click.Context, path: str | None, broker: str | None, log_level: str | None
) -> None:
    """Run workers of a QTasks app, enqueue, and look after its tasks."""
    context.obj = Session(path, broker, log_level, context.obj)


def print_version(context: click.Context, asked: bool) -> None:
    """Print what is installed of ours; another project may be installed under the same name."""
    if asked and not context.resilient_parsing:
        found = our_distribution()
        version = f"{HOME}, which is not installed" if found is None else found.version
        click.echo(f"qtasks, version {version}")
        context.exit()


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
    log = JsonLog() if "--json" in sys.argv else None
    if log is not None:
        logging.getLogger().addHandler(log)
    try:
        check_encoding(sys.argv)
        sys.exit(qtasks.main(prog_name="qtasks", standalone_mode=False, obj=log))
    except QTasksError as error:
        end(message_of(error), code_of(error), log, getattr(error, "uuid", None))
    except click.Abort:
        end("Aborted!", 1, log)
    except click.ClickException as error:
        error = with_hint(error)
        if log is None:
            error.show()
            sys.exit(error.exit_code)
        end(error.format_message(), error.exit_code, log)


def end(message: str, code: int, log: JsonLog | None, uuid: str | None = None) -> NoReturn:
    """Say in one line, or in one document, why the command has failed, and exit."""
    if log is None:
        click.echo(f"qtasks: {message}", err=True)
    else:
        said: dict[str, Any] = {"error": message, "exit_code": code}
        if uuid is not None:
            said["uuid"] = uuid
        if held := log.take():
            said["log"] = held
        click.echo(json.dumps(said, ensure_ascii=False), err=True)
    sys.exit(code)


def message_of(error: QTasksError) -> str:
    """Return the line that tells of an error."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, NotSupported):
        return (
            f"{line}; `qtasks guarantees` lists what else it cannot do; "
            "try another backend: see docs/guarantees.md"
        )
    return line


def with_hint(error: click.ClickException) -> click.ClickException:
    """Where other programs have `-A` behind the command, too, say where ours stands."""
    if not isinstance(error, click.NoSuchOption):
        return error
    for option in qtasks.params:
        if error.option_name in option.opts and option.metavar is not None:
            command = error.ctx.command_path.removeprefix("qtasks ") if error.ctx else ""
            right = f"qtasks {error.option_name} {option.metavar} {command}"
            hint = f"{error.option_name} stands before the command: {right}"
            return click.UsageError(hint, error.ctx)
    return error


def check_encoding(arguments: Iterable[str]) -> None:
    """Refuse bytes that are no text, which no part could take. Raises `UsageError`."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{argument!a} is not UTF-8 text") from None
