"""The connection to a Kafka cluster: the URL, the driver, its translated errors, and the topics."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha1
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qtasks_core.drivers import importing_driver
from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    QTasksError,
    ServerTooOld,
    Unavailable,
)
from qtasks_core.urls import redact
from qtasks_kafka.diagnosis import diagnose, wrong_tls
from qtasks_kafka.settings import AT_LEAST_ONE, REQUEST, place_of, settings_of
from qtasks_kafka.writer import Writer

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.conn import AIOKafkaConnection

logger = logging.getLogger("qtasks.kafka")

PAUSE = 0.05
"""Seconds between attempts while the cluster is changing."""
LONG_POLL_MS = 2500
"""Milliseconds that the server may wait for records before it answers a fetch."""
GROWTH_MS = 10_000
"""Milliseconds within which the members of a group notice that a topic has grown."""
TRANSACTION_MS = int(REQUEST * 1000) + 1000
"""Milliseconds after which the server may abort a transaction. Its owner gives up before."""
LARGEST_MESSAGE = 4 * 1024 * 1024
"""The largest batch, in bytes, of topics created here. The server's default is just under 1 MiB."""
KEPT = {"retention.ms": "-1", "retention.bytes": "-1", "max.message.bytes": str(LARGEST_MESSAGE)}
"""Settings of new topics. A task may wait for its worker for any time: age must not delete it."""

_SERVERS = "bootstrap_servers"
_LIMIT = "max.message.bytes"
_IN_SYNC = "min.insync.replicas"
_EXISTS = 36
_MISSING = (_UNKNOWN_TOPIC := 3, *(_UNAUTHORIZED := (29, 31)))
"""Error codes of the protocol: unknown topic; the user may not see or create it."""
_WRONG = {
    "InvalidTopicError", "InvalidReplicationFactorError", "InvalidPartitionsError",
    "InvalidConfigurationError", "PolicyViolationError", "UnsupportedSaslMechanismError",
    "AuthenticationFailedError", "SaslAuthenticationFailed",
    "TopicAuthorizationFailedError", "GroupAuthorizationFailedError", "InvalidGroupIdError",
    "ClusterAuthorizationFailedError", "TransactionalIdAuthorizationFailed",
}  # fmt: skip
_TOO_OLD = {"IncompatibleBrokerVersion", "UnsupportedVersionError", "UnrecognizedBrokerVersion"}


LONGEST_PREFIX = 150
"""Characters that are kept of a long topic name."""
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


def topic_name(namespace: str, *parts: str) -> str:
    """Return the topic for a namespace and further names. Different names give different topics.

    The dot is the separator. Kafka refuses topics that differ only by `.` and `_`, so both are
    escaped.
    """
    name = ".".join([_escaped(namespace), *map(_escaped, parts)])
    if len(name) > 200:
        name = f"{name[:LONGEST_PREFIX]}-{sha1(name.encode(), usedforsecurity=False).hexdigest()}"
    return name


def is_topic(name: str) -> bool:
    """Return whether Kafka accepts this topic name."""
    return _TOPIC.fullmatch(name) is not None and name not in (".", "..")


def _escaped(text: str) -> str:
    return text.replace("_", "_5f").replace(".", "_2e")


