"""The options of an amqp:// URL: the servers to try, and the settings of their connections."""

from __future__ import annotations

import binascii
import ssl
from base64 import b64decode
from collections.abc import Mapping

from qtasks_core.errors import ConfigurationError
from qtasks_core.options import ANY, Kind, seconds
from qtasks_core.threads import in_thread
from qtasks_core.urls import redact, refuse_options, split, take_options

HEARTBEAT = 10
"""Seconds between heartbeats of connections that hold no leases: a busy machine must not lose them
because some other receiver has a short lease."""
MOST_HEARTBEAT = 65535
"""Seconds. The protocol has two bytes for it."""
SILENCE = 3
"""Heartbeats after which the server has certainly dropped a silent receiver."""
LEASE_TIME = seconds(SILENCE, MOST_HEARTBEAT * SILENCE)
"""The limits follow from the heartbeat, which is a whole number of seconds."""
MECHANISMS = ("plain", "external")
OPTIONS = {
    "auth": Kind(f"one of {', '.join(MECHANISMS)}", lambda text: text.lower() in MECHANISMS),
    "cadata": ANY, "cafile": ANY, "capath": ANY, "certfile": ANY, "keyfile": ANY,
    "no_verify_ssl": ANY,
}  # fmt: skip
"""Options of a connection in the query of a URL."""
_LEFT_OUT = {
    "heartbeat": Kind("left out: lease=SECONDS sets it, to a third of the lease", lambda _: False)
}
"""Options that the driver has and a URL may not have, and what to write instead."""


class Server:
    """One server of a URL."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self.url = url
        self._options = options
        self._context: ssl.SSLContext | None = None

    async def context(self) -> ssl.SSLContext | None:
        """Return the TLS context, or None for a URL without TLS.

        Raises `ConfigurationError` if a file in the URL cannot be used.
        """
        if self._context is None and self.url.startswith("amqps:"):
            # It reads files, so it runs in a thread.
            self._context = await in_thread(self._make_context)
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

    Raises `ConfigurationError` for an unknown option.
    """
    parts = split(url)
    rest, options = take_options(url, {**OPTIONS, **_LEFT_OUT})
    refuse_options(rest, ("lease", "retention", *OPTIONS))
    credentials, at, hosts = parts.netloc.rpartition("@")
    behind = url.partition("//")[2][len(parts.netloc) :]
    return [
        Server(f"{parts.scheme}://{credentials}{at}{host}{behind}", options)
        for host in hosts.split(",")
        if host
    ] or [Server(url, options)]
