"""The command `qtasks`: its options, and what becomes of errors."""

from __future__ import annotations

import click

from qtasks.cli import dead, parts, queues, tasks, work
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


class Root(click.Group):
    """The outermost command."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. An error of ours is one line and an exit code; others are bugs.

        Where other programs have `-A` behind the command, too, ours says where it stands.
        """
        try:
            return super().invoke(ctx)
        except QTasksError as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            click.echo(f"qtasks: {line}", err=True)
            ctx.exit(code_of(error))
        except click.NoSuchOption as error:
            if error.option_name not in ("-A", "--app") or error.ctx is None:
                raise
            command = error.ctx.command_path.removeprefix("qtasks ")
            hint = f"{error.option_name} stands before the command: qtasks -A MODULE:APP {command}"
            raise click.UsageError(hint, error.ctx) from error


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
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
    """Be the command, under one name however it was started."""
    qtasks(prog_name="qtasks")
