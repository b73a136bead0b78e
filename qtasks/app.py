"""An app: a name, a broker, a storage and the tasks it knows. Both faces stand on it."""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID, uuid5

from qtasks import control
from qtasks.bridge.io_thread import IOThread, io_thread
from qtasks.bridge.reply import Reply, refuse_running_loop
from qtasks.client.client import Client, Waiter
from qtasks.client.late import LOOK
from qtasks.client.lifecycle import START_TIMEOUT, Life, Lifecycle
from qtasks.client.parts import given_parts
from qtasks.client.unmet import USUAL, Unmet
from qtasks.codec.serializers import MsgpackSerializer
from qtasks.execution.definition import TaskDefinition, checked_plugins
from qtasks.worker.hosted import RunningWorker, WorkerOptions, working
from qtasks.worker.process import serve
from qtasks.worker.replacement import replace_failed
from qtasks_core import Balancer, Broker, Plugin, Storage, TaskMessage, schemas
from qtasks_core.errors import ConfigurationError, QTasksError, UnknownTask
from qtasks_core.names import checked_name, is_id

P = ParamSpec("P")
R = TypeVar("R")

MAX_PAYLOAD = 1024 * 1024
"""Bytes that arguments, and a result, may take, unless the app says otherwise."""
PUBLISH_TIMEOUT = 30.0
"""Seconds after which a write that is not confirmed is an error, where no timeout is given."""
_CHUNK = 10_000
"""So many of many messages have one deadline: all of them may take longer than that."""
_KEYED = UUID("2f6d1c0e-8a43-5b7e-9c15-7d0e4b9a6f32")


