"""An app: a name, a broker, a storage and its tasks. The async and blocking faces build on it."""

from __future__ import annotations

import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID, uuid5

from qtasks import control
from qtasks.bridge.crossing import IOThread, Reply, io_thread, refuse_running_loop
from qtasks.client.client import Client, Waiter
from qtasks.client.lifecycle import START_TIMEOUT, Life, Lifecycle
from qtasks.client.overdue import LOOK
from qtasks.client.parts import given_parts
from qtasks.client.unsupported import USUAL, Unsupported
from qtasks.codec.serializers import MsgpackSerializer
from qtasks.execution.definition import TaskDefinition, checked_plugins
from qtasks.execution.requires import NOTHING, Requires, Unmet, checked_requires, unmet
from qtasks.worker.hosted import RunningWorker, WorkerOptions, working
from qtasks.worker.process import serve
from qtasks.worker.replacement import replace_failed
from qtasks_core import Balancer, Broker, Plugin, RoutePolicy, Storage, TaskMessage, schemas
from qtasks_core.errors import ConfigurationError, QTasksError, UnknownTask
from qtasks_core.names import checked_name, is_id

logger = logging.getLogger("qtasks")
P = ParamSpec("P")
R = TypeVar("R")

MAX_PAYLOAD = 1024 * 1024
"""Default limit for the encoded arguments of a call, and for a result, in bytes."""
PUBLISH_TIMEOUT = 30.0
"""Seconds to wait for the confirmation of a write if the caller gives no timeout."""
_CHUNK = 10_000
"""Most messages of `submit_all` that share one deadline.

Each chunk has a new deadline, so all messages together may take longer than `PUBLISH_TIMEOUT`.
"""
_KEYED = UUID("2f6d1c0e-8a43-5b7e-9c15-7d0e4b9a6f32")


