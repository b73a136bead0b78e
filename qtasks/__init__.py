"""QTasks: a task queue whose guarantees depend on the broker and storage you choose.

    from qtasks import QueueTasks

    app = QueueTasks("shop", "redis://localhost")

    @app.task()
    def add(x: int, y: int) -> int:
        return x + y

    with app:
        task = add.add_task(1, 2, timeout=5)  # a worker has to run: app.run_forever()
        print(task.returning)

Async code imports `QueueTasks` from `qtasks.asyncio`.
"""

from qtasks.asyncio import AsyncResult
from qtasks.blocking import QueueTasks, SyncResult
from qtasks.declare.handle import BlockingTask, Task
from qtasks.declare.routers import AsyncRouter, SyncRouter
from qtasks.declare.tasks import AsyncTask, SyncTask
from qtasks.execution.requires import Requires
from qtasks.signals import Reject, Retry
from qtasks_core.errors import (
    AmbiguousApp,
    Closed,
    ConfigurationError,
    MissingDriver,
    NotSupported,
    PayloadTooLarge,
    QTasksError,
    Refused,
    SerializationError,
    ServerTooOld,
    SignatureMismatch,
    TaskCancelled,
    TaskFailed,
    TaskNotFinished,
    TaskTimeout,
    Unavailable,
    UnknownTask,
)

__all__ = [
    "AmbiguousApp",
    "AsyncResult",
    "AsyncRouter",
    "AsyncTask",
    "BlockingTask",
    "Closed",
    "ConfigurationError",
    "MissingDriver",
    "NotSupported",
    "PayloadTooLarge",
    "QTasksError",
    "QueueTasks",
    "Refused",
    "Reject",
    "Requires",
    "Retry",
    "SerializationError",
    "ServerTooOld",
    "SignatureMismatch",
    "SyncResult",
    "SyncRouter",
    "SyncTask",
    "Task",
    "TaskCancelled",
    "TaskFailed",
    "TaskNotFinished",
    "TaskTimeout",
    "Unavailable",
    "UnknownTask",
]
