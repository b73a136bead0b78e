"""The contract of a Serializer: how arguments and results become bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class Serializer(ABC):
    """Encodes values so that they come back as they were, or refuses them.

    With a type, encoding and decoding follow the annotation. Without one (`Any`), what would
    change its type on the way is tagged, or refused.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What `TaskMessage.encoding` says, a stable name."""

    @abstractmethod
    def encoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function that makes a value of this annotation ready for `encode`.

        That function raises `SerializationError` for what cannot travel.
        """

    @abstractmethod
    def encode(self, prepared: Any) -> bytes:
        """Return the bytes of prepared values (a list, a dict or one value)."""

    @abstractmethod
    def split(self, data: bytes) -> list[Any]:
        """Return the encoded items of an encoded list, each fit for a decoder."""

    @abstractmethod
    def split_pairs(self, data: bytes) -> dict[str, Any]:
        """Return the encoded values of an encoded dict, each fit for a decoder."""

    @abstractmethod
    def decoder(self, annotation: Any) -> Callable[[Any], Any]:
        """Return a function from encoded bytes to a value of this type, compiled once.

        That function raises `SerializationError` when the bytes do not fit the type.
        """
