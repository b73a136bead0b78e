"""The messages between a worker and its child processes, over a pair of sockets."""

from __future__ import annotations

import socket
import struct
from typing import TypeAlias, TypeVar

import msgspec

from qtasks_core import TaskMessage

T = TypeVar("T")


class Place(msgspec.Struct, frozen=True):
    """Where a process finds a function that it has not imported yet."""

    module: str
    qualname: str


class Setting(msgspec.Struct, frozen=True):
    """To the child, first: the import path of the worker."""

    path: list[str]
    python_path: str | None
    """`PYTHONPATH` as the worker has it."""


class RunRequest(msgspec.Struct, frozen=True):
    """To the child: import the function, and if there is a message, call it with that."""

    place: Place
    name: str
    message: TaskMessage | None


class Returned(msgspec.Struct, tag=True, frozen=True):
    """The function returned. Its result is encoded, and empty if the task keeps none."""

    result: bytes


class Raised(msgspec.Struct, tag=True, frozen=True):
    """The function raised."""

    kinds: list[Place]
    """The class of the exception and its base classes, in method resolution order."""
    line: str
    trace: str
    retry_after: float | None


class AskedForRetry(msgspec.Struct, tag=True, frozen=True):
    """The function raised `Retry`."""

    after: float | None


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """The function raised `Reject`."""

    reason: str


class NotCallable(msgspec.Struct, tag=True, frozen=True):
    """The arguments do not fit the function."""

    reason: str


class NotStorable(msgspec.Struct, tag=True, frozen=True):
    """The result has no encoding."""

    reason: str


Answer: TypeAlias = Returned | Raised | AskedForRetry | Rejected | NotCallable | NotStorable

_LENGTH = struct.Struct("!Q")
LARGEST = 64 * 2**20
"""Most bytes of a result from a child: the worker that reads it runs other tasks too."""
_CHUNK = 1 << 20
_encoder = msgspec.msgpack.Encoder()


def send(line: socket.socket, frame: msgspec.Struct) -> None:
    """Send a frame. Raises `OSError` when the other end is gone."""
    body = _encoder.encode(frame)
    line.sendall(_LENGTH.pack(len(body)) + body)


def receive(
    line: socket.socket, decoder: msgspec.msgpack.Decoder[T], most: int | None = None
) -> T | None:
    """Wait for a frame; None when the other end is gone.

    Raises `DecodeError` for bytes that are no frame, and for a frame of more than `most` bytes.
    """
    try:
        if (head := _read(line, _LENGTH.size)) is None:
            return None
        (size,) = _LENGTH.unpack(head)
        if most is not None and size > most:
            raise msgspec.DecodeError(f"a frame of {size} bytes")
        body = _read(line, size)
    except ConnectionError:
        return None
    return decoder.decode(body) if body else None


def _read(line: socket.socket, size: int) -> bytearray | None:
    data = bytearray()
    while len(data) < size:
        part = line.recv(min(size - len(data), _CHUNK))
        if not part:
            return None
        data += part
    return data
