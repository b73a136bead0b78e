"""What a URL says: the servers to try, and the options of their connections."""

from __future__ import annotations

import asyncio
import binascii
import ssl
from base64 import b64decode
from collections.abc import Mapping
from urllib.parse import parse_qsl

from qtasks_core.errors import ConfigurationError
from qtasks_core.urls import redact, split

OPTIONS = ("auth", "cadata", "cafile", "capath", "certfile", "keyfile", "no_verify_ssl")
"""What a connection takes from the query of a URL."""
MECHANISMS = ("plain", "external")


class Server:
    """One server of a URL."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self.url = url
        self._options = options
        self._context: ssl.SSLContext | None = None

    async def context(self) -> ssl.SSLContext | None:
        """Return how to speak TLS, or None for a URL without it.

        Raises `ConfigurationError` if a file that it names cannot be used.
        """
        if self._context is None and self.url.startswith("amqps:"):
            # Reads files.
            self._context = await asyncio.to_thread(self._make_context)
        return self._context

    def _make_context(self) -> ssl.SSLContext:
        options = self._options
        try:
            data = b64decode(options["cadata"]) if "cadata" in options else None
            context = ssl.create_default_context(
                cafile=options.get("cafile"), capath=options.get("capath"), cadata=data
            )
            if "certfile" in options:
                context.load_cert_chain(options["certfile"], options.get("keyfile"))
        except (OSError, binascii.Error) as error:
            names = [name for name in OPTIONS if name in options and name != "cadata"]
            named = ", ".join(f"{name}={options[name]}" for name in names) or "cadata"
            raise ConfigurationError(
                f"{redact(self.url)}: the certificates of {named} cannot be used: {error}"
            ) from error
        if options.get("no_verify_ssl", "0") != "0":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def servers_of(url: str) -> list[Server]:
    """Return the servers of `amqp://USER:PASSWORD@HOST:PORT,HOST:PORT/VHOST?OPTIONS`.

    Raises `ConfigurationError` for an option that does not exist.
    """
    parts = split(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for option in options:
        if option not in OPTIONS:
            hint = "; lease= sets the heartbeat" if option == "heartbeat" else ""
            raise ConfigurationError(
                f"{redact(url.partition('?')[0])}: there is no option {option!r}; there are: "
                f"{', '.join(OPTIONS)} and, of the broker, lease{hint}"
            )
    if options.get("auth", "plain").lower() not in MECHANISMS:
        raise ConfigurationError(f"{redact(url)}: auth is one of {', '.join(MECHANISMS)}")
    credentials, at, hosts = parts.netloc.rpartition("@")
    rest = url.partition("//")[2][len(parts.netloc) :]
    return [
        Server(f"{parts.scheme}://{credentials}{at}{host}{rest}", options)
        for host in hosts.split(",")
        if host
    ] or [Server(url, options)]
