"""Every error QTasks raises, from a bad URL to a failed task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtasks_core.schemas import Task


class QTasksError(Exception):
    """The root of all errors raised by QTasks."""


class ConfigurationError(QTasksError):
    """Something was set up wrongly; the message says what to change."""


class MissingDriver(ConfigurationError):
    """A backend's driver is not installed; the message says what brings it.

    `requirement` is what `pip install` takes, for instance `qtasks-shelf[driver]`, or `.[driver]`
    for what is installed from a checkout.
    """

    def __init__(self, backend: str, requirement: str) -> None:
        where = " in the checkout" if requirement.startswith(".") else ""
        super().__init__(f"{backend} needs its driver: pip install '{requirement}'{where}")


class ServerTooOld(ConfigurationError):
    """The server answers, but lacks something the backend relies on."""


class NotSupported(QTasksError):
    """This part cannot do what was asked; its guarantees say so too."""


class Closed(QTasksError):
    """A part was used before `start` or after `stop`."""


class Unavailable(QTasksError, ConnectionError):
    """The server cannot be reached now.

    Whether the call had an effect is unknown. Calling again reconnects; every call of the
    contracts may be repeated. The message never contains a password.
    """


class Refused(QTasksError):
    """A broker or storage answered that it does not take this item; the message says why."""


class WireError(QTasksError):
    """Bytes from the outside are not a message or record this release can read."""


class SerializationError(QTasksError, TypeError):
    """A value cannot travel: it would change its type unseen, or has no encoding.

    The message names the argument.
    """


class SignatureMismatch(QTasksError, TypeError):
    """The arguments of a call do not fit the task's signature."""


class BadArguments(QTasksError):
    """The arguments in a message do not fit the function it names, and never will."""


class UnstorableResult(QTasksError):
    """What a function returned has no encoding."""


class PayloadTooLarge(QTasksError, ValueError):
    """A message is over the size limit."""


class UnknownTask(QTasksError, LookupError):
    """No task, or no record, has this name or uuid."""


class AmbiguousApp(ConfigurationError):
    """More than one app of this process included the router of a task."""


class TaskTimeout(QTasksError, TimeoutError):
    """The deadline of a wait has passed; the task itself goes on."""

    def __init__(self, message: str, uuid: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.uuid = uuid
        """The task's, to ask for it later."""
        self.where = where
        """Where the task was written, where that is worth saying. It names a server, so it is not
        for the clients of an API; `args` are without it."""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.where}" if self.where else message


class TaskNotFinished(QTasksError):
    """The task has no result yet."""


class TaskFailed(QTasksError):
    """The task ended in `error`; the message ends with the remote traceback."""

    def __init__(self, record: Task) -> None:
        super().__init__(record)
        self.record = record

    def __str__(self) -> str:
        record = self.record
        message = f"task {record.task_name} {record.uuid} failed: {record.error}"
        return f"{message}\n\n{record.traceback}" if record.traceback else message


class TaskCancelled(QTasksError):
    """The task was cancelled before it could end."""

    def __init__(self, record: Task) -> None:
        super().__init__(record)
        self.record = record

    def __str__(self) -> str:
        return f"task {self.record.task_name} {self.record.uuid} was cancelled"
