"""An app: a name, a broker, a storage and the tasks it knows. Both faces stand on it."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any
from uuid import UUID

from uuid_utils import uuid7

from qtasks.balancers import Greedy
from qtasks.definition import TaskDefinition
from qtasks.engine.client import Client
from qtasks.engine.io_thread import IOThread, io_thread, refuse_running_loop
from qtasks.engine.reply import LoopReply, ThreadReply
from qtasks.engine.runner import Runner
from qtasks.engine.worker import Worker
from qtasks.serializers import MsgpackSerializer
from qtasks_core import Balancer, Broker, Guarantees, Storage, TaskMessage, schemas
from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    PayloadTooLarge,
    TaskTimeout,
    Unavailable,
    UnknownTask,
)
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_core.separate import record_of

logger = logging.getLogger("qtasks")

PUBLISH_TIMEOUT = 30.0
"""Seconds after which a write that is not confirmed is an error, where no timeout is given."""
START_TIMEOUT = 10.0
"""Seconds in which the parts have to be reached when an app is entered."""
MAX_PAYLOAD = 1024 * 1024
"""Bytes of arguments a message may carry, unless the app says otherwise."""
_LOOK = 1.0
"""Seconds in which what is known of a late task is looked up."""


class _Entry:
    """One start of an app, while it is under way and after."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.counted = False


