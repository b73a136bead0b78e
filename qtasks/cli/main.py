"""The command `qtasks`: its global options, and how errors become messages and exit codes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import click

from qtasks.cli import backends, check, dead, queues, tasks, work
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
"""Exit codes by class of error. Every other error of QTasks exits with 1."""


def code_of(error: QTasksError) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-A",
    "--app",
    "path",
    metavar="MODULE:APP",
    help="The app. Default: QTASKS_APP, else QTASKS_BROKER_URL, else the embedded SQLite file.",
)
@click.option(
    "-b",
    "--broker",
    metavar="URL",
    help="The broker, instead of QTASKS_BROKER_URL. `ps` shows a password in it to all users.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    metavar="LEVEL",
    help="The level of the log on stderr. Default: info for `run`, warning for all others.",
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
    """Run workers, enqueue tasks and manage them."""
    context.obj = Session(path, broker, log_level, context.obj)


def print_version(context: click.Context, asked: bool) -> None:
    """Print the version of this project's package, not of another one with the same name."""
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
    check.check,
    backends.guarantees,
    backends.migrate,
):
    qtasks.add_command(command)


def main() -> None:
    """Run the command line. Errors of QTasks become one line and an exit code; others are bugs."""
    # Read from argv: when the arguments cannot be parsed, there are no parsed options to ask.
    log = JsonLog() if "--json" in sys.argv else None
    if log is not None:
        logging.getLogger().addHandler(log)
    try:
        check_encoding(sys.argv)
        sys.exit(qtasks.main(prog_name="qtasks", standalone_mode=False, obj=log))
    except QTasksError as error:
        fail(message_of(error), code_of(error), log, getattr(error, "uuid", None))
    except click.Abort:
        fail("Aborted!", 1, log)
    except click.ClickException as error:
        error = with_hint(error)
        if log is None:
            error.show()
            sys.exit(error.exit_code)
        fail(error.format_message(), error.exit_code, log)


def fail(message: str, code: int, log: JsonLog | None, uuid: str | None = None) -> NoReturn:
    """Print why the command failed, as one line or one JSON document, and exit."""
    if log is None:
        click.echo(f"qtasks: {message}", err=True)
    else:
        document: dict[str, Any] = {"error": message, "exit_code": code}
        if uuid is not None:
            document["uuid"] = uuid
        if held := log.take():
            document["log"] = held
        click.echo(json.dumps(document, ensure_ascii=False), err=True)
    sys.exit(code)


def message_of(error: QTasksError) -> str:
    """Return the line that is printed for an error."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, NotSupported):
        return (
            f"{line}; `qtasks guarantees` lists what else it cannot do; "
            "try another backend: see docs/guarantees.md"
        )
    return line


def with_hint(error: click.ClickException) -> click.ClickException:
    """Explain a global option that was written after the command, as other programs allow it."""
    if not isinstance(error, click.NoSuchOption):
        return error
    for option in qtasks.params:
        if error.option_name in option.opts and option.metavar is not None:
            command = error.ctx.command_path.removeprefix("qtasks ") if error.ctx else ""
            right = f"qtasks {error.option_name} {option.metavar} {command}"
            hint = f"write {error.option_name} before the command: {right}"
            return click.UsageError(hint, error.ctx)
    return error


def check_encoding(arguments: Iterable[str]) -> None:
    """Raise `UsageError` for arguments that are not text: no broker or storage can store them."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{argument!a} is not UTF-8 text") from None