class App(Lifecycle):
    """A broker, a storage, a registry of tasks, and a client on the I/O thread while it is started.

    What crosses to the I/O thread returns a `Reply`: `await` it, or `block_on` the method.

    `broker` and `storage` are objects or URLs. A broker's URL without a storage uses both halves of
    that backend. Without arguments the environment counts (`QTASKS_NAME`, `QTASKS_BROKER_URL`,
    `QTASKS_STORAGE_URL`), else the embedded default. Apps of different names share nothing; names
    are those of `qtasks_core.names`. `plugins` are put around each task that its workers run, the
    first outermost. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        name: str | None = None,
        broker: Broker | str | None = None,
        storage: Storage | str | None = None,
        *,
        max_payload: int = MAX_PAYLOAD,
        plugins: Iterable[Plugin] = (),
    ) -> None:
        of = "an app" if name else "an app (QTASKS_NAME)"
        name = checked_name(name or os.environ.get("QTASKS_NAME") or "qtasks", of)
        super().__init__(name, *given_parts(broker, storage))
        self.max_payload = max_payload
        self.unmet = Unmet()
        """What tasks ask for that this broker or storage cannot do; each is logged once."""
        self.definitions: dict[str, TaskDefinition] = {}
        self.plugins = checked_plugins(plugins)

    def add_plugin(self, plugin: Plugin) -> None:
        """Add a plugin within those given before; workers that run already go on without it.

        Raises `ConfigurationError` for what is no plugin.
        """
        self.plugins = (*self.plugins, *checked_plugins([plugin]))

    def register(self, definition: TaskDefinition) -> None:
        """Make a task known. Raises `ConfigurationError` when its name is taken."""
        known = self.definitions.setdefault(definition.name, definition)
        if known is not definition and known.function is not definition.function:
            raise ConfigurationError(
                f"two functions claim the task name {definition.name!r}: "
                f"{known.function!r} and {definition.function!r}"
            )

    async def _open(self, life: Life, deadline: float) -> None:
        await super()._open(life, deadline)
        options = {name: known.options for name, known in self.definitions.items()}
        priority = {name for name, asked in options.items() if asked.priority != USUAL}
        retention = {name for name, asked in options.items() if asked.retention is not None}
        if priority or retention:
            self.unmet.declared(priority, retention, self.broker, self.storage)

    def definition(self, name: str) -> TaskDefinition:
        """Return a known task. Raises `UnknownTask`."""
        if name not in self.definitions:
            raise UnknownTask(f"the app {self.name!r} knows no task {name!r}")
        return self.definitions[name]

    def decoder_of(self, record: schemas.Task) -> Callable[[Any], Any]:
        """Return how the result in a record is decoded: typed where the task is known."""
        known = self.definitions.get(record.task_name)
        return known.decode_result if known is not None else MsgpackSerializer().decoder(Any)

    def uuid_of(self, task_name: str, key: str) -> str:
        """Return the uuid that a task enqueued with this `key=` has."""
        return str(uuid5(_KEYED, "\0".join((self.name, task_name, key))))

    def submit(self, message: TaskMessage, timeout: float | None) -> Reply[schemas.Task]:
        """Submit a message; with `timeout` (seconds) wait for its result, else for the write.

        One with a key that is taken gives the record that is there, or its result.
        Fails with `TaskTimeout` when the write was durable by then and the task had not finished,
        with `Unavailable` when it was not known to be, with `Refused`.
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
            self.unmet.submitted((message,), self.broker, self.storage)
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
        """Post something with the client; an app that starts itself is started before."""
        thread = io_thread()
        client = self.client_on(thread)
        if client is not None:
            return post(thread, client)

        async def start_and_post() -> R:
            return await post(thread, await self.started_client(start_timeout))

        return thread.ask(start_and_post, undo=_nothing)

    def submit_all(self, messages: Sequence[TaskMessage]) -> Reply[None]:
        """Submit many messages, chunk by chunk: however many there are, others get in between.

        Fails with the first error of a chunk after all of the chunk had an answer; what is behind
        it is not submitted.
        """
        thread = io_thread()
        self.client_on(thread)  # raises at once where nothing is started
        return thread.ask(self._submit_all, messages, undo=_nothing)

    async def _submit_all(self, messages: Sequence[TaskMessage]) -> None:
        client = await self.started_client()
        self.unmet.submitted(messages, self.broker, self.storage)
        for at in range(0, len(messages), _CHUNK):
            deadline = time.monotonic() + PUBLISH_TIMEOUT
            await client.submit_all(messages[at : at + _CHUNK], deadline)

    def wait(self, uuid: str, timeout: float | None) -> Reply[schemas.Task]:
        """Wait for the final record of any task. Fails with `TaskTimeout`.

        Raises `UnknownTask` for a uuid that no task can have.
        """
        wait = partial(self._wait, _possible(uuid), timeout, _begin(timeout))
        # Past a wait's own time its task is still looked at.
        return self._with_client(wait, None if timeout is None else max(timeout, LOOK))

    def _wait(
        self, uuid: str, timeout: float | None, began: float, thread: IOThread, client: Client
    ) -> Reply[schemas.Task]:
        deadline = began if timeout is None else began + timeout
        waiter = Waiter(thread, client, uuid, timeout, deadline)
        thread.post(client.wait, waiter)
        return waiter

    def get(self, uuid: str | UUID) -> Reply[schemas.Task | None]:
        """Return the newest record of a task, None where there is none."""
        if not is_id(str(uuid)):
            nothing: Reply[schemas.Task | None] = Reply()
            nothing.set(None)
            return nothing
        return self.control(control.newest, str(uuid))

    def cancel_task(self, uuid: str | UUID) -> Reply[bool]:
        """Cancel a task that has not finished; False: it had finished by itself before.

        From then on it is cancelled for everybody. A run of it is stopped soon after: an async
        function is cancelled, a function in a process is killed, the result of one in a thread is
        dropped.
        Fails with `UnknownTask`, `Unavailable`.
        """
        return self.control(control.cancel, _possible(str(uuid)))

    def control_blocking(
        self,
        operation: Callable[Concatenate[Client, P], Coroutine[Any, Any, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Do what `control` does, in blocking code."""
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

        `queues`: those of the known tasks by default. At the end it stops receiving, lets running
        tasks finish for `grace` seconds (None: for ever) and gives the rest back. Another worker
        follows one that has failed, but for an error of the configuration.
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
        """Be a worker process until SIGTERM or SIGINT; a second signal gives running tasks back.

        `queues`, `concurrency`, `grace`, `balancer`: as for `worker`. Waits for servers that are
        not there yet. Functions in threads that outlast the grace period are left behind: then
        the process ends without coming back from here. Raises `ConfigurationError`.

        `processes`: supervise so many worker processes instead, each started by the command of
        this one, and start another where one ends. `max_tasks`, `max_memory` (bytes): a worker
        stops, in order, after so many tasks or at that size; with `processes` another follows.
        `health_port`: answer `/live` and `/ready` over HTTP at `health_host`.
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
    """Return the time. Raises `ConfigurationError` for a timeout that no clock can compare."""
    if timeout is not None and math.isnan(timeout):
        raise ConfigurationError(f"timeout={timeout} is not a number of seconds")
    return time.monotonic()


def _possible(uuid: str) -> str:
    """Return the uuid. Raises `UnknownTask` for text that no task can have."""
    if not is_id(uuid):
        raise UnknownTask(f"no task can have the uuid {ascii(uuid)[:120]}")
    return uuid


async def _nothing() -> None:
    """Have nothing to undo: what was submitted stays submitted."""


def _checked(queues: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if queues is None else tuple(checked_name(queue, "a queue") for queue in queues)


_default: App | None = None
_default_lock = RLock()  # the module that QTASKS_APP names may ask for the app it is


def default_app() -> App:
    """Return `QTASKS_APP=module:app`, else the process's default app, which starts by itself."""
    global _default
    with _default_lock:
        if _default is None:
            named = os.environ.get("QTASKS_APP")
            _default = import_app(named, "QTASKS_APP") if named else App()
            _default.starts_itself = True
        return _default


def _renew_lock_in_child() -> None:
    # Another thread may have held the lock at the fork, and does not exist in the child.
    global _default_lock
    _default_lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_in_child)


def import_app(path: str, named_by: str) -> App:
    """Return the app that `module:app` names. Raises `ConfigurationError`, beginning `named_by`."""
    name, _, attribute = path.partition(":")
    module = import_named(name, named_by)
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        apps = [key for key, value in vars(module).items() if isinstance(value, App)]
        known = " or ".join(f"{name}:{key}" for key in apps) or "module:app"
        raise ConfigurationError(f"{named_by} {path}: that does not name an app; write {known}")
    return app


def import_named(name: str, named_by: str) -> ModuleType:
    """Import a module that a user named. Raises `ConfigurationError`, beginning `named_by`."""
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
        # Whatever the module raises belongs in the one line, with the place where it did.
        message = f"{named_by} {name}: {_told(error)}{_place_of(error)}"
        raise ConfigurationError(message) from error


def _told(error: BaseException) -> str:
    """Return what an import raised; our own messages are clear without their class."""
    if isinstance(error, QTasksError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _place_of(error: BaseException) -> str:
    """Return where a module raised an error; of our own, where it called us."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if isinstance(error, QTasksError):
        frames = [frame for frame in frames if frame.name == "<module>"] or frames
    last = frames[-1]
    # The import itself has failed, and says where in its message.
    return "" if "importlib" in last.filename else f" ({last.filename}:{last.lineno})"
