"""The connection to Redis: a pool, scripts run by their digest, and translated driver errors."""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, NoReturn
from weakref import WeakSet

from qtasks_core import DONE, Outcome
from qtasks_core.drivers import importing_driver
from qtasks_core.errors import ConfigurationError, ServerTooOld, Unavailable, chain_of
from qtasks_core.urls import redact, split, take_options
from qtasks_redis.errors import Broken, Elsewhere, raise_ours
from qtasks_redis.finding import connection_class, finder
from qtasks_redis.options import TLS, hosts_in
from qtasks_redis.scripts import Script

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.connection import AbstractConnection

ANSWER_WITHIN: Final = 5.0
"""Seconds after which a server that does not answer counts as unreachable."""
CONNECT_WITHIN: Final = 3.0
"""Seconds to wait for a new connection. The handshake takes additional time."""
_NEEDS: Final = (6, 2)
_MOST_CALLS: Final = 32
"""Concurrent calls. Each uses one connection; further calls wait for a slot."""
MOST_ITEMS: Final = 1000
MOST_BYTES: Final = 4 * 1024 * 1024
"""The most items and bytes of one script call, so that it does not block the server for long."""
_TRIALS: Final[Sequence[tuple[Any, ...]]] = (
    ("TIME",), ("PING",), ("EVAL", "return 1", 0), ("EVALSHA", "none", 0),
)  # fmt: skip
"""Commands that the broker and the storage both call, besides the commands on their keys."""


class Server(NamedTuple):
    """The server's name, durability and limits, in the words of `Guarantees`."""

    name: str
    survives: Literal["client crash", "server crash", "machine crash"]
    durability: str
    advice: tuple[str, ...]
    largest: int = 64 * 2**20
    """The largest item, in bytes.

    Redis accepts 512 MiB by default (`proto-max-bulk-len`), but it cannot handle that within the
    seconds in which it must answer.
    """


UNKNOWN: Final = Server("Redis", "client crash", "known after start", ())


