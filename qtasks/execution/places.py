"""Finding the function of a task in another process, by its module and its qualified name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any

from qtasks.execution.definition import TaskDefinition, TaskOptions
from qtasks.execution.frames import Place
from qtasks.execution.signatures import importable_module
from qtasks_core import Runnable
from qtasks_core.errors import ConfigurationError


def place_of(task: Runnable) -> Place:
    """Return where another process finds a task. Raises `ConfigurationError` if none can."""
    function = task.function
    place = Place(importable_module(function), getattr(function, "__qualname__", "<unknown>"))
    if place.module == "__main__" or "<" in place.qualname:
        raise _unfindable(task.name, place)
    return place


def check(task: Runnable, place: Place) -> None:
    """Raise `ConfigurationError` unless the name refers to the task, or to its bare function.

    Call it after the import of the module: a decorator runs before the module has the name.
    """
    try:
        found = _look_up(sys.modules[task.function.__module__], place.qualname)
    except AttributeError:
        raise _unfindable(task.name, place) from None
    if getattr(found, "definition", None) is not task and (
        _bare(found) is not task.function or _has_handler(task)
    ):
        raise _unfindable(task.name, place)


def definition_at(module: ModuleType, place: Place, name: str) -> TaskDefinition:
    """Return the task of that name at a place in a module. Raises `AttributeError`."""
    found = _look_up(module, place.qualname)
    definition = getattr(found, "definition", None)
    if isinstance(definition, TaskDefinition) and definition.name == name:
        return definition
    return TaskDefinition(_bare(found), name, TaskOptions())


def _look_up(module: ModuleType, qualname: str) -> Any:
    return reduce(getattr, qualname.split("."), module)


def _bare(found: Any) -> Callable[..., Any]:
    definition = getattr(found, "definition", None)
    function: Callable[..., Any] = getattr(definition, "function", found)
    return function


def _has_handler(task: Runnable) -> bool:
    return isinstance(task, TaskDefinition) and task.options.generate_handler is not None


def _unfindable(name: str, place: Place) -> ConfigurationError:
    return ConfigurationError(
        f"task {name}: another process cannot import {place.qualname!r} from {place.module!r}; "
        "a function for a ProcessExecutor stands at the top of a module"
    )
