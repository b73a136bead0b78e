"""MessagePack for arguments and results, by msgspec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from qtasks.tagging import tag, tagger, untag
from qtasks_core import Serializer
from qtasks_core.errors import SerializationError

_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: bool,
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
}
"""Each with what makes it plain: classes derived from them have no encoding."""
_ALSO: dict[Any, tuple[type, ...]] = {float: (int,), bytes: (bytearray, memoryview)}
"""What is encoded alike."""


class MsgpackSerializer(Serializer):
    """The default. Values without an annotation carry tags for what MessagePack cannot tell apart.

    With an annotation msgspec encodes and decodes by it: dataclasses, Structs, TypedDict, unions,
    enums and the standard library's types. Pydantic models (2.11 or later) go through their own
    JSON and validation. Of a datetime with a zone it is the moment that arrives, in UTC.
    """

    name = "msgpack"

    def encoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return what makes a value of this annotation ready for `encode`.

        It refuses what a plain scalar annotation does not allow; of others, decoding does.
        Raises `SerializationError` for an annotation that no value can be decoded by.
        """
        if annotation is Any or annotation is object:
            return tag
        if annotation in _SCALARS:
            return _scalar(annotation)
        try:
            return tagger(annotation) or _as_is
        except TypeError as error:
            raise SerializationError(f"{annotation!r} has no encoding: {error}") from error

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
        except TypeError as error:
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


def _scalar(annotation: type) -> Callable[[Any], Any]:
    plain, also = _SCALARS[annotation], _ALSO.get(annotation, ())

    def check(value: Any) -> Any:
        if type(value) is annotation:
            return value
        if not isinstance(value, bool):  # which is an int, but not taken for one
            if isinstance(value, annotation):
                return plain(value)
            if isinstance(value, also):
                return value
        raise SerializationError(f"Expected `{annotation.__name__}`, got `{type(value).__name__}`")

    return check


def _to_plain(value: Any) -> Any:
    """Encode what msgspec does not know: pydantic models."""
    if hasattr(value, "model_dump"):
        # What is computed from the other fields would not be taken as a field again.
        return value.model_dump(mode="json", round_trip=True)
    raise TypeError(f"a {type(value).__qualname__} has no encoding")


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
        # Strict models take the text of a UUID or a date from JSON only.
        return annotation.model_validate_json(msgspec.json.encode(value), by_name=True)


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
