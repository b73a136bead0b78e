"""What an app has enqueued, as a test compares it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from qtasks.app import App
from qtasks.codec.serializers import MsgpackSerializer
from qtasks.execution.definition import TaskDefinition
from qtasks_core import TaskMessage

_untyped = MsgpackSerializer().decoder(Any)


class EnqueuedCall(Struct, frozen=True, kw_only=True):
    """One call that was enqueued, with its arguments as the function receives them.

    They were encoded and decoded again: a dataclass is equal to the one that was passed, but it is
    another object.
    """

    task_name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    queue: str
    priority: int
    delay: float
    """Seconds after which the task may run."""
    uuid: str

    def __str__(self) -> str:
        told = [repr(value) for value in self.args]
        told += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        options = f"queue={self.queue!r}, priority={self.priority}, delay={self.delay:g}"
        return f"{self.task_name}({', '.join(told)}) with {options}"


class Enqueued(list[EnqueuedCall]):
    """The calls that fit a question, in order.

    If none fits, its representation lists all calls, so that a failed `assert` shows them.
    """

    def __init__(self, fitting: Iterable[EnqueuedCall], all_calls: Sequence[EnqueuedCall]) -> None:
        super().__init__(fitting)
        self._all = all_calls

    def __repr__(self) -> str:
        if self:
            return f"[{'; '.join(map(str, self))}]"
        others = "; ".join(map(str, self._all)) or "nothing"
        return f"[] (enqueued: {others})"


def call_of(message: TaskMessage, app: App) -> EnqueuedCall:
    """Return the call of a message. Raises `SerializationError`."""
    known = app.definitions.get(message.task_name)
    if known is not None:
        args, kwargs = known.decode(message.args, message.kwargs)
    else:
        args = _untyped(message.args) if message.args else []
        kwargs = _untyped(message.kwargs) if message.kwargs else {}
    return EnqueuedCall(
        task_name=message.task_name,
        args=tuple(args),
        kwargs=kwargs,
        queue=message.queue,
        priority=message.priority,
        delay=message.delay,
        uuid=message.uuid,
    )


class Question(Struct, frozen=True, kw_only=True):
    """What a test asks of a call. A field that is None fits every call."""

    definition: TaskDefinition | None = None
    task_name: str | None = None
    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None
    queue: str | None = None
    priority: int | None = None
    delay: float | None = None
    uuid: str | None = None

    def fits(self, call: EnqueuedCall) -> bool:
        """Say whether a call is what the test asks for.

        Raises `TypeError` if the arguments of the question do not fit the task's function.
        """
        return (
            self.task_name in (None, call.task_name)
            and self.queue in (None, call.queue)
            and self.priority in (None, call.priority)
            and self.uuid in (None, call.uuid)
            and (self.delay is None or math.isclose(self.delay, call.delay, abs_tol=1e-3))
            and self._has_arguments(call)
        )

    def _has_arguments(self, call: EnqueuedCall) -> bool:
        if self.args is None and self.kwargs is None:
            return True
        args, kwargs = self.args or (), self.kwargs or {}
        if self.definition is None:
            return (tuple(args), dict(kwargs)) == (call.args, call.kwargs)
        return self._bound(self.definition, args, kwargs) == self._bound(
            self.definition, call.args, call.kwargs
        )

    @staticmethod
    def _bound(
        definition: TaskDefinition, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments by parameter: it makes no difference how they were passed."""
        bound = definition.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments
