"""The command `run`: a worker."""

from __future__ import annotations

import logging

import click

from qtasks.cli.output import json_option
from qtasks.cli.session import Session, include_option, pass_session, split
from qtasks_core.errors import ConfigurationError

_MIB = 1024 * 1024


@click.command()
@click.option("--queues", metavar="A,B", help="The queues. Default: those of the app's tasks.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Tasks that one process runs at once.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running tasks have to finish when the worker stops.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Worker processes to supervise and restart. Default: this process is the worker.",
)
@click.option("--max-tasks", type=click.IntRange(min=1), help="Tasks after which a worker exits.")
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Resident memory at which a worker exits. With --processes, another one follows.",
)
@click.option(
    "--health-port",
    type=click.IntRange(1, 65535),
    help="Answer /live and /ready over HTTP on this port.",
)
@click.option(
    "--health-host",
    default="127.0.0.1",
    show_default=True,
    help="The address for the health port; 0.0.0.0 in a container.",
)
@click.option("--reload", is_flag=True, help="Restart when a source file changes.")
@include_option
@json_option
@pass_session
def run(
    session: Session,
    queues: str | None,
    concurrency: int,
    grace: float,
    processes: int | None,
    max_tasks: int | None,
    max_memory: int | None,
    health_port: int | None,
    health_host: str,
    reload: bool,
    include: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run tasks until SIGTERM or SIGINT.

    A second signal puts running tasks back into their queues at once.
    """
    if session.log_level is None and (reload or as_json):
        logging.getLogger("qtasks").setLevel(logging.INFO)
    if session.json_log is not None:
        session.json_log.print_at_once()
    if reload:
        from qtasks.cli.reload import run_reloading

        logging.basicConfig(format="qtasks: %(message)s")
        run_reloading([name.partition(":")[0] for name in (session.path or "", *include) if name])
    app = session.app(include)
    if not app.definitions:
        raise ConfigurationError(
            "the app has no tasks to run: name your app with -A module:app, "
            "or modules with routers with --include"
        )
    app.run_forever(
        queues=split(queues) or None,
        concurrency=concurrency,
        grace=grace,
        processes=processes,
        max_tasks=max_tasks,
        max_memory=max_memory * _MIB if max_memory is not None else None,
        health_port=health_port,
        health_host=health_host,
    )