class Connection:
    """The clients that a broker or a log shares, on one event loop, from `start` to `stop`."""

    def __init__(self, url: str, *, partitions: int, replicas: int | None) -> None:
        self._url = url
        self.shown = redact(url)
        self.place = place_of(url)
        self._settings = settings_of(url)
        self._partitions = AT_LEAST_ONE.checked("partitions", partitions)
        self._replicas = replicas
        if replicas is not None:
            AT_LEAST_ONE.checked("replicas", replicas)
        self._admin: AIOKafkaAdminClient | None = None
        self._topics: dict[str, int | None] = {}
        """Topics that are known to exist, each with its largest batch in bytes (None: unknown)."""
        self._advice: dict[str, list[str]] = {}
        """For each topic whose settings were read: what an operator should change."""
        self._creating = asyncio.Lock()
        self.writer: Writer | None = None

    def another(self) -> Connection:
        """Return a connection to the same cluster with the same options, not started."""
        return Connection(self._url, partitions=self._partitions, replicas=self._replicas)

    async def start(self) -> None:
        """Load the driver and connect to the cluster. After an error, it may be called again."""
        with importing_driver("kafka://", ".[kafka]"):
            self._driver = import_module("aiokafka")
            self._errors = import_module("aiokafka.errors")
            admin = import_module("aiokafka.admin")
        await self.stop()
        timeout = int(REQUEST * 1000)
        try:
            client = admin.AIOKafkaAdminClient(**self._settings, request_timeout_ms=timeout)
        except ValueError as error:  # the driver refuses an option
            raise ConfigurationError(f"{self.shown}: {error}") from error
        try:
            with self.reaching():
                async with asyncio.timeout(REQUEST):
                    await client.start()
        except BaseException as error:
            await client.close()
            # A wrongly configured server answers at once. A silent server is unreachable.
            if isinstance(error, Unavailable) and not isinstance(error.__cause__, TimeoutError):
                await self._diagnose()
            raise
        self._admin = client
        self.writer = Writer(self)

    async def _diagnose(self) -> None:
        """Raise the configuration error, if any: the driver only says that it cannot connect."""
        with self.reaching():
            await diagnose(self._settings, self.shown)

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
        """Translate the driver's errors into those of the contracts. Others pass unchanged."""
        try:
            yield
        except QTasksError:
            raise
        except (self._errors.KafkaError, OSError) as error:
            raise self.translated(error) from error
        except Exception as error:
            # Some of the driver's errors do not derive from KafkaError.
            if not type(error).__module__.startswith("aiokafka"):
                raise
            raise self.translated(error) from error

    def translated(self, error: BaseException) -> QTasksError:
        """Return the error of the contracts for an error of the driver."""
        name = type(error).__name__
        said = f"{name}: {error}" if str(error) else name
        if name == "InvalidSessionTimeoutError":
            return ConfigurationError(
                f"Kafka at {self.shown} refuses this lease: it must lie between the server's "
                "group.min.session.timeout.ms (6 s by default) and group.max.session.timeout.ms"
            )
        if (wrong := wrong_tls(error)) is not None:
            return ConfigurationError(f"Kafka at {self.shown}: {wrong}")
        if name == "UnsupportedCodecError":
            return ConfigurationError(
                f"Kafka at {self.shown} sends compressed records ({said}): "
                "pip install cramjam, which reads zstd, lz4 and snappy"
            )
        if name == "IllegalSaslStateError":
            return ConfigurationError(
                f"Kafka at {self.shown}: this listener takes no login; leave out USER:PASSWORD@"
            )
        if name == "InconsistentGroupProtocolError":
            return ConfigurationError(
                f"Kafka at {self.shown}: workers of another kind are in this group. All workers of "
                "an app use kafka://, or all use kafka+transactional://: stop the others first"
            )
        if name in _TOO_OLD:
            return ServerTooOld(f"Kafka at {self.shown} is too old: {said}")
        if name in _WRONG:
            return ConfigurationError(f"Kafka at {self.shown} refuses: {said}")
        return Unavailable(f"Kafka at {self.shown} cannot be reached: {said}")

    def consumer(self, **options: Any) -> AIOKafkaConsumer:
        """Return a new consumer that is not started."""
        self.started()
        defaults = {
            "request_timeout_ms": int(REQUEST * 1000),
            "auto_offset_reset": "earliest",
            # What an aborted transaction wrote is nothing. Without transactions, this is free.
            "isolation_level": "read_committed",
        }
        settings = {**defaults, **self._settings, **options}
        consumer: AIOKafkaConsumer = self._driver.AIOKafkaConsumer(
            enable_auto_commit=False,
            consumer_timeout_ms=2000,  # the fetcher also wakes up for new work
            **settings,
        )
        return consumer

    def producer(self, transactional_id: str | None = None) -> Any:
        """Return a new producer that is not started.

        It is idempotent: its retries neither change the order nor make copies. With an id, it
        writes in transactions only, and no other producer of that id can go on.
        """
        options = {} if transactional_id is None else {
            "transactional_id": transactional_id, "transaction_timeout_ms": TRANSACTION_MS
        }  # fmt: skip
        return self._driver.AIOKafkaProducer(
            enable_idempotence=True,
            acks="all",
            max_batch_size=512 * 1024,
            max_request_size=LARGEST_MESSAGE,
            request_timeout_ms=int(REQUEST * 1000),
            **options,
            **self._settings,
        )

    async def connect(self, host: str, port: int) -> AIOKafkaConnection:
        """Return a new connection to one server of the cluster, which nobody else uses."""
        from aiokafka.conn import create_conn

        self.started()
        settings = {name: value for name, value in self._settings.items() if name != _SERVERS}
        link = await create_conn(host, port, request_timeout_ms=int(REQUEST * 1000), **settings)
        return link

    async def ensure(
        self,
        topics: Sequence[str],
        config: Mapping[str, str] | None = None,
        *,
        partitions: int | None = None,
    ) -> list[str]:
        """Create missing topics, and return those. Existing ones are used as they are.

        Raises `Unavailable`, `ConfigurationError`.
        """
        created: list[str] = []
        if self._topics.keys() >= set(topics):
            return created
        admin = self.started()
        async with self._creating:
            unknown = [topic for topic in topics if topic not in self._topics]
            with self.reaching():
                async with asyncio.timeout(REQUEST):
                    missing = [
                        topic["topic"] for topic in await self._described(admin, unknown)
                        if topic["error_code"] in _MISSING
                    ]  # fmt: skip
                    if missing:
                        created = await self._create(admin, missing, config or {}, partitions)
                    while not _led(described := await self._described(admin, unknown)):  # noqa: ASYNC110
                        await asyncio.sleep(PAUSE)
                    limits = await self._limits(admin, described)
            self._topics.update(dict.fromkeys(unknown) | limits)
        return created

    async def look(self, topic: str) -> None:
        """Read the settings of a topic for `advice`, unless they are known or there is no topic."""
        if topic in self._advice:
            return
        admin = self.started()
        with self.reaching():
            async with asyncio.timeout(REQUEST):
                described = await self._described(admin, [topic])
                if not described[0]["error_code"]:
                    await self._limits(admin, described)

    async def partitions(self, topic: str) -> list[int]:
        """Return the numbers of a topic's partitions; none if the topic does not exist."""
        admin = self.started()
        with self.reaching():
            async with asyncio.timeout(REQUEST):
                (described,) = await self._described(admin, [topic])
        if described["error_code"] == _UNKNOWN_TOPIC:
            return []
        self.check(described["error_code"], topic)
        return [partition["partition"] for partition in described["partitions"]]

    def check(self, code: int, what: str) -> None:
        """Raise the error that a code of the protocol means. Zero means none."""
        if code:
            raise self.translated(self._errors.for_code(code)(what))

    async def _described(self, admin: AIOKafkaAdminClient, topics: list[str]) -> list[Any]:
        """Return the cluster's description of topics. The driver's own method would create them."""
        from aiokafka.protocol.metadata import MetadataRequest

        answer = await admin._send_request(MetadataRequest(topics, False))
        described: list[Any] = answer.to_object()["topics"]
        return described

    async def _create(
        self,
        admin: AIOKafkaAdminClient,
        topics: list[str],
        config: Mapping[str, str],
        partitions: int | None,
    ) -> list[str]:
        """Create topics. Return those that no other process has created meanwhile."""
        from aiokafka.admin import NewTopic

        replicas = self._replicas or min(3, await self._brokers(admin))
        new = [
            NewTopic(
                name, partitions or self._partitions, replicas, topic_configs={**KEPT, **config}
            )
            for name in topics
        ]
        answer = await admin.create_topics(new, timeout_ms=int(REQUEST * 1000))
        for name, code, *_ in answer.topic_errors:
            if code in _UNAUTHORIZED:
                raise ConfigurationError(
                    f"Kafka at {self.shown}: the topic {name} is missing, or this user may not see "
                    "it: it needs DESCRIBE, READ and WRITE on it, and CREATE unless somebody has "
                    "made it"
                )
            if code not in (0, _EXISTS):
                raise self._errors.for_code(code)(name)
        return [name for name, code, *_ in answer.topic_errors if code == 0]

    async def _limits(self, admin: AIOKafkaAdminClient, described: list[Any]) -> dict[str, int]:
        """Return the largest batch of each topic in bytes, as far as this user may read it.

        `described` is the cluster's description of the topics. Notes what should be changed.
        """
        from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

        topics = {topic["topic"]: topic["partitions"] for topic in described}
        asked = dict.fromkeys([*KEPT, _IN_SYNC])
        answers = await admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, topic, asked) for topic in topics]
        )
        limits: dict[str, int] = {}
        for answer in answers:
            for code, _, _, topic, entries in answer.resources:
                settings = {name: value for name, value, *_ in entries} if not code else {}
                replicas = min((len(each["replicas"]) for each in topics[topic]), default=0)
                self._advice[topic] = list(advice_on(replicas, settings))
                if _LIMIT in settings:
                    limits[topic] = int(settings[_LIMIT])
                for name in ("retention.ms", "retention.bytes"):
                    if settings.get(name, "-1") != "-1":
                        logger.warning(
                            "the topic %s has %s=%s: Kafka deletes what is older, whether it was "
                            "read or not; set it to -1",
                            topic, name, settings[name],
                        )  # fmt: skip
        return limits

    @property
    def advice(self) -> tuple[str, ...]:
        """What an operator should change, as far as the settings of topics are known."""
        topics: dict[str, list[str]] = {}
        for topic, lines in sorted(self._advice.items()):
            for line in lines:
                topics.setdefault(line, []).append(topic)
        return tuple(f"{', '.join(names)}: {line}" for line, names in topics.items())

    @property
    def largest_of_all(self) -> int:
        """The largest batch, in bytes, that any known topic accepts: `LARGEST_MESSAGE` or more.

        A topic with a lower limit refuses larger records itself.
        """
        return max([LARGEST_MESSAGE, *(size for size in self._topics.values() if size)])

    def largest(self, topic: str) -> int | None:
        """Return the largest batch of this topic in bytes; None while it is unknown."""
        return self._topics.get(topic)

    async def _brokers(self, admin: AIOKafkaAdminClient) -> int:
        description = await admin.describe_cluster()
        return len(description["brokers"])

    def forget_topics(self, *topics: str) -> None:
        """Check these topics again before their next use; without arguments, check all topics."""
        for topic in topics or list(self._topics):
            self._topics.pop(topic, None)

    def running_writer(self) -> Writer:
        """Return the writer. Raises `Closed` before `start` and after `stop`."""
        self.started()
        assert self.writer is not None
        return self.writer

    def started(self) -> AIOKafkaAdminClient:
        """Return the admin client. Raises `Closed` before `start` and after `stop`."""
        if self._admin is None:
            raise Closed("this broker or storage is not started")
        return self._admin