class App(Lifecycle):
    """A broker, a storage, a registry of tasks, and a client while the app is started.

    The client lives on the I/O thread. A method that crosses to that thread returns a `Reply`:
    `await` it, or call the method by `block_on`.

    `name`: apps with different names share nothing. `qtasks_core.names` says which names are valid.
    `broker` and `storage`: an object or a URL. If you give a broker's URL and no storage, the same
    backend stores the records too. Without arguments, the app reads `QTASKS_NAME`,
    `QTASKS_BROKER_URL` and `QTASKS_STORAGE_URL`. If they are not set either, it uses an embedded
    SQLite file.
    `max_payload`: most bytes of the encoded arguments of a call, and of a result.
    `plugins` run around each task that the app's workers run; the first is the outermost.
    `requires`: what the broker and the storage must guarantee, or the app does not start.

    Raises `ConfigurationError`.
    """

    def __init__(
        self,
        name: str | None = None,
        broker: Broker | str | None = None,
        storage: Storage | str | None = None,
        *,
        max_payload: int = MAX_PAYLOAD,
        plugins: Iterable[Plugin] = (),
        requires: Requires = NOTHING,
    ) -> None:
        of = "an app" if name else "an app (QTASKS_NAME)"
        name = checked_name(name or os.environ.get("QTASKS_NAME") or "qtasks", of)
        super().__init__(name, *given_parts(broker, storage))
        self.max_payload = max_payload
        self.unsupported = Unsupported()
        """Logs, once each, the options that this broker or storage does not support."""
        self.definitions: dict[str, TaskDefinition] = {}
        self.plugins = checked_plugins(plugins)
        self.requires = checked_requires(requires)
        self._requiring = False
        """Whether a task requires anything."""
        self._unmet: frozenset[str] = frozenset()
        """What is required and not guaranteed any more, as it was logged."""

    def add_plugin(self, plugin: Plugin) -> None:
        """Add a plugin. It runs inside the plugins that were added before.

        Workers that already run do not use it. Raises `ConfigurationError` if it is not a plugin.
        """
        self.plugins = (*self.plugins, *checked_plugins([plugin]))

    def register(self, definition: TaskDefinition) -> None:
        """Add a task.

        Raises `ConfigurationError` if another function has the same task name, and if the app is
        started with a broker or storage that does not guarantee what the task requires.
        """
        known = self.definitions.get(definition.name, definition)
        if known is not definition and known.function is not definition.function:
            raise ConfigurationError(
                f"two functions claim the task name {definition.name!r}: "
                f"{known.function!r} and {definition.function!r}"
            )
        if self.started:
            self._refuse_unmet([definition])
        self.definitions[definition.name] = known
        self._requiring |= known.options.requires != NOTHING

    def _check(self) -> None:
        self._refuse_unmet(self.definitions.values())

    def unmet(self, definitions: Iterable[TaskDefinition]) -> dict[Unmet, list[str]]:
        """Return what broker and storage, both started, do not guarantee, and who requires it."""
        told: dict[Unmet, list[str]] = {}
        asking = [("the app", self.requires), *((d.name, d.options.requires) for d in definitions)]
        for name, requires in asking:
            if requires != NOTHING:
                joint = self.broker.join(self.storage) is not None
                for each in unmet(requires, *self.guarantees(), joint):
                    told.setdefault(each, []).append(name)
        return told

    def _refuse_unmet(self, definitions: Iterable[TaskDefinition]) -> None:
        """Raise `ConfigurationError` if broker and storage do not guarantee what is required."""
        if told := self.unmet(definitions):
            raise ConfigurationError(
                f"the app {self.name!r} does not run on these servers: "
                + "; ".join(f"{', '.join(names)} requires {each}" for each, names in told.items())
            )

    def _required(self) -> bool:
        return self._requiring or self.requires != NOTHING

    def _compare(self) -> dict[str, str]:
        told = self.unmet(self.definitions.values())
        missing: dict[str, str] = {}
        for each, names in told.items():
            # What the app requires, it requires for all its tasks.
            for name in self.definitions if "the app" in names else names:
                missing.setdefault(
                    name,
                    f"{name!r} is not enqueued: the servers of the app {self.name!r} have changed "
                    f"since its start. {', '.join(names)} requires {each}",
                )
        unmet = frozenset(f"{', '.join(names)} requires {each}" for each, names in told.items())
        for line in sorted(unmet - self._unmet):
            logger.error(
                "the servers of the app %r have changed: %s. Such tasks are not enqueued any more; "
                "those in the queues still run",
                self.name, line,
            )  # fmt: skip
        if self._unmet and not unmet:
            logger.warning("the servers of the app %r guarantee again what is required", self.name)
        self._unmet = unmet
        return missing

    async def _open(self, life: Life, deadline: float) -> None:
        await super()._open(life, deadline)
        options = {name: known.options for name, known in self.definitions.items()}
        priority = {name for name, asked in options.items() if asked.priority != USUAL}
        retention = {name for name, asked in options.items() if asked.retention is not None}
        if priority or retention:
            self.unsupported.declared(priority, retention, self.broker, self.storage)

    def definition(self, name: str) -> TaskDefinition:
        """Return a registered task. Raises `UnknownTask`."""
        if name not in self.definitions:
            raise UnknownTask(f"the app {self.name!r} knows no task {name!r}")
        return self.definitions[name]

    def decoder_of(self, record: schemas.Task) -> Callable[[Any], Any]:
        """Return the function that decodes the result in a record.

        If the task is registered here, the result has its annotated type. Otherwise it has none.
        """
        known = self.definitions.get(record.task_name)
        return known.decode_result if known is not None else MsgpackSerializer().decoder(Any)

    def uuid_of(self, task_name: str, key: str) -> str:
        """Return the uuid of a task that is enqueued with this `key=`."""
        return str(uuid5(_KEYED, "\0".join((self.name, task_name, key))))

    def routed(self, policy: RoutePolicy, arguments: Mapping[str, Any]) -> str:
        """Return the queue that a policy chooses for a call with these arguments.

        Raises `ConfigurationError` if no worker would receive from it.
        """
        counts, depths = None, {}
        if policy.reads_depths:
            depths = dict.fromkeys(policy.queues, 0)
            thread = io_thread()
            # An app that starts by itself has no client before its first call.
            if (client := self.client_on(thread)) is not None:
                counts, depths = client.depths, client.depths.of(policy.queues, thread)
        queue = policy.choose(arguments, depths)
        if queue not in policy.queues:
            raise ConfigurationError(
                f"{type(policy).__name__} has chosen the queue {queue!r}, which is none of its "
                f"queues: {', '.join(policy.queues)}"
            )
        if counts is not None:
            counts.add(queue)
        return queue

    def submit(self, message: TaskMessage, timeout: float | None) -> Reply[schemas.Task]:
        """Submit a message. With `timeout` (seconds), wait for its final record.

        Without `timeout`, wait until the write is durable, for at most `PUBLISH_TIMEOUT` seconds.
        If another task has the key already, the reply holds the record of that task: the current
        record, or with `timeout` the final one.

        Fails with `TaskTimeout` if the write is durable but the task has not finished in time.
        Fails with `Unavailable` if the write is not confirmed in time, and with `Refused` if the
        broker refuses the message.
        """
        submit = partial(self._submit, message, timeout, _begin(timeout))
        return self._with_client(submit, timeout)

    def _submit(
        self,
        message: TaskMessage,
        timeout: float | None,
        began: float,
        thread: IOThread,
        client: Client,
    ) -> Reply[schemas.Task]:
        if message.priority != USUAL or message.retention is not None:
            self.unsupported.submitted((message,), self.broker, self.storage)
        if timeout is None:
            reply: Reply[schemas.Task] = Reply()
            thread.post(client.submit, message, began + PUBLISH_TIMEOUT, reply)
            return reply
        waiter = Waiter(thread, client, message.uuid, timeout, began + timeout, message)
        thread.post(client.submit_and_wait, message, waiter)
        return waiter

    def _with_client(
        self, post: Callable[[IOThread, Client], Reply[R]], start_timeout: float | None
    ) -> Reply[R]:
        """Call `post` with the client. If the app starts at its first use, start it before."""
        thread = io_thread()
        client = self.client_on(thread)
        if client is not None:
            return post(thread, client)

        async def start_and_post() -> R:
            return await post(thread, await self.started_client(start_timeout))

        return thread.ask(start_and_post, undo=_nothing)

    def submit_all(self, messages: Sequence[TaskMessage]) -> Reply[None]:
        """Submit many messages in chunks, so that other callers can submit between the chunks.

        If a message fails, the reply fails with the first error of its chunk, once all messages of
        that chunk have an answer. Later chunks are not submitted.
        """
        thread = io_thread()
        self.client_on(thread)  # raises at once if the app is not started
        return thread.ask(self._submit_all, messages, undo=_nothing)

    async def _submit_all(self, messages: Sequence[TaskMessage]) -> None:
        client = await self.started_client()
        self.unsupported.submitted(messages, self.broker, self.storage)
        for at in range(0, len(messages), _CHUNK):
            deadline = time.monotonic() + PUBLISH_TIMEOUT
            await client.submit_all(messages[at : at + _CHUNK], deadline)

    async def submit_within(
        self, messages: Sequence[TaskMessage], transaction: object
    ) -> list[schemas.Task]:
        """Submit messages in the caller's transaction, on its loop. Return their records.

        Raises `NotSupported` before anything is written if the broker and the storage cannot join
        the transaction.
        """
        thread, client = await self.ready()
        self.unsupported.submitted(messages, self.broker, self.storage)
        await thread.ask(client.check, messages)
        dated = await thread.ask(client.dated, messages)
        return await client.submit_within(dated, transaction)

    def wait(self, uuid: str, timeout: float | None) -> Reply[schemas.Task]:
        """Wait for the final record of any task.

        Fails with `TaskTimeout` after `timeout` seconds; None waits for ever. Raises `UnknownTask`
        if the text is not a valid uuid.
        """
        wait = partial(self._wait, _possible(uuid), timeout, _begin(timeout))
        # A wait that times out still reads the record once, which takes up to `LOOK` seconds.
        return self._with_client(wait, None if timeout is None else max(timeout, LOOK))

    def _wait(
        self, uuid: str, timeout: float | None, began: float, thread: IOThread, client: Client
    ) -> Reply[schemas.Task]:
        deadline = began if timeout is None else began + timeout
        waiter = Waiter(thread, client, uuid, timeout, deadline)
        thread.post(client.wait, waiter)
        return waiter

    def get(self, uuid: str | UUID) -> Reply[schemas.Task | None]:
        """Return the newest record of a task, or None if it has no record."""
        if not is_id(str(uuid)):
            nothing: Reply[schemas.Task | None] = Reply()
            nothing.set(None)
            return nothing
        return self.control(control.newest, str(uuid))

    def cancel_task(self, uuid: str | UUID) -> Reply[bool]:
        """Cancel a task. The answer is False if it has already finished by itself.

        Its record says `cancel` from then on, for all processes. If it runs, it is stopped soon
        after. An async function is cancelled, and a function in a process is killed. A function in
        a thread keeps running; its result is discarded.

        Fails with `UnknownTask`, `Unavailable` or `Refused`.
        """
        return self.control(control.cancel, _possible(str(uuid)))

    def control_blocking(
        self,
        operation: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Do the same as `control`, and block until the reply has an answer."""
        refuse_running_loop()
        return self.control(operation, *args, **kwargs).result()

    def worker(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int = 100,
        grace: float | None = 30.0,
        balancer: Balancer | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> AbstractAsyncContextManager[RunningWorker]:
        """Run a worker on this loop while the block runs.

            async with app.worker(concurrency=20):
                await serve_web_requests()

        `queues`: the queues to receive from; by default those of all registered tasks.
        `concurrency`: most tasks that run at the same time.
        `grace`: seconds that running tasks have to finish when the block ends; None: no limit.
        `balancer`: how free slots are shared among the queues; by default each gets its turn.
        `start_timeout`: seconds in which the broker and the storage have to answer.

        At the end of the block the worker stops receiving, waits for running tasks, and releases
        the rest. If the worker fails, another one replaces it, except
        after `ConfigurationError`, `NotSupported` and `Closed`.
        """
        options = WorkerOptions(
            queues=_checked(queues), concurrency=concurrency, grace=grace, balancer=balancer
        )
        return working(self, options, start_timeout, replace_failed)

    def run_forever(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int = 100,
        grace: float | None = 30.0,
        balancer: Balancer | None = None,
        processes: int | None = None,
        max_tasks: int | None = None,
        max_memory: int | None = None,
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
    ) -> None:
        """Run a worker until SIGTERM or SIGINT. A second signal releases running tasks at once.

            if __name__ == "__main__":
                app.run_forever(queues=["mail"], processes=4)

        `queues`, `concurrency`, `grace`, `balancer`: as for `worker`.
        `processes`: supervise this number of worker processes instead. Each is started with the
        command of this process. One that exits is replaced.
        `max_tasks`, `max_memory` (bytes): a worker stops in order after so many tasks, or when its
        process uses so much memory. With `processes`, another worker replaces it.
        `health_port`: answer `/live` and `/ready` over HTTP, at the address `health_host`.

        If a server does not answer yet, the worker waits for it. If a function in a thread takes
        longer than the grace period, the process exits and this call does not return.

        Raises `ConfigurationError`, and `RuntimeError` inside a running event loop.
        """
        refuse_running_loop()
        options = WorkerOptions(
            queues=_checked(queues),
            concurrency=concurrency,
            grace=grace,
            balancer=balancer,
            max_tasks=max_tasks,
            max_memory=max_memory,
            health=(health_host, health_port) if health_port is not None else None,
        )
        serve(self, options, processes)


def _begin(timeout: float | None) -> float:
    """Return the monotonic time. Raises `ConfigurationError` if the timeout is NaN."""
    if timeout is not None and math.isnan(timeout):
        raise ConfigurationError(f"timeout={timeout} is not a number of seconds")
    return time.monotonic()


def _possible(uuid: str) -> str:
    """Return the uuid. Raises `UnknownTask` if the text is not a valid uuid."""
    if not is_id(uuid):
        raise UnknownTask(f"no task can have the uuid {ascii(uuid)[:120]}")
    return uuid


async def _nothing() -> None:
    """Undo nothing: a submitted message stays submitted."""


def _checked(queues: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if queues is None else tuple(checked_name(queue, "a queue") for queue in queues)


_default: App | None = None
_default_lock = RLock()  # reentrant: the import of QTASKS_APP may call `default_app`


def default_app() -> App:
    """Return the app that `QTASKS_APP=module:app` names, or the default app of this process.

    Either one starts at its first use.
    """
    global _default
    with _default_lock:
        if _default is None:
            named = os.environ.get("QTASKS_APP")
            _default = import_app(named, "QTASKS_APP") if named else App()
            _default.starts_itself = True
        return _default


def _renew_lock_in_child() -> None:
    # Another thread may have held the lock at the fork. It does not run in the child.
    global _default_lock
    _default_lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_in_child)


def import_app(path: str, named_by: str) -> App:
    """Return the app that `module:app` names.

    Raises `ConfigurationError`; its message starts with `named_by`.
    """
    name, _, attribute = path.partition(":")
    module = import_named(name, named_by)
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        apps = [key for key, value in vars(module).items() if isinstance(value, App)]
        known = " or ".join(f"{name}:{key}" for key in apps) or "module:app"
        raise ConfigurationError(f"{named_by} {path}: that does not name an app; write {known}")
    return app


def import_named(name: str, named_by: str) -> ModuleType:
    """Import a module that the user has named.

    Raises `ConfigurationError`; its message starts with `named_by`.
    """
    if not name or name.startswith("."):
        hint = "write it as for an import, package.module"
        raise ConfigurationError(f"{named_by} {name!r}: that names no module; {hint}")
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"{named_by} {name}: there is no module {error.name!r} on Python's path; "
                "write it as for an import, package.module, in the folder above it"
            ) from error
        # The module itself has raised: name the error and its place in one line.
        message = f"{named_by} {name}: {_told(error)}{_place_of(error)}"
        raise ConfigurationError(message) from error


def _told(error: BaseException) -> str:
    """Return the error of an import as text. QTasks' own errors need no class name."""
    if isinstance(error, QTasksError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _place_of(error: BaseException) -> str:
    """Return where a module raised an error, or where it called QTasks if QTasks raised it."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if isinstance(error, QTasksError):
        frames = [frame for frame in frames if frame.name == "<module>"] or frames
    last = frames[-1]
    # The import itself has failed. Its message says where.
    return "" if "importlib" in last.filename else f" ({last.filename}:{last.lineno})"
