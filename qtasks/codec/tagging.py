"""Tags for types that MessagePack does not have, for values without an annotation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import reduce
from typing import Any, TypeAlias
from uuid import UUID

import msgspec
from msgspec import inspect, structs
from msgspec.msgpack import Ext

from qtasks_core.errors import SerializationError

_PLAIN = frozenset({type(None), bool, float, str, bytes})
_KEYS = _PLAIN | {int}

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


def tag(value: Any) -> Any:
    """Return the value with tags in it.

    Raises `SerializationError` if it has a part that would not come back as it was.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else Ext(_INT, str(value).encode())
    if kind is list:
        return [tag(item) for item in value]
    if kind is dict:
        return {_plain_key(key): tag(item) for key, item in value.items()}
    if kind in _SEQUENCES:
        return Ext(_SEQUENCES[kind], _encoder.encode([tag(item) for item in value]))
    if kind in _TEXTS:
        _refuse_loss(value)
        code, to_text = _TEXTS[kind]
        return Ext(code, to_text(value).encode())
    raise SerializationError(
        f"a {kind.__module__}.{kind.__qualname__} would not come back as it is; "
        "annotate it with its type, or use plain data"
    )


def tag_or(value: Any, other: Any) -> Any:
    """Return the value with tags in it; parts that have no tag are taken from `other`.

    `other` is the same value in its JSON form.
    """
    kind, alike = type(value), _size(value) == _size(other)
    if kind is dict and alike:
        return {
            key if type(key) in _KEYS else text: tag_or(item, there)
            for (key, item), (text, there) in zip(value.items(), other.items(), strict=True)
        }
    if kind in (list, tuple) and alike:
        items = [tag_or(item, there) for item, there in zip(value, other, strict=True)]
        return items if kind is list else Ext(_TUPLE, _encoder.encode(items))
    try:
        return tag(value)
    except SerializationError:
        if hasattr(value, "get_secret_value") and set(str(other)) == {"*"}:
            raise SerializationError(
                f"a {kind.__qualname__} would come back as its mask, ***; give its field a "
                "serializer that reveals it in JSON, or pass the secret in another way"
            ) from None
        return other


def _size(value: Any) -> tuple[bool, int]:
    return isinstance(value, dict), len(value) if isinstance(value, dict | list | tuple) else -1


def _refuse_loss(value: Any) -> None:
    zone = getattr(value, "tzinfo", None)
    if zone is not None and type(zone) is not timezone:
        raise SerializationError(
            f"a {type(value).__name__} in {zone} would come back without the rules of its zone; "
            "pass it in UTC, and pass the name of the zone as another argument"
        )
    if getattr(value, "fold", 0):
        raise SerializationError(
            f"a {type(value).__name__} with fold=1 would come back without it; pass it in UTC"
        )


def _plain_key(key: Any) -> Any:
    if type(key) in _KEYS:
        return key
    raise SerializationError(
        f"a {type(key).__qualname__} cannot be a key of a dict; "
        "use str, int, float, bool, bytes or None"
    )


def untag(code: int, data: memoryview) -> Any:
    """Return the value of a tag. Raises `ValueError` for an unknown one."""
    if code in _FROM_TEXT:
        return _FROM_TEXT[code](bytes(data).decode())
    if code == _TUPLE:
        return tuple(_decoder.decode(data))
    if code == _SET:
        return set(_decoder.decode(data))
    if code == _FROZENSET:
        return frozenset(_decoder.decode(data))
    raise ValueError(f"unknown MessagePack extension {code}; a newer release may have written it")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ext_hook=untag)
_Tagger: TypeAlias = Callable[[Any], Any]


def tagger(annotation: Any) -> _Tagger | None:
    """Return a function that tags the parts of a value that this annotation leaves open (`Any`).

    None if the annotation leaves nothing open. The function returns a new value; parts that do not
    fit the annotation are left as they are.
    """
    kind = inspect.type_info(annotation)
    return _Compiler().tagger(kind) if _is_open(kind) else None


def kinds_in(annotation: Any) -> list[inspect.Type]:
    """Return msgspec's types for an annotation and everything inside it, each once."""
    return _all_in(inspect.type_info(annotation))


def _all_in(kind: inspect.Type) -> list[inspect.Type]:
    found: dict[int, inspect.Type] = {}
    left = [kind]
    while left:
        kind = left.pop()
        if id(kind) not in found:  # a type may contain itself
            found[id(kind)] = kind
            left += _parts(kind)
    return list(found.values())