class Connection:
    """A pool of connections to one server, and the names of one namespace's keys."""

    def __init__(
        self,
        make: Callable[[], Redis],
        url: str,
        namespace: str,
        within: float,
        most: float = math.inf,
        *,
        moves: bool = False,
    ) -> None:
        self._make = make
        self._client = make()
        self._busy: dict[Redis, int] = {}
        """The running calls per client. A replaced client stays until its calls finish."""
        self._lines: WeakSet[AbstractConnection] = WeakSet()
        self._where = redact(url)
        self.server = UNKNOWN
        self._moves = moves
        """Whether new connections may find another server, after any outage."""
        self._most = most
        """The most connections of the pool. It refuses any further connection."""
        self._slots = asyncio.Semaphore(int(min(_MOST_CALLS, most)))
        self._spare = most - min(_MOST_CALLS, most)
        """The number of blocking reads that need no slot of the calls."""
        self._reads = 0
        self.answer_within = within
        self.namespace = namespace
        self._prefix = _prefix(namespace)

    def key(self, kind: str, name: str) -> str:
        """Return the key of `name` in this namespace."""
        return f"{self._prefix}{kind}:{name}"

    def name_in(self, key: bytes) -> str:
        """Return the name from which `key` made this key."""
        return key[len(self._prefix.encode()) :].partition(b":")[2].decode()

    async def call(self, *command: str | bytes | int) -> Any:
        """Send a command and return its answer.

        The driver's timeout is off because it uses `asyncio.wait_for`. Before Python 3.12 that
        function can swallow a cancellation.
        """
        async with self._slots:
            try:
                return await self._execute(*command)
            except Elsewhere:
                # The server has refused the command. New connections may find another one.
                if not self._moves:
                    raise
                return await self._execute(*command)

    async def refresh(self) -> None:
        """Read the server's settings again."""
        self.server = await _ask(self.call, self._where)

    async def time(self) -> float:
        """Return the server's Unix time, in seconds."""
        seconds, microseconds = await self.call("TIME")
        return int(seconds) + int(microseconds) / 1e6

    async def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]
    ) -> Any:
        """Run a script. Send its source if the server does not have it."""
        from redis.exceptions import NoScriptError

        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self.call("EVAL", script.source, len(keys), *keys, *args)

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of the keys in one round trip, None for a missing key."""
        values: list[bytes | None] = await self.call("MGET", *keys)
        return values

    async def listen(self, bells: Sequence[str]) -> str | None:
        """Block until one of these lists has a token. Return its key, or None after a while.

        It waits for less time than the server has to answer, so that a dead server is noticed.
        """
        if self._reads + 1 >= self._most:
            raise Unavailable(
                f"{self._where}: max_connections={self._most} is too few for so many "
                f"subscriptions: it must be at least {self._reads + 2}"
            )
        self._reads += 1
        try:
            async with self._slots if self._reads > self._spare else nullcontext():
                seconds = f"{0.8 * self.answer_within:.3f}"
                heard = await self._execute("BLPOP", *bells, seconds)
        finally:
            self._reads -= 1
        return None if heard is None else heard[0].decode()

    async def line(self) -> AbstractConnection:
        """Open a connection outside the pool. The caller disconnects it."""
        make: Callable[[], AbstractConnection] = self._client.connection_pool.make_connection
        line = make()
        with self.reachable():
            async with asyncio.timeout(self.answer_within):
                await line.connect()  # type: ignore[no-untyped-call]
        self._lines.add(line)
        return line

    async def check_rights(
        self, trials: Sequence[tuple[str | float, ...]], channels: Sequence[str] = ()
    ) -> None:
        """Try each command that will be needed, and name each missing right.

        Raises `ConfigurationError`. Only a powerful user may ask the server for its rights, so this
        method tries the commands instead. The trials use a key and channels that nobody else uses.
        Their answers do not matter, because the server checks rights first.
        """
        from redis.exceptions import NoPermissionError, ResponseError

        missing: list[str] = []

        async def attempt(call: Awaitable[Any], name: str) -> None:
            with self.reachable():
                try:
                    async with asyncio.timeout(self.answer_within):
                        await call
                except NoPermissionError as error:
                    missing.append(f"{name} ({error})")
                except ResponseError:
                    return

        execute: Callable[..., Awaitable[Any]] = self._client.execute_command
        for command, *args in _TRIALS:
            await attempt(execute(command, *args), command)
        for command, *args in trials:
            key = self.key("rights", "")
            await attempt(execute(command, key, *args), f"{command} on keys")
        for channel in channels:
            await attempt(execute("PUBLISH", channel, ""), f"PUBLISH to {channel}*")
            line = await self.line()
            try:
                await attempt(_subscribed(line, channel), f"SUBSCRIBE to {channel}*")
            finally:
                await line.disconnect(nowait=True)
        if missing:
            raise ConfigurationError(
                f"{self._where}: the user lacks rights that docs/rights.md lists: "
                + "; ".join(missing)
            )

    async def close(self) -> None:
        """Close the pool, even if calls still wait in it."""
        await _close(self._client)

    async def _execute(self, *command: str | bytes | int) -> Any:
        client = self._client
        self._busy[client] = self._busy.get(client, 0) + 1
        try:
            with self.reachable():
                async with asyncio.timeout(self.answer_within):
                    execute: Callable[..., Awaitable[Any]] = client.execute_command
                    return await execute(*command)
        except Unavailable as error:
            if self._moves or isinstance(error, (Elsewhere, Broken)):
                await self._move(client)
            raise
        finally:
            left = self._busy.pop(client) - 1
            if left:
                self._busy[client] = left
            elif client is not self._client:
                await _close(client)

    async def _move(self, client: Redis) -> None:
        """Replace all connections: the server is the wrong one now, or their state is unknown."""
        if client is not self._client:
            return
        # Running calls finish in their old pool. The last of them closes it.
        self._client = self._make()
        for line in list(self._lines):
            await line.disconnect(nowait=True)

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Translate the driver's errors into those of the contracts. Only for driver calls."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # translated
            self.raise_ours(error)

    def raise_ours(self, error: Exception) -> NoReturn:
        """Raise the error of the contracts for an error of the driver."""
        raise_ours(error, self._where)


def _prefix(namespace: str) -> str:
    # The braces mark the hash tag, which puts all keys into one slot of a cluster.
    return f"qtasks:{{{namespace}}}:"


async def _close(client: Redis) -> None:
    """Close a pool. It is no error if the server does not answer the TLS shutdown in time."""
    with suppress(Exception):
        await client.aclose()


async def _subscribed(line: AbstractConnection, channel: str) -> None:
    await line.send_command("SUBSCRIBE", channel)
    await line.read_response()


async def connect(url: str, namespace: str) -> Connection:
    """Return an open connection. Raises the errors of `start`."""
    with importing_driver("redis://", ".[redis]"):
        from redis.asyncio import ConnectionPool, Redis
        from redis.asyncio.connection import Connection as DriverConnection
        from redis.asyncio.connection import parse_url
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    rest, options = take_options(url, {"socket_timeout": float, "max_connections": int})
    most = options.get("max_connections")
    rest, find = finder(rest, _prefix(namespace))

    def make() -> Redis:
        arguments: dict[str, Any] = {
            "connection_class": DriverConnection,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            # The driver has a limit by default; this removes it.
            "max_connections": most or 2**31,
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_WITHIN,
            **parse_url(rest),
        }
        kind = connection_class(arguments["connection_class"], find)
        arguments["connection_class"] = kind
        return Redis.from_pool(ConnectionPool(**arguments))

    within = options.get("socket_timeout", ANSWER_WITHIN)
    try:
        connection = Connection(
            make, url, namespace, within, most or math.inf, moves=find is not None
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{redact(url)}: {error}") from None
    try:
        await connection.refresh()
    except Unavailable as error:
        await connection.close()
        told = await _wrong_with_tls(url, error)
        if told is None:
            raise
        raise ConfigurationError(f"{redact(url)}: {told}") from None
    except BaseException:
        await connection.close()
        raise
    return connection


async def _wrong_with_tls(url: str, error: Unavailable) -> str | None:
    """Return the setting that makes TLS work, or None if TLS is not the cause of the error."""
    parts = split(url)
    chain = chain_of(error)
    if parts.scheme not in TLS:
        # A server that expects TLS closes the connection at once. A silent server is unreachable.
        silent = any(isinstance(one, TimeoutError) for one in chain)
        if not silent and await _any_of(hosts_in(parts), _speaks_tls):
            scheme = re.sub("^(redis|valkey)", "rediss", parts.scheme)
            return f"the server speaks TLS there; write {scheme}:// and its port"
        return None
    for one in chain:
        if isinstance(one, ssl.SSLCertVerificationError):
            return (
                f"the server's certificate is not trusted: {one.verify_message}; set ssl_ca_certs "
                "to a file with its authority, and the host to a name in the certificate"
            )
        if isinstance(one, (FileNotFoundError, IsADirectoryError, PermissionError)):
            return f"{one.strerror}: see the files of ssl_ca_certs, ssl_certfile and ssl_keyfile"
        if isinstance(one, ssl.SSLError) and not isinstance(one, ssl.SSLEOFError):
            return (
                f"TLS fails: {one}; see ssl_ca_certs, ssl_certfile and ssl_keyfile, and whether "
                "the server speaks TLS on this port"
            )
    if await _any_of(hosts_in(parts), _speaks_plainly):
        scheme = parts.scheme.replace("rediss", "redis")
        return f"the server speaks no TLS there; write {scheme}://, or the port on which it does"
    return None


async def _any_of(
    hosts: Sequence[tuple[str, int]], asked: Callable[[str, int], Awaitable[bool]]
) -> bool:
    for host, port in hosts:
        if await asked(host, port):
            return True
    return False


async def _speaks_tls(host: str, port: int) -> bool:
    """Return whether the server starts a TLS handshake. No data is sent after the handshake."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(CONNECT_WITHIN):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:  # TimeoutError and SSLError are subclasses
        return False
    writer.close()
    return True


