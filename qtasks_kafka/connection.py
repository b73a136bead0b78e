"""The way to a Kafka cluster: the URL, the driver, its errors in our terms, and the topics."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha1
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    MissingDriver,
    QTasksError,
    ServerTooOld,
    Unavailable,
)
from qtasks_core.urls import redact, split

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.admin import AIOKafkaAdminClient

    from qtasks_kafka.writer import Writer

REQUEST = 5.0
"""Seconds after which a server that does not answer counts as unreachable."""
PAUSE = 0.05
"""Seconds between attempts while the cluster changes under our hands."""
LARGEST_MESSAGE = 4 * 1024 * 1024
"""Bytes; what topics made here take, the server's own default being just under 1 MiB."""
KEPT = {"retention.ms": "-1", "retention.bytes": "-1", "max.message.bytes": str(LARGEST_MESSAGE)}
"""A task waits for its worker however long; time must not delete it."""

_EXISTS = 36
_WRONG = {
    "InvalidTopicError", "InvalidReplicationFactorError", "InvalidPartitionsError",
    "InvalidConfigurationError", "PolicyViolationError", "UnsupportedSaslMechanismError",
    "IllegalSaslStateError", "AuthenticationFailedError", "SaslAuthenticationFailed",
    "TopicAuthorizationFailedError", "GroupAuthorizationFailedError", "InvalidGroupIdError",
    "ClusterAuthorizationFailedError", "InconsistentGroupProtocolError",
}  # fmt: skip
_TOO_OLD = {"IncompatibleBrokerVersion", "UnsupportedVersionError", "UnrecognizedBrokerVersion"}


def topic_name(namespace: str, *parts: str) -> str:
    """Return the topic of a namespace and what follows; different parts, different topics.

    The dot separates. Kafka refuses topics that differ by `.` and `_` only, so both are escaped.
    """
    name = ".".join([_escaped(namespace), *map(_escaped, parts)])
    if len(name) > 200:
        name = f"{name[:150]}-{sha1(name.encode(), usedforsecurity=False).hexdigest()}"
    return name


def _escaped(text: str) -> str:
    return text.replace("_", "_5f").replace(".", "_2e")


def settings_of(url: str) -> dict[str, Any]:
    """Return the driver's arguments for `url`. Raises `ConfigurationError`."""
    parts = split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    tls = "ssl_cafile" in options or options.get("security_protocol", "").endswith("SSL")
    protocol = ("SASL_" if user else "") + ("SSL" if tls else "PLAINTEXT")
    settings: dict[str, Any] = {
        "bootstrap_servers": hosts or "localhost:9092",
        "security_protocol": options.pop("security_protocol", protocol),
    }
    if settings["security_protocol"].endswith("SSL"):
        try:
            authority = options.pop("ssl_cafile", None)
            settings["ssl_context"] = ssl.create_default_context(cafile=authority)
        except OSError as error:
            raise ConfigurationError(f"ssl_cafile={authority!r}: {error}") from error
    if user:
        settings["sasl_mechanism"] = options.pop("sasl_mechanism", "PLAIN")
        settings["sasl_plain_username"] = unquote(user)
        settings["sasl_plain_password"] = unquote(password)
    if options:
        raise ConfigurationError(f"{redact(url)} has unknown options: {', '.join(options)}")
    return settings


