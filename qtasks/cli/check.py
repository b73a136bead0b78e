"""The command `check`: whether an app's servers answer, and keep what its tasks require."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from statistics import median
from typing import Any

import click
from msgspec import Struct, field
from msgspec.structs import asdict

from qtasks.app import App
from qtasks.bridge.crossing import block_on, io_thread
from qtasks.cli.output import json_option, print_fields, print_json
from qtasks.cli.session import CONNECT_TIMEOUT, Session, pass_session
from qtasks.client import retrying
from qtasks.client.registry import workers_alive
from qtasks.execution.definition import declared_queues
from qtasks.execution.requires import NOTHING
from qtasks_core import Broker, Guarantees, QueueDepth, Storage, WorkerInfo
from qtasks_core.errors import NotSupported, QTasksError, Unavailable

CALLS = 5
"""How many round trips are measured."""
SKEW = 1.0
"""Seconds by which clocks may differ before that is worth a word."""
NO_TASK = "qtasks-check"
"""The uuid of no task. It is read to measure a round trip."""


class Half(Struct, kw_only=True):
    """What was found out about an app's broker or storage."""

    part: Broker | Storage
    told: Guarantees
    """As long as it was started: some do not know it any more when they are stopped."""
    address: str
    """Its URL without the password; a description if it was given as an object."""
    error: QTasksError | None = None
    """Why it cannot be used."""
    round_trips: list[float] = field(default_factory=list)
    """In seconds."""
    ahead: float | None = None
    """Seconds by which the server's clock is ahead of this machine's. None: it does not tell."""

    def row(self) -> dict[str, Any]:
        """Return what is printed of it in JSON; None is unknown.

        `at_best` and `best_settings` are None if other settings give no more.
        """
        told, known = self.told, self.error is None
        better = known and told.at_best not in (None, told.survives)
        return {
            "part": told.part,
            "address": self.address if "://" in self.address else None,
            "error": None if known else str(self.error),
            "server": told.server if known else None,
            "round_trip_ms": round(1000 * median(self.round_trips), 3)
            if self.round_trips
            else None,
            "clock_ahead": None if self.ahead is None else round(self.ahead, 3),
            "survives": told.survives if known else None,
            "durability": told.durability if known else None,
            "at_best": told.at_best if better else None,
            "best_settings": told.best_settings if better else None,
        }


class Checked(Struct, kw_only=True):
    """What was found out about an app's servers."""

    broker: Half
    storage: Half
    unmet: list[str] = field(default_factory=list)
    """What the app or its tasks require, and the broker or the storage does not guarantee."""
    workers: list[WorkerInfo] | None = None
    """The workers that are alive. None: the storage does not tell."""
    queues: dict[str, QueueDepth | None] = field(default_factory=dict)
    """None: the broker does not tell."""

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.broker, self.storage

    @property
    def problems(self) -> list[str]:
        """Why the app does not work on these servers."""
        errors = (str(half.error) for half in self.halves if half.error is not None)
        return [*dict.fromkeys(errors), *self.unmet]

    @property
    def code(self) -> int:
        """The exit code of the command."""
        if any(isinstance(half.error, Unavailable) for half in self.halves):
            return 3
        return 2 if self.problems else 0

    def advice(self) -> list[str]:
        """Return what could be better, though the app works."""
        lines = [line for half in self.halves if half.error is None for line in half.told.advice]
        lines += [skewed for half in self.halves if (skewed := _skew(half.ahead)) is not None]
        lines += self._left_alone()
        return list(dict.fromkeys(lines))

    def _left_alone(self) -> Iterator[str]:
        """Yield the queues with tasks from which no worker receives."""
        if self.workers is None:
            return
        received = {queue for worker in self.workers for queue in worker.queues}
        for queue, depth in self.queues.items():
            waiting = 0 if depth is None else (depth.ready or 0) + (depth.delayed or 0)
            if waiting and queue not in received:
                tasks = "1 task" if waiting == 1 else f"{waiting} tasks"
                yield f"the queue {queue!r} has {tasks}, and no worker receives from it"


@click.command()
@json_option
@pass_session
@click.pass_context
def check(context: click.Context, session: Session, as_json: bool) -> None:
    """Check that the app's servers answer, and keep what its tasks require.

    Exits with 2 if a requirement is not met or the configuration is wrong, and with 3 if a server
    cannot be reached. Advice does not change the exit code.
    """
    app = session.quiet()
    found: Checked = block_on(io_thread().ask, partial(look, app))
    if as_json:
        print_json(_document(found))
    else:
        _print(found)
    context.exit(found.code)


