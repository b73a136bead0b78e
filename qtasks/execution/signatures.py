"""Reading a function: its signature, its annotations, and the name under which it is imported."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing, closing, suppress
from functools import wraps
from pathlib import Path
from types import GenericAlias
from typing import (
    Any,
    Never,
    NoReturn,
    ParamSpecArgs,
    ParamSpecKwargs,
    get_args,
    get_type_hints,
)

from qtasks_core.errors import ConfigurationError

logger = logging.getLogger("qtasks")


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature. Raises `ConfigurationError` for anything but a plain function."""
    # A partial has no name and no annotations; some built-in functions have no signature.
    named = all(hasattr(function, name) for name in ("__module__", "__qualname__"))
    if named and not isinstance(function, staticmethod):
        with suppress(TypeError, ValueError):
            return inspect.signature(function)
    raise ConfigurationError(f"{function!r} is no function; write one that calls it")


def hints_of(function: Callable[..., Any], include_extras: bool = False) -> dict[str, Any]:
    """Return the annotations, or none if they name types that do not exist at run time.

    Raises `ConfigurationError`. `include_extras` keeps the bounds in an `Annotated`.
    """
    try:
        hints = get_type_hints(function, include_extras=include_extras)
        # The `P.args` and `P.kwargs` of a decorator say nothing about the arguments.
        silent = (ParamSpecArgs, ParamSpecKwargs)
        return {name: hint for name, hint in hints.items() if not isinstance(hint, silent)}
    except (NameError, AttributeError) as error:
        if not include_extras:
            logger.warning(
                "task %s: annotation not found at run time (%s); all its values travel untyped",
                default_name(function),
                error,
            )
        return {}
    except (TypeError, SyntaxError) as error:
        raise ConfigurationError(f"task {default_name(function)}: an annotation: {error}") from None


def collecting(
    function: Callable[..., Any], handler: Callable[[Any], Any] | None
) -> Callable[..., Any]:
    """Return a function that collects what a generator yields into a list; others as they are."""
    if inspect.isgeneratorfunction(function):
        if inspect.iscoroutinefunction(handler):
            raise ConfigurationError("a generate_handler= of a plain generator cannot be async")

        @wraps(function)
        def collect(*args: Any, **kwargs: Any) -> list[Any]:
            with closing(function(*args, **kwargs)) as yields:
                return [handler(item) if handler else item for item in yields]

        return collect
    if inspect.isasyncgenfunction(function):
        is_async = inspect.iscoroutinefunction(handler)

        @wraps(function)
        async def collect_async(*args: Any, **kwargs: Any) -> list[Any]:
            results = []
            async with aclosing(function(*args, **kwargs)) as yields:
                async for item in yields:
                    handled = handler(item) if handler else item
                    results.append(await handled if is_async else handled)
            return results

        return collect_async
    if handler is not None:
        raise ConfigurationError("generate_handler= is for generators, which this function is not")
    return function


def result_type(
    function: Callable[..., Any], hints: dict[str, Any], handler: Callable[[Any], Any] | None
) -> Any:
    """Return the type of the result: for a generator, the list of what its handler returns."""
    returns = hints.get("return", Any)
    if returns in (NoReturn, Never):
        return Any
    if not (inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)):
        return returns
    if handler is not None:
        item = hints_of(handler).get("return", Any) if inspect.isroutine(handler) else Any
    else:
        item = (get_args(returns) or (Any,))[0]
    # Items without a type are tagged, as other values without a type are.
    return Any if item is Any else GenericAlias(list, (item,))


def parameter_of_kind(parameters: Sequence[inspect.Parameter], kind: Any) -> str | None:
    """Return the name of the first parameter of a kind."""
    return next((p.name for p in parameters if p.kind is kind), None)


def default_name(function: Callable[..., Any]) -> str:
    """Return `module.qualname`, with the importable name of the module that runs as `__main__`."""
    return f"{importable_module(function)}.{function.__qualname__}"


def importable_module(function: Callable[..., Any]) -> str:
    """Return the name by which a function's module can be imported; `__main__` if it cannot."""
    if function.__module__ != "__main__":
        return function.__module__
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None)
    return spec.name if spec else Path(file).stem if file else "__main__"
