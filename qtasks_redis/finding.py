"""Finding the server: the primary that Sentinels name, or the node of a cluster that has a slot.

All keys of a namespace are in one slot, so a namespace needs one node of a cluster. Every new
connection asks for the server's address. So after a failover, or when the slot has moved, new
connections are enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult

from qtasks_core.threads import in_thread
from qtasks_core.urls import split, take_options
from qtasks_redis.options import CLUSTER, SENTINEL, TLS, hosts_in, service_in

_ASK_WITHIN: Final = 1.0
"""Seconds that one Sentinel or node has to answer. Then the next one is asked."""
_LOGIN: Final = "username", "password"


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


Find = Callable[[], Awaitable[Address]]


def finder(url: str, key: str) -> tuple[str, Find | None]:
    """Return the URL for the driver, and how to find the server. None: the URL has its address.

    `key` is any key of the namespace.
    """
    from redis.asyncio.connection import parse_url

    parts = split(url)
    addresses = [Address(*host) for host in hosts_in(parts)]
    if parts.scheme in CLUSTER:
        plain = _plain(url, parts, "")
        options = {k: v for k, v in parse_url(plain).items() if k in _LOGIN or _is_of_tls(k)}
        return plain, _Cluster(addresses, key, options)
    if parts.scheme in SENTINEL:
        rest, login = take_options(url, {f"sentinel_{name}": str for name in _LOGIN})
        service, database = service_in(parts)
        plain = _plain(rest, parts, database)
        options = {k: v for k, v in parse_url(plain).items() if _is_of_tls(k)}
        options.update((name.removeprefix("sentinel_"), text) for name, text in login.items())
        return plain, _Sentinels(addresses, service, options)
    return url, None


def _is_of_tls(name: str) -> bool:
    """Tell whether the driver's option says how to connect: with TLS or not, and by what files."""
    return name == "connection_class" or name.startswith("ssl_")


def _plain(url: str, parts: SplitResult, path: str) -> str:
    """Return the URL for one server, whose address is found later."""
    credentials, at, _ = parts.netloc.rpartition("@")
    scheme = "rediss" if parts.scheme in TLS else "redis"
    return split(url)._replace(scheme=scheme, netloc=f"{credentials}{at}found", path=path).geturl()


class _Sentinels:
    """Asks each Sentinel for the primary of a service until one knows it."""

    def __init__(self, addresses: Sequence[Address], service: str, options: dict[str, Any]) -> None:
        self._addresses = addresses
        self._service = service
        self._options = options

    async def __call__(self) -> Address:
        from redis.exceptions import AuthenticationError, AuthorizationError, ConnectionError

        command = "SENTINEL", "get-master-addr-by-name", self._service
        told: list[str] = []
        failure: Exception | None = None
        for address in self._addresses:
            try:
                answer = await _ask(address, self._options, *command)
            except (AuthenticationError, AuthorizationError):
                raise  # subclasses of ConnectionError, and no other server would know better
            except (ConnectionError, TimeoutError, OSError) as error:
                failure = error
                told.append(f"{address.host}:{address.port}: {str(error) or 'no answer'}")
                continue
            if answer is not None:
                return Address(_text(answer[0]), int(answer[1]))
            told.append(f"{address.host}:{address.port} does not know it")
        raise ConnectionError(
            f"no Sentinel names the primary of {self._service!r}: {told}"
        ) from failure


class _Cluster:
    """Asks a node of the cluster which node has the slot of a key."""

    def __init__(self, addresses: Sequence[Address], key: str, options: dict[str, Any]) -> None:
        self._addresses = list(addresses)
        self._key = key
        self._options = options

    async def __call__(self) -> Address:
        from redis.crc import key_slot
        from redis.exceptions import (
            AuthenticationError,
            AuthorizationError,
            ClusterDownError,
            ConnectionError,
        )

        slot = key_slot(self._key.encode())
        told: list[str] = []
        failure: Exception | None = None
        for address in list(self._addresses):
            try:
                ranges = await _ask(address, self._options, "CLUSTER", "SLOTS")
            except (AuthenticationError, AuthorizationError):
                raise  # subclasses of ConnectionError, and no other server would know better
            except (ConnectionError, TimeoutError, OSError) as error:
                failure = error
                told.append(f"{address.host}:{address.port}: {str(error) or 'no answer'}")
                continue
            self._learn(address, ranges)
            for first, last, primary, *_ in ranges:
                if first <= slot <= last:
                    return _node(address, primary)
            raise ClusterDownError(f"no node has slot {slot}")
        raise ConnectionError(f"no node of the cluster answers: {told}") from failure

    def _learn(self, asked: Address, ranges: Sequence[Any]) -> None:
        """Remember all nodes, since those of the URL may be gone later."""
        nodes = [_node(asked, node) for _, _, *some in ranges for node in some]
        self._addresses = list(dict.fromkeys((asked, *nodes, *self._addresses)))[:1000]


def _node(asked: Address, node: Sequence[Any]) -> Address:
    """Return a node's address. A node that does not know its own host has the one that we used."""
    return Address(_text(node[0] or b"") or asked.host, int(node[1]))


def _text(data: bytes | str) -> str:
    return data.decode() if isinstance(data, bytes) else data


async def _ask(address: Address, given: dict[str, Any], *command: str) -> Any:
    """Send one command over a connection of its own."""
    from redis.asyncio.connection import Connection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    options = dict(given)
    line = options.pop("connection_class", Connection)(
        host=address.host,
        port=address.port,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=None,
        socket_connect_timeout=_ASK_WITHIN,
        **options,
    )
    await _read_files(line)
    try:
        async with asyncio.timeout(_ASK_WITHIN):
            await line.connect()
            await line.send_command(*command)
            return await line.read_response()
    finally:
        await line.disconnect(nowait=True)


def connection_class(driver_class: type[Any], find: Find | None) -> type[Any]:
    """Return one of the driver's classes of connections, whose `connect` prepares itself first.

    It finds the server, and reads the files of TLS.
    """
    if find is None and not issubclass(driver_class, _tls_class()):
        return driver_class

    class Prepared(driver_class):  # type: ignore[misc]  # it has no type
        async def connect(self) -> None:
            if not self.is_connected:
                if find is not None:
                    self.host, self.port = await find()
                await _read_files(self)
            await super().connect()

    return Prepared


def _tls_class() -> type[Any]:
    from redis.asyncio.connection import SSLConnection

    return SSLConnection


async def _read_files(line: Any) -> None:
    """Make the TLS context of a connection, if it has one, in a thread: it takes 50 ms."""
    if isinstance(line, _tls_class()):
        await in_thread(line.ssl_context.get)