async def _speaks_plainly(host: str, port: int) -> bool:
    """Return whether the server answers a PING without TLS, with or without a login."""
    try:
        async with asyncio.timeout(CONNECT_WITHIN):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PING\r\n")
                return (await reader.read(1)) in (b"+", b"-")
            finally:
                writer.close()
    except OSError:  # TimeoutError is a subclass
        return False


async def _ask(call: Callable[..., Awaitable[Any]], where: str) -> Server:
    """Read the product, version and durability, as far as the user's rights allow."""
    reply = await call("HELLO")
    try:
        hello = _pairs(reply)
        version = hello["version"]
        name = f"{hello['server'].capitalize()} {version}"
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except (KeyError, TypeError, ValueError):
        raise Unavailable(f"{where}: HELLO is answered by {reply!r:.100}") from None
    if numbers < _NEEDS:
        raise ServerTooOld(f"{where} is {name}; Redis 6.2 or newer is needed")
    try:
        info = await call("INFO")
    except ConfigurationError:
        unknown = "unknown: the user may not call INFO"
        return Server(name, "client crash", unknown, (_GIVE.format("+info"),))
    if info.get("loading"):
        # Until it has read its file, the server tells that it has none: `aof_enabled` is 0.
        raise Unavailable(f"{where}: the server is loading its data")
    if "valkey_version" in info:
        name = f"Valkey {info['valkey_version']}"
    server = await _durability(call, name, info)
    try:
        told = _pairs(await call("CONFIG GET", "proto-max-bulk-len"))
        # A stored record also has a head, so leave room for it.
        return server._replace(largest=min(server.largest, int(told["proto-max-bulk-len"]) - 1024))
    except (ConfigurationError, KeyError):
        return server