class App:
    """Parts, a registry of tasks, and one client on the I/O thread while it is started.

    `broker` and `storage` are parts or URLs. A broker's URL without a storage uses both halves of
    that backend. Without arguments the environment counts (`QTASKS_NAME`, `QTASKS_BROKER_URL`,
    `QTASKS_STORAGE_URL`), else the embedded default. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        name: str | None = None,
        broker: Broker | str | None = None,
        storage: Storage | str | None = None,
        *,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.name = name or os.environ.get("QTASKS_NAME") or "qtasks"
        self._given = _given(broker, storage)
        self.broker, self.storage = _built(*self._given)
        self.max_payload = max_payload
        self.definitions: dict[str, TaskDefinition] = {}
        self._entered = 0
        self._client: Client | None = None
        self._thread: IOThread | None = None
        self._changing = asyncio.Lock()
        self._inherited: list[object] = []
        self._closes_itself = False
        self.starts_itself = False
        """Start at first use and close at exit: only the process's default app does."""

    def guarantees(self) -> tuple[Guarantees, Guarantees]:
        """What the broker and the storage promise; complete once the app is started."""
        return self.broker.guarantees, self.storage.guarantees

    def register(self, definition: TaskDefinition) -> None:
        """Make a task known. Raises `ConfigurationError` when its name is taken."""
        known = self.definitions.setdefault(definition.name, definition)
        if known is not definition and known.function is not definition.function:
            raise ConfigurationError(
                f"two functions claim the task name {definition.name!r}: "
                f"{known.function!r} and {definition.function!r}"
            )

    def definition(self, name: str) -> TaskDefinition:
        """Return a known task. Raises `UnknownTask`."""
        if name not in self.definitions:
            raise UnknownTask(f"the app {self.name!r} knows no task {name!r}")
        return self.definitions[name]

    def decoder_of(self, record: schemas.Task) -> Callable[[Any], Any]:
        """Return how the result in a record is decoded: typed where the task is known."""
        known = self.definitions.get(record.task_name)
        return known.decode_result if known is not None else MsgpackSerializer().decoder(Any)

    # -- life ----------------------------------------------------------------------------

    async def start(self, timeout: float = START_TIMEOUT) -> None:
        """Connect both parts; nested starts count. Raises `Unavailable` after `timeout` seconds."""
        thread, entry = self._io(), _Entry()
        try:
            await thread.run(self._start, timeout, entry)
        except asyncio.CancelledError:
            thread.spawn(self._give_up, entry)
            raise

    async def stop(self) -> None:
        """Disconnect with the last of nested stops."""
        await self._io().run(self._stop)

    def start_blocking(self, timeout: float = START_TIMEOUT) -> None:
        """Connect both parts from a thread without a loop."""
        thread, entry = self._io(), _Entry()
        try:
            thread.run_blocking(self._start, timeout, entry)
        except KeyboardInterrupt:
            thread.spawn(self._give_up, entry)
            raise

    def stop_blocking(self) -> None:
        """Disconnect from a thread without a loop."""
        self._io().run_blocking(self._stop)

    def _io(self) -> IOThread:
        """Return the process's I/O thread; in a forked child all that was started is gone."""
        thread = io_thread()
        if thread is not self._thread:
            with _lock:
                if thread is not self._thread:
                    self._renew(thread)
        return thread

    def _renew(self, thread: IOThread) -> None:
        """Begin anew on this process's I/O thread. Raises `Closed` where that cannot be."""
        if self._client is not None:
            if not all(isinstance(given, str) for given in self._given):
                raise Closed(
                    f"the app {self.name!r} was forked while it was started; give its parts as "
                    "URLs, from which a child builds its own, or fork before the app is used"
                )
            # Kept for ever: even to close them would disturb the parent's connections.
            self._inherited += (self._client, self.broker, self.storage)
            self.broker, self.storage = _built(*self._given)
        self._client, self._entered, self._changing = None, 0, asyncio.Lock()
        self._thread = thread

    async def _start(self, timeout: float, entry: _Entry) -> None:
        entry.task = asyncio.current_task()
        async with self._changing:
            if self._client is None:
                client = Client(self.name, self.broker, self.storage)
                await client.start(asyncio.get_running_loop().time() + timeout)
                self._client = client
            self._entered += 1
            entry.counted = True

    async def _give_up(self, entry: _Entry) -> None:
        """Take back a start whose caller does not wait for it any more."""
        if entry.counted:
            await self._stop()
        elif entry.task is not None:
            entry.task.cancel()

    async def _stop(self) -> None:
        async with self._changing:
            if self._entered == 0:
                # A forked child leaves a block that its parent has entered.
                return
            self._entered -= 1
            if self._entered == 0 and self._client is not None:
                client, self._client = self._client, None
                await client.stop()

    @property
    def client(self) -> Client:
        """The engine's client while the app is started; it lives on the I/O thread."""
        client = self._client_now()[1]
        if client is None:
            raise self._not_started()
        return client

    def _client_now(self) -> tuple[IOThread, Client | None]:
        return self._io(), self._client

    async def _ready(self) -> tuple[IOThread, Client]:
        thread, client = self._client_now()
        if client is None and self.starts_itself:
            await self.start()
            self._close_with_process()
            thread, client = self._client_now()
        if client is None:
            raise self._not_started()
        return thread, client

    def _ready_blocking(self) -> tuple[IOThread, Client]:
        refuse_running_loop()
        thread, client = self._client_now()
        if client is None and self.starts_itself:
            self.start_blocking()
            self._close_with_process()
            thread, client = self._client_now()
        if client is None:
            raise self._not_started()
        return thread, client

    def _not_started(self) -> Closed:
        return Closed(
            f"the app {self.name!r} is not started; use it inside 'async with app:' "
            "(or 'with app:'), or in a task that its worker runs"
        )

    def _close_with_process(self) -> None:
        with _lock:
            if not self._closes_itself:
                # Before `atexit`, when threads that parts work in have been ended already.
                register = getattr(threading, "_register_atexit", atexit.register)
                register(self._close_at_exit)
                self._closes_itself = True

    def _close_at_exit(self) -> None:
        # Not in a child that was forked since: it has nothing to close.
        thread, client = self._thread, self._client
        if thread is not None and client is not None and thread.pid == os.getpid():
            thread.run_blocking(self._stop)

    # -- submitting and waiting ----------------------------------------------------------

    def message(
        self,
        definition: TaskDefinition,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        queue: str | None = None,
        priority: int | None = None,
        delay: float | None = None,
        eta: datetime | None = None,
    ) -> TaskMessage:
        """Return the message of a call.

        Raises `SignatureMismatch`, `SerializationError`, `PayloadTooLarge`, `ConfigurationError`.
        """
        encoded_args, encoded_kwargs = definition.encode(args, kwargs)
        size = len(encoded_args) + len(encoded_kwargs)
        if size > self.max_payload:
            raise PayloadTooLarge(
                f"{definition.name}: the arguments take {size} bytes, the limit is "
                f"{self.max_payload}; pass a reference, or raise max_payload of the app"
            )
        options = definition.options
        now = time.time()
        message = TaskMessage(
            uuid=str(uuid7()),
            task_name=definition.name,
            queue=queue or options.queue,
            args=encoded_args,
            kwargs=encoded_kwargs,
            encoding=definition.serializer.name,
            priority=options.priority if priority is None else priority,
            delay=_delay(delay, eta, now),
            created_at=now,
            store_result=options.store_result,
            retention=options.retention,
        )
        if not 0 <= message.priority <= 9:
            raise ConfigurationError(f"priority={priority} is not between 0 and 9")
        return message

    async def submit(self, message: TaskMessage, timeout: float | None) -> schemas.Task:
        """Submit a message; with `timeout` (seconds) wait for its end, else for the write.

        Raises `TaskTimeout`, `Unavailable`, `Refused`.
        """
        thread, client = await self._ready()
        reply: LoopReply[schemas.Task | None] = LoopReply()
        deadline = time.monotonic() + (PUBLISH_TIMEOUT if timeout is None else timeout)
        thread.post(client.submit, message, deadline, timeout is not None, reply)
        return await self._ended(client, message.uuid, reply, timeout) or record_of(message)

    def submit_blocking(self, message: TaskMessage, timeout: float | None) -> schemas.Task:
        """Do as `submit`, from a thread without a loop."""
        thread, client = self._ready_blocking()
        reply: ThreadReply[schemas.Task | None] = ThreadReply()
        deadline = time.monotonic() + (PUBLISH_TIMEOUT if timeout is None else timeout)
        thread.post(client.submit, message, deadline, timeout is not None, reply)
        found = self._ended_blocking(client, message.uuid, reply, timeout)
        return found or record_of(message)

    async def submit_all(self, messages: Sequence[TaskMessage]) -> list[schemas.Task]:
        """Submit many messages. Raises the first error after all of them had an answer."""
        thread, client = await self._ready()
        if messages:
            await thread.ask(client.submit_all, messages, time.monotonic() + PUBLISH_TIMEOUT)
        return [record_of(message) for message in messages]

    def submit_all_blocking(self, messages: Sequence[TaskMessage]) -> list[schemas.Task]:
        """Do as `submit_all`, from a thread without a loop."""
        thread, client = self._ready_blocking()
        if messages:
            deadline = time.monotonic() + PUBLISH_TIMEOUT
            thread.ask_blocking(client.submit_all, messages, deadline)
        return [record_of(message) for message in messages]

    async def wait(self, uuid: str, timeout: float | None) -> schemas.Task:
        """Return the final record of any task, once there is one. Raises `TaskTimeout`."""
        thread, client = await self._ready()
        reply: LoopReply[schemas.Task | None] = LoopReply()
        thread.post(client.wait, uuid, reply)
        return _there(await self._ended(client, uuid, reply, timeout))

    def wait_blocking(self, uuid: str, timeout: float | None) -> schemas.Task:
        """Do as `wait`, from a thread without a loop."""
        thread, client = self._ready_blocking()
        reply: ThreadReply[schemas.Task | None] = ThreadReply()
        thread.post(client.wait, uuid, reply)
        return _there(self._ended_blocking(client, uuid, reply, timeout))

    async def get(self, uuid: str | UUID) -> schemas.Task | None:
        """Return the newest record of a task, None where there is none."""
        thread, client = await self._ready()
        return (await thread.run(client.get, [str(uuid)], time.monotonic() + START_TIMEOUT))[0]

    def get_blocking(self, uuid: str | UUID) -> schemas.Task | None:
        """Do as `get`, from a thread without a loop."""
        thread, client = self._ready_blocking()
        deadline = time.monotonic() + START_TIMEOUT
        return thread.run_blocking(client.get, [str(uuid)], deadline)[0]

    async def _ended(
        self,
        client: Client,
        uuid: str,
        reply: LoopReply[schemas.Task | None],
        timeout: float | None,
    ) -> schemas.Task | None:
        """Await a reply; past the timeout take the wait back and say what is known."""
        try:
            async with asyncio.timeout(timeout):
                return await reply.future
        except TimeoutError:
            self._io().post(client.forget, uuid, reply)
        except asyncio.CancelledError:
            self._io().post(client.forget, uuid, reply)
            raise
        raise _late(uuid, timeout, await self._io().run(_known, client, uuid))

    def _ended_blocking(
        self,
        client: Client,
        uuid: str,
        reply: ThreadReply[schemas.Task | None],
        timeout: float | None,
    ) -> schemas.Task | None:
        try:
            return reply.result(timeout)
        except TimeoutError:
            self._io().post(client.forget, uuid, reply)
        except KeyboardInterrupt:
            self._io().post(client.forget, uuid, reply)
            raise
        raise _late(uuid, timeout, self._io().run_blocking(_known, client, uuid))

    # -- working -------------------------------------------------------------------------

    @asynccontextmanager
    async def worker(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int = 100,
        grace: float | None = 30.0,
        balancer: Balancer | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> AsyncIterator[RunningWorker]:
        """Run a worker on this loop while the block runs.

        `queues`: those of the known tasks by default. At the end it stops receiving, lets running
        tasks finish for `grace` seconds (None: for ever) and gives the rest back.
        """
        await self.start(start_timeout)
        try:
            runner = Runner(self.definitions, concurrency)
            try:
                async with self._working(runner, queues, concurrency, balancer, grace) as running:
                    yield running
            finally:
                runner.stop()
        finally:
            await self.stop()

    @asynccontextmanager
    async def _working(
        self,
        runner: Runner,
        queues: Iterable[str] | None,
        concurrency: int,
        balancer: Balancer | None,
        grace: float | None,
    ) -> AsyncIterator[RunningWorker]:
        thread, client = await self._ready()
        names = sorted(queues or {"default", *(d.options.queue for d in self.definitions.values())})

        async def build() -> Worker:
            known = self.definitions.keys()
            return Worker(client, runner, known, names, concurrency, balancer or Greedy())

        worker = await thread.run(build)
        for part in self.guarantees():
            logger.info("%s", describe(part))
        logger.info(
            "worker %s of %r: queues %s, %d tasks at once, knows %s",
            worker.id,
            self.name,
            ", ".join(names),
            concurrency,
            ", ".join(sorted(self.definitions)) or "no task",
        )
        ended = asyncio.create_task(thread.run(worker.run))
        try:
            yield RunningWorker(worker.id, runner, ended)
        finally:
            await thread.run(worker.stop, grace)
            await ended

    def run_forever(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int = 100,
        grace: float | None = 30.0,
        balancer: Balancer | None = None,
    ) -> None:
        """Be a worker process until SIGTERM or SIGINT; a second signal gives running tasks back.

        Waits for servers that are not there yet. Raises `ConfigurationError`.
        """
        refuse_running_loop()
        if not logging.getLogger().handlers:
            # Drivers are only heard when something is wrong.
            logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            logger.setLevel(logging.INFO)
        # The two loops of this process hand over work many times a millisecond; with the
        # default of 5 ms each would wait for the other.
        sys.setswitchinterval(0.0005)
        asyncio.run(self._serve(queues, concurrency, grace, balancer))

    async def _serve(
        self,
        queues: Iterable[str] | None,
        concurrency: int,
        grace: float | None,
        balancer: Balancer | None,
    ) -> None:
        signalled = asyncio.Event()
        on_signal = signalled.set

        def signal_arrived() -> None:
            on_signal()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signal_arrived)
        stopping = asyncio.create_task(signalled.wait())
        starting = asyncio.create_task(self.start(float("inf")))
        await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            logger.info("stopped before the servers could be reached")
            return
        await starting
        try:
            async with self.worker(
                queues=queues, concurrency=concurrency, grace=grace, balancer=balancer
            ) as worker:
                await asyncio.wait({stopping, worker.ended}, return_when=asyncio.FIRST_COMPLETED)
                on_signal = worker.give_back
                logger.info("worker %s stops: running tasks have %s s", worker.id, grace)
        finally:
            stopping.cancel()
            await self.stop()


