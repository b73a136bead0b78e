"""The connection of a worker process to its supervisor: a pair of sockets, one byte a message.

From the supervisor: `?` asks whether the worker is ready, and `b` tells it to release what runs.
That is no signal, because a service manager that stops a service sends a signal to each process.
From the worker: `r` (ready) or `n` is the answer, and `r` also comes unasked once the worker has
reached its servers; `s` says that it stops, `o` that it has ended and its process exits now.
A closed connection means that the other process is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

VARIABLE = "QTASKS_SUPERVISED_BY"
"""The environment variable with the number of the socket's file descriptor."""
ASK, READY, NOT_READY, GIVE_BACK, STOPS, OVER = b"?", b"r", b"n", b"b", b"s", b"o"


def is_supervised() -> bool:
    """Return whether this process was started by a supervisor."""
    return VARIABLE in os.environ


class Line:
    """The connection to the supervisor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, word: bytes) -> None:
        """Send one of the messages."""
        self._writer.write(word)

    async def answer(self, ready: Callable[[], bool], release: Callable[[], None]) -> None:
        """Answer the supervisor and carry out its messages until it is gone."""
        with suppress(ConnectionError):
            while word := await self._reader.read(1):
                if word == ASK:
                    self.say(READY if ready() else NOT_READY)
                elif word == GIVE_BACK:
                    release()

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


async def connect() -> Line | None:
    """Return the connection to the supervisor, or None. Processes started from here have none."""
    descriptor = os.environ.pop(VARIABLE, None)
    if descriptor is None:
        return None
    line = socket.socket(fileno=int(descriptor))
    return Line(*await asyncio.open_unix_connection(sock=line))
