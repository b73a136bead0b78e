"""Counts how often a process waits for an answer of a server, by watching its sockets."""

from __future__ import annotations

from asyncio import selector_events
from collections.abc import Callable
from typing import Any


class Waits:
    """Counts answers: reads on a connection that has written since its last read.

    A batch counts once, even if it is written and answered in several pieces. What a server pushes
    without a request does not count. Install it before connections are opened.
    """

    def __init__(self) -> None:
        self.count = 0
        self._asked: set[int] = set()

    def install(self) -> None:
        """Watch every socket of asyncio's selector loop from now on."""
        transport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
        for name in ("write", "writelines"):
            setattr(transport, name, self._noting(getattr(transport, name), self._wrote))
        transport._read_ready = self._noting(transport._read_ready, self._read)

    def _noting(self, method: Callable[..., Any], note: Callable[[int], None]) -> Any:
        def noted(transport: Any, *args: Any) -> Any:
            note(id(transport))
            return method(transport, *args)

        return noted

    def _wrote(self, transport: int) -> None:
        self._asked.add(transport)

    def _read(self, transport: int) -> None:
        if transport in self._asked:
            self._asked.discard(transport)
            self.count += 1
