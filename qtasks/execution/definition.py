"""A task as it is declared: function, name, options, and the codecs of arguments and result."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

import msgspec

from qtasks.codec.serializers import MsgpackSerializer
from qtasks.execution.requires import NOTHING, Requires, checked_requires
from qtasks.execution.signatures import (
    collecting,
    default_name,
    hints_of,
    parameter_of_kind,
    result_type,
    signature_of,
)
from qtasks.plugins.retries import Retries
from qtasks_core import Executor, Plugin, RoutePolicy, Serializer, TaskMessage
from qtasks_core.errors import (
    BadArguments,
    ConfigurationError,
    SerializationError,
    SignatureMismatch,
    UnstorableResult,
)
from qtasks_core.names import checked_name, checked_task_name
from qtasks_core.schemas import LONGEST

logger = logging.getLogger("qtasks")

RESERVED = ("timeout", "delay", "eta", "key", "queue", "priority", "expires", "transaction")
"""Option names of `add_task`: a parameter with such a name is passed through `call`."""


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a task, as the decorator takes them."""

    queue: str | RoutePolicy = "default"
    """The queue, or a policy of `qtasks.routes` that chooses one for each call."""
    priority: int = 5
    """0 to 9; tasks with 9 run first."""
    retry: int | None = None
    """How many more runs after the first may follow an exception: short for `Retries(retry)`.

    None: the plugins of the task, its router and its app decide; without any there is no retry.
    """
    store_result: bool = True
    retention: float | None = None
    """Seconds to keep the final record."""
    max_time: float | None = None
    """Seconds that one run may take; then it fails with a `TimeoutError`.

    A coroutine is cancelled, a function in a process is killed. A thread cannot be stopped: the
    function keeps running, and its result is discarded.
    """
    executor: Executor | None = None
    """Where it runs: None is the worker's loop for coroutine functions, a thread for others."""
    plugins: Sequence[Plugin] = ()
    """They run within those of the router and the app, the first outermost."""
    requires: Requires = NOTHING
    """What the broker and the storage must guarantee, or the app does not start."""
    generate_handler: Callable[[Any], Any] | None = None
    """Called with each value that a generator yields. The result is the list of its answers."""

    def __post_init__(self) -> None:
        for queue in self.queues:
            checked_name(queue, "a queue")
        if self.priority not in range(10):
            raise ConfigurationError(
                f"priority={self.priority!r} is no whole number between 0 and 9"
            )
        if self.retry is not None and self.retry < 0:
            raise ConfigurationError(f"retry={self.retry} is below 0")
        if self.retention is not None and not 0 <= self.retention <= LONGEST:
            raise ConfigurationError(
                f"retention={self.retention} is not a number of seconds from 0 to {LONGEST:.0e}"
            )
        if self.max_time is not None and not self.max_time > 0:
            raise ConfigurationError(f"max_time={self.max_time} is not above 0")
        if not isinstance(self.executor, Executor | None):
            raise ConfigurationError(f"{self.executor!r} is not an Executor object")
        if self.generate_handler is not None and not callable(self.generate_handler):
            raise ConfigurationError(f"generate_handler={self.generate_handler!r} is no function")
        checked_requires(self.requires)
        checked_plugins(self.plugins)
        if self.retry is not None and any(isinstance(p, Retries) for p in self.plugins):
            raise ConfigurationError("give retry= or a Retries plugin, not both")

    @property
    def queues(self) -> Sequence[str]:
        """All queues that calls may go to if they name none."""
        return self.queue.queues if isinstance(self.queue, RoutePolicy) else (self.queue,)

    def all_plugins(self) -> tuple[Plugin, ...]:
        """Return the plugins. If `retry` is set, `Retries(retry)` is the outermost."""
        return (*(() if self.retry is None else (Retries(self.retry),)), *self.plugins)


def declared_queues(definitions: Iterable[TaskDefinition]) -> set[str]:
    """Return the queues that calls of these tasks may go to, and the queue `default`."""
    return {"default", *(queue for each in definitions for queue in each.options.queues)}


