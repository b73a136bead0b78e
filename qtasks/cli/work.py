"""The command that is a worker."""

from __future__ import annotations

import click

from qtasks.cli.session import Session, include_option, pass_session, split
from qtasks_core.errors import ConfigurationError


@click.command()
@click.option("--queues", metavar="A,B", help="Default: those of the app's tasks.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Tasks at once in a process.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running tasks have at a stop.",
)
@click.option("--reload", is_flag=True, help="Restart when a source file changes.")
@include_option
@pass_session
def run(
    session: Session,
    queues: str | None,
    concurrency: int,
    grace: float,
    reload: bool,
    include: tuple[str, ...],
) -> None:
    """Run tasks until SIGTERM or SIGINT; a second signal gives running tasks back at once."""
    if reload:
        from qtasks.cli.reload import run_reloading

        run_reloading([name.partition(":")[0] for name in (session.path or "", *include) if name])
    app = session.app(include)
    if not app.definitions:
        raise ConfigurationError(
            "no task is known that a worker could run: name the app by -A module:app, "
            "or modules with routers by --include"
        )
    app.run_forever(queues=split(queues) or None, concurrency=concurrency, grace=grace)
