"""QTasks: a task queue whose delivery semantics and scale follow from the parts you pick."""

from qtasks.asyncio import AsyncResult
from qtasks.blocking import QueueTasks, SyncResult
from qtasks.declare.handle import BlockingTask, Task
from qtasks.declare.routers import AsyncRouter, SyncRouter
from qtasks.declare.tasks import AsyncTask, SyncTask
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