def advice_on(replicas: int, settings: Mapping[str, str]) -> Iterator[str]:
    """Yield what an operator should change on a topic. Without `settings`, the user sees none."""
    if replicas == 1:
        yield "replication factor 1: a lost machine takes it along; 3 is usual"
    elif settings.get(_IN_SYNC) == "1":
        yield f"{_IN_SYNC}=1: one machine alone may confirm a write; set it to 2"
    for name in ("retention.ms", "retention.bytes"):
        if settings.get(name, "-1") != "-1":
            yield f"{name}={settings[name]}: Kafka deletes what is older, read or not; set it to -1"
    if not settings:
        yield "its settings are not known: give the user DESCRIBE_CONFIGS (docs/rights.md)"


def _led(topics: list[Any]) -> bool:
    """Return whether every partition has a leader. From then on, clients find the partitions."""
    return all(
        not topic["error_code"]
        and topic["partitions"]
        and all(not p["error_code"] and p["leader"] >= 0 for p in topic["partitions"])
        for topic in topics
    )


def heartbeat_ms(lease: float, longest: float) -> int:
    """Return the milliseconds between heartbeats: a quarter of the lease, or `longest` seconds.

    Each may tell a member of a rebalance.
    """
    return max(50, int(min(longest, lease / 4) * 1000))