class RunningWorker:
    """A worker while its block runs."""

    def __init__(self, id: str, runner: Runner, ended: asyncio.Task[None]) -> None:
        self.id = id
        self.ended = ended
        """Done early only if the worker failed."""
        self._runner = runner

    def give_back(self) -> None:
        """Cancel what runs and give it back to the queue at once."""
        self._runner.give_back()


def describe(part: Guarantees) -> str:
    """Return a line for the log: the part, its server, what it survives and why."""
    server = f" on {part.server}" if part.server else ""
    return f"{part.part}{server}: survives {part.survives} ({part.durability})"


async def _known(client: Client, uuid: str) -> schemas.Task | None:
    """Return what is known of a late task; it is not worth waiting long for."""
    try:
        async with asyncio.timeout(_LOOK):
            return (await client.get([uuid], 0.0))[0]
    except (Unavailable, TimeoutError):
        return None


def _late(uuid: str, timeout: float | None, record: schemas.Task | None) -> TaskTimeout:
    if record is None:
        return TaskTimeout(
            f"task {uuid}: no end within {timeout} s, and no record of it can be read"
        )
    begun = {
        "new": "no worker has begun it; does one listen to that queue?",
        "scheduled": "it is not due yet",
        "process": f"worker {record.worker} runs it",
        "retry": f"attempt {record.attempt} failed ({record.error}) and it will run again",
    }
    return TaskTimeout(
        f"task {record.task_name} {uuid} in queue {record.queue!r}: no end within {timeout} s; "
        f"{begun.get(record.status, 'it has just ended')}"
    )


