"""Testers: they isolate an app for one test, and run what it has enqueued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Thread
from typing import Any, Protocol, Self, runtime_checkable
from uuid import uuid4

from qtasks.app import App
from qtasks.bridge.crossing import IOThread, Reply, io_thread
from qtasks.client.lifecycle import START_TIMEOUT
from qtasks.declare.handle import BlockingTask, Task
from qtasks.declare.tasks import BaseTask
from qtasks.execution.definition import TaskDefinition, declared_queues
from qtasks.testing.caller import CallerExecutor
from qtasks.testing.enqueued import Enqueued, Question, call_of
from qtasks.testing.observed import Ledger, ObservedBroker, Round
from qtasks.worker.hosted import App as HostedApp
from qtasks.worker.hosted import WorkerOptions, working
from qtasks_core import Broker, Guarantees, Plugin, schemas
from qtasks_core.errors import NotSupported, TaskFailed, UnknownTask
from qtasks_core.lookup import resolve_broker, resolve_storage

AnyTask = BaseTask[Any, Any, Any, Any]
_NAME = 80
"""Most characters of an app's name that are kept in front of a unique suffix."""


@runtime_checkable
class Simulated(Protocol):
    """A broker whose clock a test moves. The memory broker is one."""

    def travel(self, seconds: float) -> float:
        """Stop the clock, and move it ahead. Return the time at which it stands, in seconds."""

    def forget(self) -> None:
        """Drop everything that was stored."""


class Tester:
    """An app that is isolated while a block runs, and what it has enqueued meanwhile.

    In the block, the app has a new broker and a new storage, by default in memory, and a name that
    no other test uses. It is started. At the end of the block it is stopped and has its own name,
    broker and storage again. A server that these name is never used.

    `app`: it must not be started yet.
    `url`: the broker's URL. `storage_url`: the storage's URL, by default the same.
    """

    def __init__(self, app: App, url: str = "memory://", storage_url: str | None = None) -> None:
        self.app = app
        self._broker: Broker = resolve_broker(url)
        self._storage = resolve_storage(url if storage_url is None else storage_url)
        self._stands_at = 0.0
        """The time of a simulated clock."""
        simulated = isinstance(self._broker, Simulated)
        self._ledger = Ledger((lambda: self._stands_at) if simulated else time.monotonic)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        name = f"{self.app.name[:_NAME]}-{uuid4().hex[:12]}"
        broker = ObservedBroker(self._broker, self._ledger)
        with ExitStack() as stack:
            stack.enter_context(self.app.replaced(broker, self._storage, name))
            self.app.connect(START_TIMEOUT).result()
            _on_io_thread(self._prepare)
            if isinstance(self._broker, Simulated):
                stack.callback(_on_io_thread, self._broker.forget)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _prepare(self) -> None:
        # `travel` moves the clock.
        self.app.client.clock.fresh = 0.0
        if isinstance(self._broker, Simulated):
            self._stands_at = self._broker.travel(0.0)

    def enqueued(
        self,
        task: AnyTask | str | None = None,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        queue: str | None = None,
        priority: int | None = None,
        delay: float | None = None,
        key: str | None = None,
    ) -> Enqueued:
        """Return the calls that were enqueued since the block began, in order.

            assert tester.enqueued(send_mail, args=["ann@example.com"], delay=60)
            [call] = tester.enqueued(send_mail)

        Each argument narrows the answer: `task` (or its name), the options of `add_task`, and
        `args` and `kwargs`, which are compared as the function receives them. So defaults count,
        and it makes no difference whether an argument was passed by name. `delay` is in seconds,
        compared to the millisecond. `key` needs `task`.

        Calls stay in the answer after they have run. Retries are not in it, and neither are calls
        whose key another task had.

        Raises `TypeError` if `args` and `kwargs` do not fit the task.
        """
        name = task.name if isinstance(task, BaseTask) else task
        if key is not None and name is None:
            raise TypeError("key= needs the task: a key belongs to one task")
        definition = task.definition if isinstance(task, BaseTask) else None
        question = Question(
            definition=definition or self.app.definitions.get(name or ""),
            task_name=name,
            args=args,
            kwargs=kwargs,
            queue=queue,
            priority=priority,
            delay=delay,
            uuid=None if key is None or name is None else self.app.uuid_of(name, key),
        )
        if self._ledger.undecided:
            io_thread().ask(self._ledger.look_at_transactions, self._storage).result()
        calls = [call_of(message, self.app) for message in list(self._ledger.enqueued)]
        return Enqueued([call for call in calls if question.fits(call)], calls)

    def travel(self, seconds: float) -> None:
        """Move the clock ahead: of delays, retries, `expires=`, leases and retention.

            await reminder.add_task(delay=3600)
            tester.travel(3600)
            await tester.drain()

        It runs nothing. Between two calls the clock stands still, however long the test takes. Only
        QTasks uses this clock: `time.time()` in your own code does not change.

        Raises `NotSupported` unless the broker is in memory: a server's clock cannot be moved.
        """
        if not seconds >= 0:
            raise ValueError(f"travel({seconds}): the clock only goes ahead")
        broker = self._broker
        if not isinstance(broker, Simulated):
            raise NotSupported(
                f"{broker.guarantees.part} has the clock of its server, which a test cannot move; "
                "travel() needs the memory broker"
            )

        def move() -> None:
            self._stands_at = broker.travel(seconds)

        _on_io_thread(move)

    async def _run(self, app: HostedApp, runs: int | None, concurrency: int) -> list[schemas.Task]:
        """Run what is due, at most `runs` tasks. Return the record of each run."""
        thread = io_thread()
        records: list[schemas.Task] = []
        received: set[str] = set()
        while runs is None or len(records) < runs:
            left = None if runs is None else runs - len(records)
            round = await thread.run(self._open_round, left, concurrency)
            if round is None:
                break
            try:
                await _work(app, thread, round, concurrency)
            finally:
                await thread.run(self._close_round, round)
            records += round.records
            received |= round.received
        if unknown := received - app.definitions.keys():
            names = ", ".join(sorted(unknown))
            raise UnknownTask(
                f"the app {self.app.name!r} knows no task {names}: include its router before the "
                "test, or do not drain the tasks of another program"
            )
        return records

    async def _open_round(self, runs: int | None, concurrency: int) -> Round | None:
        await self._ledger.look_at_transactions(self._storage)
        due = {message.queue for message in self._ledger.due()}
        if not due:
            return None
        declared = declared_queues(self.app.definitions.values())
        self._ledger.round = Round(self._ledger, {*due, *declared}, runs, concurrency)
        return self._ledger.round

    async def _close_round(self, round: Round) -> None:
        round.over.set()
        self._ledger.round = None


