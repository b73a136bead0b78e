"""The default serializer: MessagePack for arguments and results, with msgspec."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import msgspec
from msgspec import inspect as kinds

from qtasks.codec.tagging import kinds_in, tag, tag_or, tagger, untag
from qtasks_core import Serializer
from qtasks_core.errors import SerializationError

_SCALARS: dict[Any, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: bool,
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
}
"""Plain types, each with a function that removes a subclass: msgspec cannot encode subclasses."""
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
    bytearray: bytes,
    Decimal: Decimal,
    datetime: lambda value: datetime.combine(datetime.date(value), datetime.timetz(value)),
    date: lambda value: date.fromordinal(date.toordinal(value)),
    time: lambda value: datetime.timetz(datetime.combine(date.min, value)),
    timedelta: lambda value: timedelta.__add__(value, timedelta()),
}
"""The same for scalars inside other values. `datetime` stands before `date`, its base class."""
_ALSO: dict[Any, tuple[type, ...]] = {float: (int,), bytes: (bytearray, memoryview)}
"""Other types that an annotation accepts, because they are encoded in the same way."""
_STANDARD = (
    kinds.NoneType, kinds.BoolType, kinds.IntType, kinds.FloatType, kinds.StrType,
    kinds.BytesType, kinds.ByteArrayType, kinds.MemoryViewType, kinds.DateTimeType,
    kinds.DateType, kinds.TimeType, kinds.TimeDeltaType, kinds.UUIDType, kinds.DecimalType,
    kinds.EnumType, kinds.LiteralType, kinds.ListType, kinds.SetType, kinds.FrozenSetType,
    kinds.VarTupleType, kinds.TupleType, kinds.DictType, kinds.UnionType,
)  # fmt: skip
_NO_TYPE = (TypeError, NameError, AttributeError)
"""Raised for an annotation that is not a type, or has a field whose type cannot be resolved."""


class MsgpackSerializer(Serializer):
    """The default serializer.

    Without an annotation, values carry tags for the types that MessagePack does not have, such as
    tuples and UUIDs, so they come back as they were. With an annotation, msgspec encodes and
    decodes by it: dataclasses, Structs, TypedDict, unions, enums and types of the standard library.
    Pydantic models (2.11 or later) are dumped and validated by pydantic. A datetime with a time
    zone comes back as the same moment in UTC.
    """

    name = "msgpack"

    def encoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function that prepares a value of this annotation for `encode`.

        It raises `SerializationError` for a value that does not fit an annotation made of scalars,
        unions and standard collections. For other annotations, a wrong value is found when it is
        decoded. Raises `SerializationError` for an annotation that cannot be decoded.
        """
        if annotation is Any or annotation is object:
            return tag
        if annotation is None:
            annotation = type(None)
        try:
            if annotation in _SCALARS:
                return _scalar(annotation)
            if not _can_be_decoded(annotation):
                return partial(_refuse, annotation)
            if tags := tagger(annotation):
                return tags
            return self._checked(annotation) if _is_standard(annotation) else _as_is
        except _NO_TYPE as error:
            raise SerializationError(f"{annotation!r} has no encoding: {error}") from error

    def _checked(self, annotation: Any) -> Callable[[Any], Any]:
        decode = self.decoder(annotation)

        def check(value: Any) -> msgspec.Raw:
            data = self.encode(value)
            decode(data)
            return msgspec.Raw(data)

        return check

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
        except (msgspec.MsgspecError, RecursionError) as error:
            raise SerializationError(str(error)) from error

    def split_pairs(self, data: bytes) -> dict[str, Any]:
        """Return the encoded values of an encoded dict. Raises `SerializationError`."""
        try:
            return _pairs.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise SerializationError(str(error)) from error

    def decoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function that decodes bytes into a value of this type. It is compiled now.

        Raises `SerializationError` for a type that has no encoding. The function raises it for
        bytes that do not fit the type.
        """
        if annotation is Any or annotation is object:
            return _decode_untyped
        try:
            typed = msgspec.msgpack.Decoder(annotation, dec_hook=from_plain, ext_hook=untag)
        except _NO_TYPE as error:
            raise SerializationError(f"{annotation!r} has no encoding: {error}") from error

        def decode(data: Any) -> Any:
            try:
                return typed.decode(data)
            except (msgspec.MsgspecError, RecursionError):
                # A sender without the annotations tags values that the typed decoder expects
                # without tags.
                value = _decode_untyped(data)
            try:
                return msgspec.convert(value, annotation, dec_hook=from_plain)
            except msgspec.MsgspecError as error:
                raise SerializationError(str(error)) from error

        return decode


def _as_is(value: Any) -> Any:
    return value


def _can_be_decoded(annotation: Any) -> bool:
    kind = msgspec.inspect.type_info(annotation)
    return not isinstance(kind, msgspec.inspect.CustomType) or hasattr(kind.cls, "model_validate")


def _is_standard(annotation: Any) -> bool:
    """Tell whether decoding by this annotation builds only types of the standard library."""
    return all(isinstance(kind, _STANDARD) for kind in kinds_in(annotation))


def _refuse(annotation: Any, value: Any) -> Any:
    raise SerializationError(f"{annotation!r} has no encoding")


def _scalar(annotation: type) -> Callable[[Any], Any]:
    plain, also = _SCALARS[annotation], _ALSO.get(annotation, ())
    name = "null" if annotation is type(None) else annotation.__name__

    def check(value: Any) -> Any:
        if type(value) is annotation:
            return value
        if not isinstance(value, bool):  # a bool is an int, but is not accepted as one
            if isinstance(value, annotation):
                return plain(value)
            if isinstance(value, also):
                return value
        raise SerializationError(f"Expected `{name}`, got `{type(value).__name__}`")

    return check


def _to_plain(value: Any) -> Any:
    """Encode what msgspec does not know: pydantic models, and subclasses of scalars."""
    for scalar, plain in _PLAIN.items():
        if isinstance(value, scalar):
            return plain(value)
    if not hasattr(value, "model_dump"):
        raise TypeError(f"a {type(value).__qualname__} has no encoding")
    # `round_trip` leaves out computed fields: validation would refuse them.
    dump = partial(value.model_dump, round_trip=True)
    try:
        fields = dump()
    except TypeError:
        return dump(mode="json")  # a set of models: dumped they are dicts, which no set can hold
    try:
        # JSON would change the types of values in fields that are `Any` or a union.
        return tag(fields)
    except SerializationError:
        return tag_or(fields, dump(mode="json", warnings=False))


def from_plain(annotation: Any, value: Any) -> Any:
    """Decode what msgspec does not know: pydantic models, and `object` within other types."""
    if annotation is object:
        return value
    if not hasattr(annotation, "model_validate"):
        raise TypeError(f"{annotation!r} has no decoding")
    try:
        # By name, as `_to_plain` writes it. Aliases are accepted too: other senders may use them.
        return annotation.model_validate(value, by_name=True)
    except ValueError:
        from pydantic_core import to_json

        # Strict models accept text for a path or an enum only from JSON.
        return annotation.model_validate_json(to_json(value), by_name=True)


def _decode_untyped(data: Any) -> Any:
    try:
        return _untyped.decode(data)
    except (
        msgspec.MsgspecError, TypeError, ValueError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        raise SerializationError(str(error)) from error


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_untyped = msgspec.msgpack.Decoder(ext_hook=untag)
_items = msgspec.msgpack.Decoder(list[msgspec.Raw])
_pairs = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