_GIVE = "the durability is not known completely: give the user the right {} (docs/rights.md)"
BEST_SETTINGS = "appendonly yes, appendfsync always, no-appendfsync-on-rewrite no"
"""With these, a write survives a crash of the machine."""


async def _durability(
    call: Callable[..., Awaitable[Any]], name: str, info: dict[str, Any]
) -> Server:
    """Derive the durability from INFO and, if the user may call it, CONFIG."""
    advice: list[str] = []
    policy = str(info.get("maxmemory_policy", "unknown"))
    if policy not in ("noeviction", "unknown") and info.get("maxmemory", 0):
        advice.append(
            f"maxmemory-policy {policy} can drop messages and records when memory is full: set "
            "maxmemory-policy noeviction"
        )
    if not info.get("aof_enabled"):
        return Server(name, "client crash", "appendonly no: at most snapshots", tuple(advice))
    try:
        # Servers before Redis 7 accept only one name per call, so use a pattern.
        told = _pairs(await call("CONFIG GET", "*appendfsync*"))
        fsync = told["appendfsync"]
    except (ConfigurationError, KeyError):
        advice.append(_GIVE.format("+config|get"))
        return Server(name, "client crash", "appendonly yes", tuple(advice))
    durability = f"appendonly yes, appendfsync {fsync}"
    if fsync == "everysec":
        # https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/ and
        # flushAppendOnlyFile in its aof.c: the server answers first, and writes when the sync has
        # finished.
        durability += (
            ": while the disk syncs, the server holds back for up to 2 s what it has answered, and "
            "a crash loses it (appendfsync no survives the server's, always the machine's as well)"
        )
        return Server(name, "client crash", durability, tuple(advice))
    if fsync == "always" and told.get("no-appendfsync-on-rewrite") != "yes":
        return Server(name, "machine crash", durability, tuple(advice))
    if fsync == "always":
        durability += " but no-appendfsync-on-rewrite yes"
    return Server(name, "server crash", durability, tuple(advice))


def _pairs(reply: Any) -> dict[str, str]:
    """Return a reply as a dict of text. The reply is flat, or the driver has already paired it."""
    if isinstance(reply, dict):
        flat = [part for pair in reply.items() for part in pair]
    else:
        flat = list(reply)
    text = [part.decode() if isinstance(part, bytes) else str(part) for part in flat]
    return dict(zip(text[::2], text[1::2], strict=True))


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait for a task that was cancelled or has no reader, and ignore its error."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def fitting(encoded: Sequence[bytes], largest: int) -> tuple[list[Outcome], Sequence[int]]:
    """Return an outcome for each item, and the positions of the items that the server accepts."""
    if max(map(len, encoded), default=0) <= largest:
        return [DONE] * len(encoded), range(len(encoded))
    outcomes = [
        DONE
        if len(data) <= largest
        else Outcome(
            "refused", f"{len(data)} bytes are more than the {largest} that Redis takes here"
        )
        for data in encoded
    ]
    return outcomes, [at for at, outcome in enumerate(outcomes) if outcome is DONE]