class AsyncTester(Tester):
    """Isolates an app for one async test, and runs its tasks on the loop of the test.

        from qtasks.testing import AsyncTester

        async def test_order() -> None:
            with AsyncTester(app) as tester:
                await place_order("tea")
                assert tester.enqueued(send_mail, args=["ann@example.com"])
                await tester.drain()

    `app`: async or blocking; it must not be started yet. In the block it has a new broker, a new
    storage and another name, and is started.
    `url`: the broker's URL, by default in memory. `storage_url`: by default the same.

    Raises `ConfigurationError` if the app is started, and `Unavailable` if a server does not answer
    within 10 seconds.
    """

    async def run_one(self, *, check: bool = True) -> Task[Any] | None:
        """Run the next due task once, and return it. Return None if none is due.

        It takes the queue of the due task that was enqueued first. In a queue, a higher priority
        goes first. Raises the errors of `drain`.
        """
        records = await self._run(self.app, 1, 1)
        _check(records, check)
        return self._handle(records[0]) if records else None

    async def drain(self, *, concurrency: int = 1, check: bool = True) -> list[Task[Any]]:
        """Run tasks until none is due, and return them in the order in which they finished.

            [sent] = await tester.drain()
            assert sent.returning == "250 OK"

        It runs what the tasks enqueue too. It waits for no delay: what is not due stays for after
        `travel`. A task that was retried is in the answer once for each run.

        A worker runs them as in production: arguments are encoded and decoded, plugins and retries
        apply, results are recorded. Async functions run on this loop, plain ones in threads.

        `concurrency`: how many tasks run at the same time. With 1 the order is always the same. A
        task that waits for the result of another needs 2.
        `check`: raise `TaskFailed` if a task finished in `error`. It is raised at the end, for the
        first such task; the message has the traceback. With `check=False` look at `status` and
        `error` of the returned tasks.

        Raises `UnknownTask` if a task is due that the app does not know.
        """
        records = await self._run(self.app, None, concurrency)
        _check(records, check)
        return [self._handle(record) for record in records]

    def _handle(self, record: schemas.Task) -> Task[Any]:
        return Task(self.app, record, self.app.decoder_of(record))


