"""The socket below the driver, with our own reader. Imports the driver; see `connection.py`."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from aiormq.connection import TransportFactory
from yarl import URL

from qtasks_rabbitmq.frames import FrameReader


class Transport(TransportFactory):
    """Opens the socket of one connection."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self.reader: FrameReader | None = None

    async def create(
        self, url: URL, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect. Raises the socket's errors, and `ValueError` for a URL without a host."""
        if url.host is None or url.port is None:
            raise ValueError("host and port was not specified")
        loop = asyncio.get_running_loop()
        self.reader = reader = FrameReader()
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.create_connection(
            lambda: protocol, url.host, url.port, ssl=self._context
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