class Connection:
    """What the parts of one app share of a cluster; on one event loop, from `start` to `stop`."""

    def __init__(self, url: str, *, partitions: int, replicas: int | None) -> None:
        self.shown = redact(url)
        self._settings = settings_of(url)
        self._partitions = partitions
        self._replicas = replicas
        self._admin: AIOKafkaAdminClient | None = None
        self._topics: set[str] = set()
        self._creating = asyncio.Lock()
        self.writer: Writer | None = None

    async def start(self) -> None:
        """Load the driver and reach the cluster. May be called again after it raised."""
        try:
            self._driver = import_module("aiokafka")
            self._errors = import_module("aiokafka.errors")
            admin = import_module("aiokafka.admin")
        except ImportError as error:
            raise MissingDriver("kafka://", "qtasks[kafka]") from error
        from qtasks_kafka.writer import Writer

        await self.stop()
        timeout = int(REQUEST * 1000)
        try:
            client = admin.AIOKafkaAdminClient(**self._settings, request_timeout_ms=timeout)
        except ValueError as error:  # an option that the driver does not take
            raise ConfigurationError(f"{self.shown}: {error}") from error
        try:
            with self.reaching():
                async with asyncio.timeout(REQUEST):
                    await client.start()
        except BaseException as error:
            await client.close()
            if isinstance(error, Unavailable):
                await self._diagnose(error)
            raise
        self._admin = client
        self.writer = Writer(self)

    async def _diagnose(self, error: Unavailable) -> None:
        """Raise what the driver only logs while it tries the servers: a refused login."""
        if "sasl_plain_username" not in self._settings:
            return
        from aiokafka.conn import collect_hosts, create_conn

        settings = dict(self._settings)
        for host, port, _ in collect_hosts(settings.pop("bootstrap_servers")):
            with self.reaching():
                async with asyncio.timeout(REQUEST):
                    connection = await create_conn(host, port, **settings)
                    connection.close()

    async def stop(self) -> None:
        """Close the shared clients. Idempotent."""
        writer, self.writer = self.writer, None
        if writer is not None:
            await writer.stop()
        admin, self._admin = self._admin, None
        if admin is not None:
            await admin.close()

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn what the driver raises into the errors of the contracts."""
        try:
            yield
        except QTasksError:
            raise
        except (self._errors.KafkaError, OSError) as error:
            raise self.translated(error) from error

    def translated(self, error: BaseException) -> QTasksError:
        """Return the error of the contracts for one of the driver's."""
        name = type(error).__name__
        said = f"{name}: {error}" if str(error) else name
        if name == "InvalidSessionTimeoutError":
            return ConfigurationError(
                f"Kafka at {self.shown} refuses this lease: it must lie between the server's "
                "group.min.session.timeout.ms (6 s by default) and group.max.session.timeout.ms"
            )
        if name in _TOO_OLD:
            return ServerTooOld(f"Kafka at {self.shown} is too old: {said}")
        if name in _WRONG:
            return ConfigurationError(f"Kafka at {self.shown} refuses: {said}")
        return Unavailable(f"Kafka at {self.shown} cannot be reached: {said}")

    def consumer(self, **options: Any) -> AIOKafkaConsumer:
        """Build a consumer, not started."""
        self.started()
        settings = {"request_timeout_ms": int(REQUEST * 1000), **self._settings, **options}
        consumer: AIOKafkaConsumer = self._driver.AIOKafkaConsumer(
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            metadata_max_age_ms=10_000,  # A topic that grows is noticed within this.
            consumer_timeout_ms=2000,  # The fetcher also wakes up when there is something to do.
            **settings,
        )
        return consumer

    def producer(self) -> Any:
        """Build a producer, not started; idempotent: its retries neither swap nor double."""
        return self._driver.AIOKafkaProducer(
            enable_idempotence=True,
            acks="all",
            max_batch_size=512 * 1024,
            max_request_size=LARGEST_MESSAGE,
            request_timeout_ms=int(REQUEST * 1000),
            **self._settings,
        )

    async def ensure(self, topics: Sequence[str], config: Mapping[str, str] | None = None) -> None:
        """Create the topics that are missing. Raises `Unavailable`, `ConfigurationError`."""
        if self._topics.issuperset(topics):
            return
        admin = self.started()
        from aiokafka.admin import NewTopic

        async with self._creating:
            missing = [topic for topic in topics if topic not in self._topics]
            with self.reaching():
                async with asyncio.timeout(REQUEST):
                    replicas = self._replicas or min(3, await self._brokers(admin))
                    new = [
                        NewTopic(
                            name,
                            self._partitions,
                            replicas,
                            topic_configs={**KEPT, **(config or {})},
                        )
                        for name in missing
                    ]
                    answer = await admin.create_topics(new, timeout_ms=int(REQUEST * 1000))
                    for name, code, *_ in answer.topic_errors:
                        if code not in (0, _EXISTS):
                            raise self._errors.for_code(code)(name)
                    while not _led(await admin.describe_topics(missing)):  # noqa: ASYNC110
                        await asyncio.sleep(PAUSE)
            self._topics.update(missing)

    async def _brokers(self, admin: AIOKafkaAdminClient) -> int:
        description = await admin.describe_cluster()
        return len(description["brokers"])

    def forget_topics(self) -> None:
        """Look again before the next use whether the topics exist."""
        self._topics.clear()

    def started(self) -> AIOKafkaAdminClient:
        """Return the admin client. Raises `Closed` before `start` and after `stop`."""
        if self._admin is None:
            raise Closed("this part of Kafka is not started")
        return self._admin


def _led(topics: list[Any]) -> bool:
    """Say whether every partition has a leader: from then on clients find them."""
    return all(
        not topic["error_code"]
        and topic["partitions"]
        and all(not p["error_code"] and p["leader"] >= 0 for p in topic["partitions"])
        for topic in topics
    )


def heartbeat_ms(lease: float) -> int:
    """Return the milliseconds between heartbeats: members hear of a rebalance by the next one."""
    return max(50, min(1000, int(lease * 1000) // 4))


async def close_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer and leave its group, within a few seconds whatever the server does."""
    stopping = asyncio.create_task(consumer.stop())
    await asyncio.wait({stopping}, timeout=2.0)
    if not stopping.done():
        # It waits for the answer to a join; without a connection it gives up.
        await consumer._client.close()
        await asyncio.wait({stopping}, timeout=2.0)
        stopping.cancel()
    with suppress(asyncio.CancelledError):
        await stopping
