"""The contract of a Serializer: how arguments and results become bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class Serializer(ABC):
    """Encodes values so that they come back unchanged, or refuses them.

    With a type, encoding and decoding follow the annotation. Without a type (`Any`), the serializer
    tags or refuses a value whose type would change on the way.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """A stable name, the value of `TaskMessage.encoding`."""

    @abstractmethod
    def encoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function that prepares a value of this annotation for `encode`.

        That function raises `SerializationError` for a value that cannot be encoded.
        """

    @abstractmethod
    def encode(self, prepared: Any) -> bytes:
        """Return the bytes of prepared values (a list, a dict or one value)."""

    @abstractmethod
    def split(self, data: bytes) -> list[Any]:
        """Return the encoded items of an encoded list, each ready for a decoder."""

    @abstractmethod
    def split_pairs(self, data: bytes) -> dict[str, Any]:
        """Return the encoded values of an encoded dict, each ready for a decoder."""

    @abstractmethod
    def decoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function that decodes bytes into a value of this type. It is compiled once.

        That function raises `SerializationError` if the bytes do not fit the type.
        """
