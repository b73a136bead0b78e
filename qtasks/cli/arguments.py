"""Reads the arguments of a task from a shell: JSON values, converted to the annotated types.

Text that is not a JSON value of the annotated type is converted as it is: `2030-01-31` for a date.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_type_hints

import msgspec

from qtasks.codec.serializers import from_plain
from qtasks.execution.definition import TaskDefinition
from qtasks_core.errors import SerializationError, SignatureMismatch

_KEYWORD = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def read_arguments(
    definition: TaskDefinition, texts: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the keyword arguments of `1 '"text"' name=JSON …`.

    Raises `SignatureMismatch` if they do not fit the function, and `SerializationError` with the
    argument's name if a value does not fit its type.
    """
    args: list[str] = []
    kwargs: dict[str, str] = {}
    for text in texts:
        if keyword := _KEYWORD.fullmatch(text):
            if keyword[1] in kwargs:
                message = f"{definition.name}: argument {keyword[1]!r} is given twice"
                raise SignatureMismatch(message)
            kwargs[keyword[1]] = keyword[2]
        else:
            args.append(text)
    try:
        bound = definition.signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SignatureMismatch(f"{definition.name}{definition.signature}: {error}") from None
    try:
        hints = get_type_hints(definition.function)
    except NameError:
        hints = {}
    for name, parameter in definition.signature.parameters.items():
        if name not in bound.arguments:
            continue
        value, kind = bound.arguments[name], hints.get(name, Any)
        if parameter.kind is parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(_read(definition, name, text, kind) for text in value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            read = {key: _read(definition, key, text, kind) for key, text in value.items()}
            bound.arguments[name] = read
        else:
            bound.arguments[name] = _read(definition, name, value, kind)
    return list(bound.args), bound.kwargs


def _read(definition: TaskDefinition, name: str, text: str, kind: Any) -> Any:
    try:
        value = msgspec.json.decode(text)
        wrong = None
    except msgspec.DecodeError:
        wrong = f"{text} is not JSON; write text in quotes, '\"like this\"'"
    if kind is Any:
        if wrong is None:
            return value
    else:
        if wrong is None:
            try:
                return msgspec.convert(value, kind, dec_hook=from_plain)
            except (TypeError, ValueError) as error:
                wrong = str(error)
        try:
            return msgspec.convert(text, kind, dec_hook=from_plain)
        except (TypeError, ValueError) as error:
            # A type that is written as text (a date, a UUID) explains better what is wrong with
            # it than the attempt to read it as JSON.
            if not str(error).startswith("Expected `"):
                wrong = str(error)
    raise SerializationError(f"{definition.name}: argument {name!r}: {wrong}")