def _is_open(kind: inspect.Type) -> bool:
    """Tell whether a type has `Any` or `object` in it."""
    return any(map(_is_any, _all_in(kind)))


def _is_any(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.CustomType):
        return kind.cls is object
    return isinstance(kind, inspect.AnyType)


def _parts(kind: inspect.Type) -> list[inspect.Type]:
    match kind:
        case (
            inspect.StructType()
            | inspect.DataclassType()
            | inspect.TypedDictType()
            | inspect.NamedTupleType()
        ):
            return [field.type for field in kind.fields]
        case (
            inspect.ListType()
            | inspect.SetType()
            | inspect.FrozenSetType()
            | inspect.VarTupleType()
        ):
            return [kind.item_type]
        case inspect.TupleType():
            return list(kind.item_types)
        case inspect.DictType():
            return [kind.key_type, kind.value_type]
        case inspect.UnionType():
            return list(kind.types)
    return []


class _Compiler:
    """Builds taggers for open types. A type that contains itself uses its own tagger inside."""

    def __init__(self) -> None:
        self._made: dict[int, _Tagger | None] = {}

    def tagger(self, kind: inspect.Type) -> _Tagger | None:
        """Return the tagger of a type; None if it is not open."""
        if not _is_open(kind):
            return None
        if id(kind) in self._made:
            return lambda value: (self._made[id(kind)] or _as_is)(value)
        self._made[id(kind)] = None
        made = self._made[id(kind)] = self._make(kind)
        return made

    def _make(self, kind: inspect.Type) -> _Tagger:
        if _is_any(kind):
            return tag
        match kind:
            case inspect.UnionType():
                return self._union(kind)
            case inspect.DictType():
                return self._dict(kind)
            case inspect.TupleType():
                return self._tuple(kind)
            case (
                inspect.StructType()
                | inspect.DataclassType()
                | inspect.TypedDictType()
                | inspect.NamedTupleType()
            ):
                return self._fields(kind)
        (item,) = _parts(kind)
        return self._items(item)

    def _union(self, kind: inspect.UnionType) -> _Tagger:
        if any(map(_is_any, kind.types)):
            return tag
        taggers = [made for part in kind.types if (made := self.tagger(part))]

        def tag_union(value: Any) -> Any:
            # Each tagger leaves the values of the other types as they are.
            return reduce(lambda tagged, tagger: tagger(tagged), taggers, value)

        return tag_union

    def _dict(self, kind: inspect.DictType) -> _Tagger:
        of_key = _plain_key if _is_any(kind.key_type) else _as_is
        of_value = self.tagger(kind.value_type) or _as_is

        def tag_dict(value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            return {of_key(key): of_value(item) for key, item in value.items()}

        return tag_dict

    def _tuple(self, kind: inspect.TupleType) -> _Tagger:
        taggers = [self.tagger(part) or _as_is for part in kind.item_types]

        def tag_tuple(value: Any) -> Any:
            if not isinstance(value, tuple | list) or len(value) != len(taggers):
                return value
            return [tagger(item) for tagger, item in zip(taggers, value, strict=True)]

        return tag_tuple

    def _items(self, item: inspect.Type) -> _Tagger:
        of_item = self.tagger(item) or _as_is

        def tag_items(value: Any) -> Any:
            if not isinstance(value, list | tuple | set | frozenset):
                return value
            return [of_item(item) for item in value]

        return tag_items

    def _fields(
        self,
        kind: inspect.StructType
        | inspect.DataclassType
        | inspect.TypedDictType
        | inspect.NamedTupleType,
    ) -> _Tagger:
        cls = getattr(kind.cls, "__origin__", kind.cls)
        own = dict if isinstance(kind, inspect.TypedDictType) else cls
        taggers = {f.name: made for f in kind.fields if (made := self.tagger(f.type))}

        def tag_fields(value: Any) -> Any:
            if not isinstance(value, own):
                return value
            if isinstance(value, dict):
                return value | {k: made(value[k]) for k, made in taggers.items() if k in value}
            tagged = {name: made(getattr(value, name)) for name, made in taggers.items()}
            return _with(value, tagged)

        return tag_fields


def _with(value: Any, fields: Mapping[str, Any]) -> Any:
    """Return a copy with other values in these fields. It skips validation: it is only encoded."""
    if isinstance(value, tuple):
        return value._replace(**fields)  # type: ignore[attr-defined]
    other = copy.copy(value)
    put = structs.force_setattr if isinstance(other, msgspec.Struct) else object.__setattr__
    for name, field in fields.items():
        put(other, name, field)
    return other


def _as_is(value: Any) -> Any:
    return value
