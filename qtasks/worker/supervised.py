"""A worker process's end of the line to its supervisor.

Over a pair of sockets the supervisor asks `?` and is told `r` (ready) or `n`; `r` comes unasked
when the worker has reached its servers. `b` means to give back what runs: a signal cannot say so,
since a service manager that stops all processes of a service sends each its own. `s` says that the
worker stops, `o` that it is over: from then on its process has its time to end.
That the line is cut means that the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

VARIABLE = "QTASKS_SUPERVISED_BY"
"""Holds the number of the socket's file descriptor."""
ASK, READY, NOT_READY, GIVE_BACK, STOPS, OVER = b"?", b"r", b"n", b"b", b"s", b"o"


def is_supervised() -> bool:
    """Say whether this process was started by a supervisor."""
    return VARIABLE in os.environ


class Line:
    """The line while it is open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, word: bytes) -> None:
        """Say one of the words."""
        self._writer.write(word)

    async def answer(self, ready: Callable[[], bool], give_back: Callable[[], None]) -> None:
        """Answer, and do what is asked for, until the supervisor is gone."""
        with suppress(ConnectionError):
            while word := await self._reader.read(1):
                if word == ASK:
                    self.say(READY if ready() else NOT_READY)
                elif word == GIVE_BACK:
                    give_back()

    def close(self) -> None:
        """Cut the line."""
        self._writer.close()


async def connect() -> Line | None:
    """Return the line to the supervisor, None without one. What this process starts has none."""
    descriptor = os.environ.pop(VARIABLE, None)
    if descriptor is None:
        return None
    line = socket.socket(fileno=int(descriptor))
    return Line(*await asyncio.open_unix_connection(sock=line))
