"""MessagePack for arguments and results, by msgspec."""

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
"""Each with what makes it plain: msgspec has no encoding of classes derived from them."""
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
"""The same for all scalars, wherever they are in a value. A datetime is a date too."""
_ALSO: dict[Any, tuple[type, ...]] = {float: (int,), bytes: (bytearray, memoryview)}
"""What is encoded alike."""
_STANDARD = (
    kinds.NoneType, kinds.BoolType, kinds.IntType, kinds.FloatType, kinds.StrType,
    kinds.BytesType, kinds.ByteArrayType, kinds.MemoryViewType, kinds.DateTimeType,
    kinds.DateType, kinds.TimeType, kinds.TimeDeltaType, kinds.UUIDType, kinds.DecimalType,
    kinds.EnumType, kinds.LiteralType, kinds.ListType, kinds.SetType, kinds.FrozenSetType,
    kinds.VarTupleType, kinds.TupleType, kinds.DictType, kinds.UnionType,
)  # fmt: skip
_NO_TYPE = (TypeError, NameError, AttributeError)
"""What an annotation leads to that is no type, or one with a field whose type is not found."""


class MsgpackSerializer(Serializer):
    """The default. Values without an annotation carry tags for what MessagePack cannot tell apart.

    With an annotation msgspec encodes and decodes by it: dataclasses, Structs, TypedDict, unions,
    enums and the standard library's types. Pydantic models (2.11 or later) go through their own
    validation, as plain data where there is a tag for it, else as their own JSON. Of a datetime
    with a zone it is the moment that arrives, in UTC.
    """

    name = "msgpack"

    def encoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return what makes a value of this annotation ready for `encode`.

        It refuses what the annotation does not allow where that consists of scalars, unions and the
        standard collections; of others, decoding does.
        Raises `SerializationError` for an annotation that no value can be decoded by.
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
        """Return a function from bytes to a value of this type, compiled now.

        Raises `SerializationError` for a type that has no encoding.
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
                # A sender that does not know the annotations tags what a typed decoder wants bare.
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
    """Say whether decoding a value builds nothing but what the standard library has."""
    return all(isinstance(kind, _STANDARD) for kind in kinds_in(annotation))


def _refuse(annotation: Any, value: Any) -> Any:
    raise SerializationError(f"{annotation!r} has no encoding")


def _scalar(annotation: type) -> Callable[[Any], Any]:
    plain, also = _SCALARS[annotation], _ALSO.get(annotation, ())
    name = "null" if annotation is type(None) else annotation.__name__

    def check(value: Any) -> Any:
        if type(value) is annotation:
            return value
        if not isinstance(value, bool):  # which is an int, but not taken for one
            if isinstance(value, annotation):
                return plain(value)
            if isinstance(value, also):
                return value
        raise SerializationError(f"Expected `{name}`, got `{type(value).__name__}`")

    return check


def _to_plain(value: Any) -> Any:
    """Encode what msgspec does not know: pydantic models, and classes derived from a scalar's."""
    for scalar, plain in _PLAIN.items():
        if isinstance(value, scalar):
            return plain(value)
    if not hasattr(value, "model_dump"):
        raise TypeError(f"a {type(value).__qualname__} has no encoding")
    # What is computed from the other fields would not be taken as a field again.
    dump = partial(value.model_dump, round_trip=True)
    try:
        fields = dump()
    except TypeError:
        return dump(mode="json")  # a set of models: they are dicts then, which no set holds
    try:
        # JSON would change the types of what an `Any` or a union in the model leaves open.
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
        # By name, as it was encoded; by the aliases too, as other senders may write it.
        return annotation.model_validate(value, by_name=True)
    except ValueError:
        from pydantic_core import to_json

        # Strict models take the text of a path or an enum from JSON only.
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
