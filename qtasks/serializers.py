"""MessagePack for arguments and results, by msgspec."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
from msgspec.msgpack import Ext

from qtasks_core import Serializer
from qtasks_core.errors import SerializationError

_PLAIN = frozenset({type(None), bool, float, str, bytes})

# Extension codes are part of the wire format: never reuse one.
_TUPLE, _SET, _FROZENSET, _UUID, _DECIMAL, _DATETIME, _DATE, _TIME, _TIMEDELTA, _INT, _COMPLEX = (
    range(1, 12)
)
_SEQUENCES: dict[type, int] = {tuple: _TUPLE, set: _SET, frozenset: _FROZENSET}
_TEXTS: dict[type, tuple[int, Callable[[Any], str]]] = {
    UUID: (_UUID, str),
    Decimal: (_DECIMAL, str),
    datetime: (_DATETIME, datetime.isoformat),
    date: (_DATE, date.isoformat),
    time: (_TIME, time.isoformat),
    timedelta: (_TIMEDELTA, lambda d: f"{d.days} {d.seconds} {d.microseconds}"),
    complex: (_COMPLEX, repr),
}


def _timedelta(text: str) -> timedelta:
    days, seconds, microseconds = map(int, text.split())
    return timedelta(days, seconds, microseconds)


_FROM_TEXT: dict[int, Callable[[str], Any]] = {
    _UUID: UUID,
    _DECIMAL: Decimal,
    _DATETIME: datetime.fromisoformat,
    _DATE: date.fromisoformat,
    _TIME: time.fromisoformat,
    _TIMEDELTA: _timedelta,
    _INT: int,
    _COMPLEX: complex,
}


class MsgpackSerializer(Serializer):
    """The default. Values without an annotation carry tags for what MessagePack cannot tell apart.

    With an annotation msgspec encodes and decodes by it: dataclasses, Structs, TypedDict, unions,
    enums and the standard library's types; pydantic models go through their own validation.
    """

    name = "msgpack"

    def encoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return what makes a value of this annotation ready for `encode`."""
        return _tag if annotation is Any else _as_is

    def encode(self, prepared: Any) -> bytes:
        """Return the bytes of prepared values. Raises `SerializationError`."""
        try:
            return _encoder.encode(prepared)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise SerializationError(str(error)) from error

    def split(self, data: bytes) -> list[Any]:
        """Return the encoded items of an encoded list. Raises `SerializationError`."""
        try:
            return _items.decode(data)
        except msgspec.MsgspecError as error:
            raise SerializationError(str(error)) from error

    def split_pairs(self, data: bytes) -> dict[str, Any]:
        """Return the encoded values of an encoded dict. Raises `SerializationError`."""
        try:
            return _pairs.decode(data)
        except msgspec.MsgspecError as error:
            raise SerializationError(str(error)) from error

    def decoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function from bytes to a value of this type, compiled now."""
        if annotation is Any:
            return _decode_untyped
        try:
            typed = msgspec.msgpack.Decoder(annotation, dec_hook=_from_plain, ext_hook=_untag)
        except TypeError as error:
            raise SerializationError(f"{annotation!r} has no encoding: {error}") from error

        def decode(data: Any) -> Any:
            try:
                return typed.decode(data)
            except msgspec.MsgspecError:
                # A sender that does not know the annotations tags what a typed decoder wants bare.
                value = _decode_untyped(data)
            try:
                return msgspec.convert(value, annotation, dec_hook=_from_plain)
            except msgspec.MsgspecError as error:
                raise SerializationError(str(error)) from error

        return decode


def _as_is(value: Any) -> Any:
    return value


def _tag(value: Any) -> Any:
    """Return the value with tags in it. Raises `SerializationError` for what cannot travel."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else Ext(_INT, str(value).encode())
    if kind is list:
        return [_tag(item) for item in value]
    if kind is dict:
        return {_plain_key(key): _tag(item) for key, item in value.items()}
    if kind in _SEQUENCES:
        return Ext(_SEQUENCES[kind], _encoder.encode([_tag(item) for item in value]))
    if kind in _TEXTS and not _loses_zone(value):
        code, to_text = _TEXTS[kind]
        return Ext(code, to_text(value).encode())
    raise SerializationError(
        f"a {kind.__module__}.{kind.__qualname__} would not come back as it is; "
        "annotate the parameter with its type, or pass plain data"
    )


def _loses_zone(value: Any) -> bool:
    return getattr(value, "tzinfo", None) is not None and type(value.tzinfo) is not timezone


def _plain_key(key: Any) -> Any:
    if type(key) in (str, int, float, bool, bytes, type(None)):
        return key
    raise SerializationError(f"a {type(key).__qualname__} cannot be a key of a dict")


def _untag(code: int, data: memoryview) -> Any:
    if code in _FROM_TEXT:
        return _FROM_TEXT[code](bytes(data).decode())
    if code == _TUPLE:
        return tuple(_untyped.decode(data))
    if code == _SET:
        return set(_untyped.decode(data))
    if code == _FROZENSET:
        return frozenset(_untyped.decode(data))
    raise ValueError(f"unknown extension {code}")


def _to_plain(value: Any) -> Any:
    """Encode what msgspec does not know: pydantic models."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__qualname__} has no encoding")


def _from_plain(annotation: type, value: Any) -> Any:
    """Decode what msgspec does not know: pydantic models."""
    if hasattr(annotation, "model_validate"):
        return annotation.model_validate(value)
    raise TypeError(f"{annotation!r} has no decoding")


def _decode_untyped(data: Any) -> Any:
    try:
        return _untyped.decode(data)
    except (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError) as error:
        raise SerializationError(str(error)) from error


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_untyped = msgspec.msgpack.Decoder(ext_hook=_untag)
_items = msgspec.msgpack.Decoder(list[msgspec.Raw])
_pairs = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
