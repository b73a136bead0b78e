"""The wire format: a version byte, then a MessagePack map of the struct's fields.

Fields with their default value are left out, and unknown fields are ignored. So two releases can
share a queue. A change that an older release could not read increases the version byte. Golden
vectors in `tests/unit/golden/` pin the bytes.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from qtasks_core.errors import WireError
from qtasks_core.names import is_name
from qtasks_core.schemas import Command, Raw, Task, TaskMessage

VERSION = 1
_HEADER = bytes([VERSION])

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_message_decoder = msgspec.msgpack.Decoder(TaskMessage)
_task_decoder = msgspec.msgpack.Decoder(Task)
_command_decoder = msgspec.msgpack.Decoder(Command)


def encode_message(message: TaskMessage) -> bytes:
    """Return the bytes of a message."""
    return _HEADER + _encoder.encode(message)


def decode_message(data: bytes) -> TaskMessage | Raw:
    """Return the message in `data`, or a `Raw` that says why there is none. Never raises."""
    if data[:1] != _HEADER:
        return Raw(bytes(data), _wrong_version(data))
    try:
        message = _message_decoder.decode(memoryview(data)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return Raw(bytes(data), str(error))
    if not is_name(message.queue):
        # A retry would go to this queue, and brokers rely on checked names.
        return Raw(bytes(data), f"{message.queue[:120]!r} is no name of a queue")
    # The decoder has checked the length, and accepts only UTF-8.
    if "\0" in message.uuid:
        return Raw(bytes(data), "the uuid has a NUL")
    if message.reply_to is not None and "\0" in message.reply_to:
        return Raw(bytes(data), "reply_to has a NUL")
    return message


def encode_task(task: Task) -> bytes:
    """Return the bytes of a record."""
    return _HEADER + _encoder.encode(task)


def decode_task(data: bytes) -> Task:
    """Return the record in `data`. Raises `WireError` when there is none."""
    return _decode(_task_decoder, data)


def encode_command(command: Command) -> bytes:
    """Return the bytes of a command."""
    return _HEADER + _encoder.encode(command)


def decode_command(data: bytes) -> Command:
    """Return the command in `data`. Raises `WireError` when there is none."""
    return _decode(_command_decoder, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    if data[:1] != _HEADER:
        raise WireError(_wrong_version(data))
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(str(error)) from error


def _wrong_version(data: bytes) -> str:
    if not data:
        return "empty"
    return f"wire format {data[0]}, this release reads {VERSION}"