def checked_plugins(plugins: Iterable[Plugin]) -> tuple[Plugin, ...]:
    """Return the plugins. Raises `ConfigurationError` if one is not a plugin, e.g. a class."""
    plugins = tuple(plugins)
    for plugin in plugins:
        if not isinstance(plugin, Plugin):
            raise ConfigurationError(f"{plugin!r} is not a Plugin object")
    return plugins


class TaskDefinition:
    """A task's function with its name, options and codecs, compiled once at registration."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None,
        options: TaskOptions,
        serializer: Serializer | None = None,
        plugins: Sequence[Plugin] = (),
    ) -> None:
        self.function = function
        self.signature = signature_of(function)
        self.name = checked_task_name(name or default_name(function))
        self.run = collecting(function, options.generate_handler)
        """The function as a worker calls it: one that is a generator returns a list."""
        self.options = options
        if isinstance(options.queue, RoutePolicy):
            options.queue.check(self.signature.parameters)
        self.plugins = (*plugins, *options.all_plugins())
        """The plugins of its router and its own, the outermost first."""
        self.serializer = serializer or MsgpackSerializer()
        self.reserved = [p for p in self.signature.parameters if p in RESERVED]
        if self.reserved:
            logger.warning(
                "task %s: parameters %s are options of add_task; pass them through "
                ".call(…).add_task()",
                self.name,
                ", ".join(self.reserved),
            )
        hints = hints_of(function)
        bounded = hints_of(function, include_extras=True)
        """The annotations with the bounds in an `Annotated`, which the worker checks."""
        self._parameters = list(self.signature.parameters.values())
        codecs = {
            p.name: self._codec(
                f"parameter {p.name!r}", hints.get(p.name, Any), bounded.get(p.name, Any)
            )
            for p in self._parameters
        }
        self._encoders = {name: encoder for name, (encoder, _) in codecs.items()}
        self._decoders = {name: decoder for name, (_, decoder) in codecs.items()}
        self._positional = [
            p.name
            for p in self._parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        self._keywords = {
            p.name for p in self._parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }
        self._var_positional = parameter_of_kind(self._parameters, inspect.Parameter.VAR_POSITIONAL)
        self._var_keyword = parameter_of_kind(self._parameters, inspect.Parameter.VAR_KEYWORD)
        returns = result_type(function, hints, options.generate_handler)
        self._encode_result, self.decode_result = self._codec(
            "the result", returns, result_type(function, bounded, options.generate_handler)
        )
        self._checks_result = returns is not Any
        self.is_async = inspect.iscoroutinefunction(self.run)
        self.max_time = options.max_time
        self.invoke: Callable[[TaskMessage], Any] = self._await if self.is_async else self._call
        """Decode the arguments in a message and call the function: see `Runnable.invoke`."""
        if options.executor is not None:
            options.executor.accept(self)

    def _codec(
        self, whose: str, annotation: Any, bounded: Any
    ) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        try:
            return self.serializer.encoder(annotation), self.serializer.decoder(bounded)
        except SerializationError as error:
            raise ConfigurationError(f"task {self.name}: {whose}: {error}") from error

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Return the bytes of arguments. Raises `SignatureMismatch`, `SerializationError`."""
        if (mismatch := self.mismatch(args, kwargs)) is not None:
            raise SignatureMismatch(mismatch)
        names = [self._name_at(at) for at in range(len(args))]
        values = [self._prepare(name, name, value) for name, value in zip(names, args, strict=True)]
        pairs = {key: self._prepare(self._named(key), key, value) for key, value in kwargs.items()}
        try:
            return (
                self.serializer.encode(values) if values else b"",
                self.serializer.encode(pairs) if pairs else b"",
            )
        except SerializationError as error:
            prepared = [*zip(names, values, strict=True), *pairs.items()]
            raise self._name_culprit(prepared, error) from None

    def mismatch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return why the function cannot be called like this; None if it can."""
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return f"{self.name}{self.signature}: {error}"
        return None

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments of a call by the names of the parameters, with defaults."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _prepare(self, parameter: str, name: str, value: Any) -> Any:
        try:
            return self._encoders[parameter](value)
        except (TypeError, ValueError, RecursionError) as error:
            raise SerializationError(f"{self.name}: argument {name!r}: {error}") from None

    def _name_culprit(
        self, values: Iterable[tuple[str, Any]], error: Exception
    ) -> SerializationError:
        for name, value in values:
            try:
                self.serializer.encode(value)
            except SerializationError as found:
                return SerializationError(f"{self.name}: argument {name!r}: {found}")
        return SerializationError(f"{self.name}: {error}")

    def _name_at(self, position: int) -> str:
        if position < len(self._positional):
            return self._positional[position]
        return self._var_positional or ""

    def _named(self, keyword: str) -> str:
        """Return the parameter that takes an argument given by keyword."""
        return keyword if keyword in self._keywords else self._var_keyword or ""

    def decode(self, args: bytes, kwargs: bytes) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments in bytes, typed as annotated. Raises `SerializationError`."""
        values = [
            self._decode(name := self._name_at(at), name, part)
            for at, part in enumerate(self.serializer.split(args) if args else ())
        ]
        pairs = {
            name: self._decode(self._named(name), name, part)
            for name, part in (self.serializer.split_pairs(kwargs) if kwargs else {}).items()
        }
        return values, pairs

    def _decode(self, parameter: str, name: str, data: Any) -> Any:
        try:
            return self._decoders.get(parameter, _untyped)(data)
        except Exception as error:
            # Decoding runs the checks of user types, which may raise anything.
            raise SerializationError(f"{self.name}: argument {name!r}: {error}") from error

    def _call(self, message: TaskMessage) -> Any:
        args, kwargs = self._arguments(message)
        pid = os.getpid()
        try:
            return _ran(self.run(*args, **kwargs))
        except TypeError:
            self._blame(args, kwargs)
            raise
        finally:
            _end_fork(pid)

    async def _await(self, message: TaskMessage) -> Any:
        args, kwargs = self._arguments(message)
        pid = os.getpid()
        try:
            return _ran(await self.run(*args, **kwargs))
        except TypeError:
            self._blame(args, kwargs)
            raise
        finally:
            _end_fork(pid)

    def _arguments(self, message: TaskMessage) -> tuple[list[Any], dict[str, Any]]:
        if message.encoding != self.serializer.name:  # other bytes may decode by accident
            raise BadArguments(
                f"{self.name}: the arguments are encoded as {message.encoding!r}, "
                f"and this worker reads {self.serializer.name!r}"
            )
        try:
            return self.decode(message.args, message.kwargs)
        except SerializationError as error:
            raise BadArguments(str(error)) from error

    def _blame(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `BadArguments` if the arguments do not fit the signature.

        It is checked only after a `TypeError`: a sender that knows the function has checked it.
        """
        if (mismatch := self.mismatch(args, kwargs)) is not None:
            raise BadArguments(mismatch) from None

    def encode_result(self, value: Any) -> bytes:
        """Return the bytes of a result.

        Raises `SerializationError`, or an error of the result's type, if the result does not fit
        its annotation: no caller could decode it.
        """
        data = self.serializer.encode(self._encode_result(value))
        if self._checks_result:
            self.decode_result(data)
        return data


def _ran(result: Any) -> Any:
    """Return a result. Raise if it is a coroutine or a generator that was never run.

    A forgotten `await`, or a decorator that is not async: recorded as a success, it would hide that
    the task did nothing.
    """
    if type(result) in (CoroutineType, GeneratorType, AsyncGeneratorType):
        if not isinstance(result, AsyncGeneratorType):
            result.close()  # otherwise Python warns wherever the coroutine is collected
        raise UnstorableResult(
            f"nobody has run the {type(result).__name__} that it is; the task's function itself, "
            "as it is registered, has to be async or a generator, and to await what it calls"
        )
    return result


def _end_fork(pid: int) -> None:
    """Exit if the function has forked and this is the child process, in which it returned too.

    Only the parent may go on: the child has copies of its loop and its connections.
    """
    if os.getpid() != pid:
        error = sys.exc_info()[1]
        status = error.code or 0 if isinstance(error, SystemExit) else int(error is not None)
        os._exit(status if isinstance(status, int) else 1)


_untyped = MsgpackSerializer().decoder(Any)