def long_poll_ms(lease: float) -> int:
    """Return the milliseconds that the server may wait for records that a group's member fetches.

    It answers the requests of a connection in turn. So a fetch that waits holds up a member that
    asks for the partitions of a topic which another one has brought into the group. It asks between
    its join and the answer with the assignment, when it sends no heartbeats.
    """
    return min(LONG_POLL_MS, int(lease * 1000 / 4))


def drop_abandoned(consumer: AIOKafkaConsumer) -> None:
    """Close connections with a fetch that the driver has given up: it opens new ones.

    After a rebalance, that is the last fetch of the old partitions. The server answers the next
    request on the connection only after the fetch, so a long poll would hold up the takeover.
    """
    from aiokafka.client import ConnectionGroup

    for (_, group), connection in list(consumer._client._conns.items()):
        fetches = group == ConnectionGroup.DEFAULT
        if fetches and any(answer.done() for *_, answer in connection._requests):
            connection.close()


async def close_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer and leave its group. This takes a few seconds at most."""
    stopping = asyncio.create_task(consumer.stop())
    try:
        await asyncio.wait({stopping}, timeout=2.0)
        if not stopping.done():
            # It waits for the answer to a join. Without a connection it stops waiting.
            await consumer._client.close()
            await asyncio.wait({stopping}, timeout=2.0)
    finally:
        stopping.cancel()
        await asyncio.wait({stopping})
        if not stopping.cancelled() and (error := stopping.exception()) is not None:
            logger.debug("a consumer had ended: %r", error)
        # The driver's `stop` ends early if something fails in it, for example if a fetch was about
        # to begin. The client would then ask for metadata for ever.
        fetches = consumer._fetcher._pending_tasks if consumer._fetcher is not None else ()
        for fetch in fetches:
            fetch.cancel()
        if fetches:
            await asyncio.wait(fetches)
        await consumer._client.close()