def _there(record: schemas.Task | None) -> schemas.Task:
    if record is None:
        raise Closed("a wait ended without a record")
    return record


def _delay(delay: float | None, eta: datetime | None, now: float) -> float:
    if delay is not None and eta is not None:
        raise ConfigurationError("give delay= or eta=, not both")
    if eta is not None:
        if eta.tzinfo is None:
            raise ConfigurationError("eta= needs a time zone, e.g. datetime.now(UTC)")
        return max(0.0, eta.timestamp() - now)
    return max(0.0, delay or 0.0)


def _given(
    broker: Broker | str | None, storage: Storage | str | None
) -> tuple[Broker | str, Storage | str]:
    """Return what the arguments say of the parts, else the environment, else the default."""
    if broker is None and storage is None:
        broker = os.environ.get("QTASKS_BROKER_URL") or None
        storage = os.environ.get("QTASKS_STORAGE_URL") or None
        if broker is None and storage is None:
            broker = f"sqlite:///{_default_path()}"
            logger.warning("no broker is configured; using the embedded default, %s", broker)
    if broker is None:
        raise ConfigurationError("a storage without a broker: set QTASKS_BROKER_URL, or broker=")
    if storage is None:
        if not isinstance(broker, str):
            raise ConfigurationError(f"{type(broker).__name__} needs storage= beside it")
        storage = broker
    return broker, storage