class SyncTester(Tester):
    """Isolates an app for one blocking test, and runs its tasks for the test.

        from qtasks.testing import SyncTester

        def test_order() -> None:
            with SyncTester(app) as tester:
                place_order("tea")
                assert tester.enqueued(send_mail, args=["ann@example.com"])
                tester.drain()

    `app`: blocking or async, for example that of an async API; it must not be started yet. In the
    block it has a new broker, a new storage and another name, and is started.
    `url`: the broker's URL, by default in memory. `storage_url`: by default the same.

    Raises `ConfigurationError` if the app is started, and `Unavailable` if a server does not answer
    within 10 seconds.
    """

    def run_one(self, *, check: bool = True) -> BlockingTask[Any] | None:
        """Run the next due task once, and return it. Return None if none is due.

        It takes the queue of the due task that was enqueued first. In a queue, a higher priority
        goes first. Raises the errors of `drain`.
        """
        records = self._serve(1, 1)
        _check(records, check)
        return self._handle(records[0]) if records else None

    def drain(self, *, concurrency: int = 1, check: bool = True) -> list[BlockingTask[Any]]:
        """Run tasks until none is due, and return them in the order in which they finished.

            [sent] = tester.drain()
            assert sent.returning == "250 OK"

        It runs what the tasks enqueue too. It waits for no delay: what is not due stays for after
        `travel`. A task that was retried is in the answer once for each run.

        A worker runs them as in production: arguments are encoded and decoded, plugins and retries
        apply, results are recorded. Plain functions run in the thread of the test, so they see its
        database transaction. Async functions run on a loop in another thread.

        `concurrency`: how many async functions run at the same time. With 1 the order is always the
        same. An async task that waits for the result of another needs 2.
        `check`: raise `TaskFailed` if a task finished in `error`. It is raised at the end, for the
        first such task; the message has the traceback. With `check=False` look at `status` and
        `error` of the returned tasks.

        Raises `UnknownTask` if a task is due that the app does not know, and `RuntimeError` inside
        a running event loop.
        """
        records = self._serve(None, concurrency)
        _check(records, check)
        return [self._handle(record) for record in records]

    @contextmanager
    def worker(self, *, concurrency: int = 100) -> Iterator[None]:
        """Run a worker in another thread while the block runs, for code that waits for results.

            with tester.worker():
                assert client.get("/sum").json() == 3  # calls add_task(…, timeout=10)

        `concurrency`: most tasks that run at the same time. Plain functions run in threads.
        """
        started: Reply[None] = Reply()
        stop: Reply[None] = Reply()
        ended: Reply[None] = Reply()

        async def work() -> None:
            options = WorkerOptions(concurrency=concurrency, grace=0.0)
            async with working(self.app, options):
                started.set(None)
                await stop

        def run() -> None:
            try:
                asyncio.run(work())
            except BaseException as error:  # noqa: BLE001  # raised in the thread of the test
                started.fail(error)
                ended.fail(error)
            else:
                ended.set(None)

        thread = Thread(target=run, name="qtasks-tester", daemon=True)
        thread.start()
        started.result()
        try:
            yield
        finally:
            stop.set(None)
            thread.join()
        ended.result()

    def _serve(self, runs: int | None, concurrency: int) -> list[schemas.Task]:
        _refuse_running_loop()
        caller = CallerExecutor()
        hosted = _Hosted(self.app, caller.bound(self.app.definitions))
        return caller.serve(partial(self._run, hosted, runs, concurrency))

    def _handle(self, record: schemas.Task) -> BlockingTask[Any]:
        return BlockingTask(self.app, record, self.app.decoder_of(record))


class _Hosted:
    """An app with other definitions, as far as a worker needs it."""

    def __init__(self, app: App, definitions: dict[str, TaskDefinition]) -> None:
        self.name = app.name
        self.max_payload = app.max_payload
        self.plugins: tuple[Plugin, ...] = app.plugins
        self.definitions = definitions
        self.ready = app.ready
        self.start_async = app.start_async
        self.stop_async = app.stop_async
        self.guarantees: Callable[[], tuple[Guarantees, Guarantees]] = app.guarantees


async def _work(app: HostedApp, thread: IOThread, round: Round, concurrency: int) -> None:
    """Run a worker until the round is over. Raises the error with which the worker failed."""
    options = WorkerOptions(queues=tuple(round.queues), concurrency=concurrency, grace=0.0)
    async with working(app, options) as running:
        over = asyncio.create_task(thread.run(round.over.wait))
        try:
            await asyncio.wait({over, running.failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()


def _check(records: Sequence[schemas.Task], check: bool) -> None:
    """Raise the error of the first task that finished in `error`."""
    failed = [record for record in records if record.status == "error"]
    if not check or not failed:
        return
    error = TaskFailed(failed[0])
    for other in failed[1:]:
        error.add_note(f"also failed: task {other.task_name} {other.uuid}: {other.error}")
    raise error


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError("SyncTester in an async test would stop its loop; use AsyncTester")


def _on_io_thread(call: Callable[[], None]) -> None:
    async def make() -> None:
        call()

    io_thread().ask(make).result()