async def look(app: App) -> Checked:
    """Connect the broker and the storage of an app that is not started, and look at both.

    Each is looked at even if the other one does not answer.
    """
    addresses = app.addresses()
    told = app.guarantees()
    broker = Half(part=app.broker, told=told[0], address=addresses[0])
    storage = Half(part=app.storage, told=told[1], address=addresses[1])
    found = Checked(broker=broker, storage=storage)
    loggers = {*app.broker.driver_loggers, *app.storage.driver_loggers}
    retrying.quiet_drivers(loggers)
    try:
        async with asyncio.TaskGroup() as group:
            for half in found.halves:
                group.create_task(_start(half, app.name))
        retrying.quiet_late_loggers()
        if storage.error is None:
            await _tried(storage, _look_for_workers(found, app.storage))
        if broker.error is None:
            await _tried(broker, _look_into_queues(found, app))
        for half in found.halves:
            if half.error is None:
                await _tried(half, _measure(half))
                half.told = half.part.guarantees
        if broker.error is None and storage.error is None:
            found.unmet = [
                f"{', '.join(names)} requires {each}"
                for each, names in app.unmet(app.definitions.values()).items()
            ]
        elif _requiring(app):
            found.unmet = [f"not compared with the servers: requires= of {_requiring(app)}"]
        return found
    finally:
        try:
            await app.broker.stop()
        finally:
            try:
                await app.storage.stop()
            finally:
                retrying.release_drivers(loggers)


def _requiring(app: App) -> str:
    """Return the names of those that require something."""
    asking = [("the app", app.requires)]
    asking += [(name, known.options.requires) for name, known in app.definitions.items()]
    return ", ".join(name for name, requires in asking if requires != NOTHING)


async def _start(half: Half, name: str) -> None:
    deadline = asyncio.get_running_loop().time() + CONNECT_TIMEOUT
    await _tried(half, retrying.retry(partial(half.part.start, name), deadline=deadline))


async def _tried(half: Half, call: Awaitable[None]) -> None:
    """Await a call to a server. If it fails, that is what there is to say of this half."""
    try:
        await call
    except QTasksError as error:
        half.error = error


async def _look_for_workers(found: Checked, storage: Storage) -> None:
    with suppress(NotSupported):
        found.workers = await workers_alive(storage)


async def _look_into_queues(found: Checked, app: App) -> None:
    names = declared_queues(app.definitions.values())
    names.update(*(worker.queues for worker in found.workers or ()))
    for name in sorted(names):
        found.queues[name] = None
        with suppress(NotSupported):
            found.queues[name] = await app.broker.depth(name)


async def _measure(half: Half) -> None:
    """Measure some round trips, and how far the server's clock is ahead."""
    ask = _question(half.part)
    for _ in range(CALLS):
        before, began = time.time(), time.perf_counter()
        told = await half.part.clock()
        took = time.perf_counter() - began
        if told is None:
            began = time.perf_counter()
            await ask()
            took = time.perf_counter() - began
        elif took <= min(half.round_trips, default=took):
            # The fastest answer tells the most: its sending took part of this time.
            half.ahead = told - (before + took / 2)
        half.round_trips.append(took)


def _question(part: Broker | Storage) -> Callable[[], Awaitable[object]]:
    """Return a call for a server that does not tell its time."""
    if isinstance(part, Storage):
        return partial(part.get, [NO_TASK])
    return partial(part.depth, "default")


def _skew(ahead: float | None) -> str | None:
    """Return what a difference between two clocks means, if it is large."""
    if ahead is None or abs(ahead) < SKEW:
        return None
    side = "behind" if ahead > 0 else "ahead of"
    return (
        f"this machine's clock is {abs(ahead):.1f} s {side} the server's: the times in records and "
        "the list of workers are by the clocks of the machines, expires= is by the server's; "
        "synchronise the clocks (NTP)"
    )


def _document(found: Checked) -> dict[str, object]:
    """Return the whole result, as it is printed in JSON."""
    return {
        "exit_code": found.code,
        "broker": found.broker.row(),
        "storage": found.storage.row(),
        "workers": None if found.workers is None else len(found.workers),
        "queues": [
            {"queue": name, **asdict(depth or QueueDepth())} for name, depth in found.queues.items()
        ],
        "problems": found.problems,
        "advice": found.advice(),
    }


def _print(found: Checked) -> None:
    """Print the result for people."""
    for title, half in zip(("broker", "storage"), found.halves, strict=True):
        print_fields({title: half.told.part, **_fields(half.row())}, False)
        click.echo()
    workers = "unknown" if found.workers is None else len(found.workers) or "none"
    print_fields({"workers": str(workers), "queues": tuple(found.queues)}, False)
    click.echo()
    for problem in found.problems:
        click.echo(f"problem: {problem}")
    advice = found.advice()
    for line in advice:
        click.echo(f"advice: {line}")
    if not (found.problems or advice):
        click.echo("all is well")


def _fields(row: dict[str, Any]) -> dict[str, str | None]:
    """Return what is printed of a half below its class. Its error is one of the problems."""
    took, ahead = row["round_trip_ms"], row["clock_ahead"]
    side = "ahead of" if ahead and ahead > 0 else "behind"
    return {
        "address": row["address"],
        "server": row["server"],
        "round trip": None if took is None else f"{took:g} ms",
        "clock": None if ahead is None else f"{abs(ahead):g} s {side} this machine's",
        "survives": row["survives"],
        "because": row["durability"],
        "better": f"{row['at_best']}, with {row['best_settings']}" if row["at_best"] else None,
    }