def _built(broker: Broker | str, storage: Storage | str) -> tuple[Broker, Storage]:
    return (
        resolve_broker(broker) if isinstance(broker, str) else broker,
        resolve_storage(storage) if isinstance(storage, str) else storage,
    )


def _default_path() -> Path:
    """Return the absolute path of the embedded default (XDG base directory specification)."""
    base = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    directory = (Path(base) if base else Path.home() / ".local" / "share") / "qtasks"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "qtasks.db"


_default: App | None = None
_lock = RLock()


def _renew_lock_in_child() -> None:
    # Another thread may have held the lock at the fork, and does not exist in the child.
    global _lock
    _lock = RLock()


os.register_at_fork(after_in_child=_renew_lock_in_child)


def default_app() -> App:
    """Return `QTASKS_APP=module:app`, else the process's default app, which starts by itself."""
    global _default
    with _lock:
        if _default is None:
            named = os.environ.get("QTASKS_APP")
            _default = _import_app(named) if named else App()
            _default.starts_itself = True
        return _default


def _import_app(name: str) -> App:
    module, colon, attribute = name.partition(":")
    try:
        app = getattr(import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"QTASKS_APP={name}: {error}") from error
    if not isinstance(app, App):
        raise ConfigurationError(f"QTASKS_APP={name} does not name an app; write module:app")
    return app
