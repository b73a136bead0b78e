"""A probe for containers: HTTP in a few lines that answers `/live` and `/ready`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from qtasks_core.errors import ConfigurationError

_PATIENCE = 5.0
"""Seconds in which a client has to send its request and read the answer."""
_LARGEST = 8192


async def answer_probes(
    host: str, port: int, ready: Callable[[], Awaitable[bool]]
) -> asyncio.Server:
    """Listen until the server is closed. Raises `ConfigurationError` if it cannot listen.

    `/live` always answers 200; `/ready` answers 200 or 503.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A probe may disconnect, or send nothing.
        with suppress(
            OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            async with asyncio.timeout(_PATIENCE):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(await _response(request, ready))
                await writer.drain()
        writer.close()

    try:
        return await asyncio.start_server(answer, host, port, limit=_LARGEST)
    except (OSError, OverflowError) as error:  # OverflowError: the port is out of range
        raise ConfigurationError(f"the health probe cannot listen: {error}") from error


async def _response(request: bytes, ready: Callable[[], Awaitable[bool]]) -> bytes:
    words = request.split(b"\r\n", 1)[0].split(b" ")
    path = words[1].split(b"?")[0] if len(words) == 3 else b""
    if path == b"/live":
        status, text = "200 OK", "live"
    elif path == b"/ready":
        fine = await ready()
        status, text = ("200 OK", "ready") if fine else ("503 Service Unavailable", "not ready")
    else:
        status, text = "404 Not Found", "/live or /ready"
    body = "" if words[0] == b"HEAD" else f"{text}\n"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(text) + 1}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()
