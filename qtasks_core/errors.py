"""Every error that QTasks raises, from a bad URL to a failed task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtasks_core.schemas import Task


class QTasksError(Exception):
    """The base class of all errors that QTasks raises."""


class ConfigurationError(QTasksError):
    """Something is configured wrongly. The message says what to change."""


class MissingDriver(ConfigurationError):
    """A backend's driver is not installed. The message says what to install.

    `requirement` is what `pip install` gets, for example `qtasks-shelf[driver]`. For a package that
    is installed from a checkout it is `.[driver]`.
    """

    def __init__(self, backend: str, requirement: str) -> None:
        where = " in the checkout" if requirement.startswith(".") else ""
        super().__init__(f"{backend} needs its driver: pip install '{requirement}'{where}")


class ServerTooOld(ConfigurationError):
    """The server answers, but lacks something that the backend relies on."""


class NotSupported(QTasksError):
    """This broker or storage cannot do what was asked. Its guarantees say so too."""


class Closed(QTasksError):
    """Something was used before `start` or after `stop`."""


class Unavailable(QTasksError, ConnectionError):
    """The server cannot be reached now.

    It is unknown whether the call had an effect. Calling again reconnects. You can retry every call
    of the contracts. The message never contains a password.
    """


class Refused(QTasksError):
    """A broker or storage answered that it does not accept this item. The message says why."""


class WireError(QTasksError):
    """Bytes from outside are not a message or record that this release can read."""


class SerializationError(QTasksError, TypeError):
    """A value cannot be encoded: it has no encoding, or its type would change unnoticed.

    The message names the argument.
    """


class SignatureMismatch(QTasksError, TypeError):
    """The arguments of a call do not fit the task's signature."""


class BadArguments(QTasksError):
    """The arguments in a message do not fit the function that it names, and never will."""


class UnstorableResult(QTasksError):
    """The return value of a function has no encoding."""


class PayloadTooLarge(QTasksError, ValueError):
    """A message is larger than the limit."""


class UnknownTask(QTasksError, LookupError):
    """No task, or no record, has this name or uuid."""


class AmbiguousApp(ConfigurationError):
    """More than one app of this process includes the router of a task."""


class TaskTimeout(QTasksError, TimeoutError):
    """The deadline of a wait has passed. The task itself keeps running."""

    def __init__(self, message: str, uuid: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.uuid = uuid
        """The task's uuid, to ask for the task later."""
        self.where = where
        """Where the task was written, if that is useful. It names a server, so do not show it to
        the clients of an API. `args` do not contain it."""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.where}" if self.where else message


class TaskNotFinished(QTasksError):
    """The task has no result yet."""


class TaskFailed(QTasksError):
    """The task finished with `error`. The message ends with the remote traceback."""

    def __init__(self, record: Task) -> None:
        super().__init__(record)
        self.record = record

    def __str__(self) -> str:
        record = self.record
        message = f"task {record.task_name} {record.uuid} failed: {record.error}"
        return f"{message}\n\n{record.traceback}" if record.traceback else message


class TaskCancelled(QTasksError):
    """The task was cancelled before it could finish."""

    def __init__(self, record: Task) -> None:
        super().__init__(record)
        self.record = record

    def __str__(self) -> str:
        return f"task {self.record.task_name} {self.record.uuid} was cancelled"


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an error, its cause, the cause of that, and so on; each error once.

    The chain may be a circle. `raise a from b` makes one if `b` was raised while `a` was handled,
    and drivers do that with errors that they keep.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        if any(cause is known for known in chain):
            break
        chain.append(cause)
    return chain
