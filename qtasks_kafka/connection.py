"""The way to a Kafka cluster: the URL, the driver, its errors in our terms, and the topics."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from qtasks_kafka.settings import AT_LEAST_ONE, REQUEST, settings_of
from qtasks_kafka.writer import Writer

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.admin import AIOKafkaAdminClient

logger = logging.getLogger("qtasks.kafka")

PAUSE = 0.05
"""Seconds between attempts while the cluster changes under our hands."""
LARGEST_MESSAGE = 4 * 1024 * 1024
"""Bytes; what topics made here take, the server's own default being just under 1 MiB."""
KEPT = {"retention.ms": "-1", "retention.bytes": "-1", "max.message.bytes": str(LARGEST_MESSAGE)}
"""A task waits for its worker however long; time must not delete it."""

_LIMIT = "max.message.bytes"
_EXISTS = 36
_MISSING = (3, *(_UNAUTHORIZED := (29, 31)))
"""Codes of the protocol: the topic is unknown; the user may not see or make it."""
_WRONG = {
    "InvalidTopicError", "InvalidReplicationFactorError", "InvalidPartitionsError",
    "InvalidConfigurationError", "PolicyViolationError", "UnsupportedSaslMechanismError",
    "AuthenticationFailedError", "SaslAuthenticationFailed",
    "TopicAuthorizationFailedError", "GroupAuthorizationFailedError", "InvalidGroupIdError",
    "ClusterAuthorizationFailedError", "InconsistentGroupProtocolError",
}  # fmt: skip
_TOO_OLD = {"IncompatibleBrokerVersion", "UnsupportedVersionError", "UnrecognizedBrokerVersion"}


LONGEST_PREFIX = 150
"""Characters of a long topic's name that are kept as they are."""
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


def topic_name(namespace: str, *parts: str) -> str:
    """Return the topic of a namespace and what follows; different parts, different topics.

    The dot separates. Kafka refuses topics that differ by `.` and `_` only, so both are escaped.
    """
    name = ".".join([_escaped(namespace), *map(_escaped, parts)])
    if len(name) > 200:
        name = f"{name[:LONGEST_PREFIX]}-{sha1(name.encode(), usedforsecurity=False).hexdigest()}"
    return name


def is_topic(name: str) -> bool:
    """Say whether Kafka takes this as the name of a topic."""
    return _TOPIC.fullmatch(name) is not None and name not in (".", "..")


def _escaped(text: str) -> str:
    return text.replace("_", "_5f").replace(".", "_2e")


class Connection:
    """What the parts of one app share of a cluster; on one event loop, from `start` to `stop`."""

    def __init__(self, url: str, *, partitions: int, replicas: int | None) -> None:
        self.shown = redact(url)
        self._settings = settings_of(url)
        self._partitions = AT_LEAST_ONE.checked("partitions", partitions)
        self._replicas = replicas
        if replicas is not None:
            AT_LEAST_ONE.checked("replicas", replicas)
        self._admin: AIOKafkaAdminClient | None = None
        self._topics: dict[str, int | None] = {}
        """The topics known to exist, each with the bytes that a batch may have, where known."""
        self._creating = asyncio.Lock()
        self.writer: Writer | None = None

    async def start(self) -> None:
        """Load the driver and reach the cluster. May be called again after it raised."""
        with importing_driver("kafka://", ".[kafka]"):
            self._driver = import_module("aiokafka")
            self._errors = import_module("aiokafka.errors")
            admin = import_module("aiokafka.admin")
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
            # One that is set up otherwise answers at once; one that says nothing is away.
            if isinstance(error, Unavailable) and not isinstance(error.__cause__, TimeoutError):
                await self._diagnose()
            raise
        self._admin = client
        self.writer = Writer(self)

    async def _diagnose(self) -> None:
        """Raise what is wrong with the set-up: the driver only says that it cannot connect."""
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
        """Turn what the driver raises into the errors of the contracts."""
        try:
            yield
        except QTasksError:
            raise
        except (self._errors.KafkaError, OSError) as error:
            raise self.translated(error) from error
        except Exception as error:
            # Some of the driver's errors have no base of their own.
            if not type(error).__module__.startswith("aiokafka"):
                raise
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
        if name in _TOO_OLD:
            return ServerTooOld(f"Kafka at {self.shown} is too old: {said}")
        if name in _WRONG:
            return ConfigurationError(f"Kafka at {self.shown} refuses: {said}")
        return Unavailable(f"Kafka at {self.shown} cannot be reached: {said}")

    def consumer(self, **options: Any) -> AIOKafkaConsumer:
        """Build a consumer, not started."""
        self.started()
        defaults = {
            "request_timeout_ms": int(REQUEST * 1000),
            "auto_offset_reset": "earliest",
        }
        settings = {**defaults, **self._settings, **options}
        consumer: AIOKafkaConsumer = self._driver.AIOKafkaConsumer(
            enable_auto_commit=False,
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
        """Create the topics that are missing; one that is there is used as it is.

        Raises `Unavailable`, `ConfigurationError`.
        """
        if self._topics.keys() >= set(topics):
            return
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
                        await self._create(admin, missing, config or {})
                    while not _led(await self._described(admin, unknown)):  # noqa: ASYNC110
                        await asyncio.sleep(PAUSE)
                    limits = await self._limits(admin, unknown)
            self._topics.update(dict.fromkeys(unknown) | limits)

    async def _described(self, admin: AIOKafkaAdminClient, topics: list[str]) -> list[Any]:
        """Return what the cluster says of topics; the driver's own question would create them."""
        from aiokafka.protocol.metadata import MetadataRequest

        answer = await admin._send_request(MetadataRequest(topics, False))
        described: list[Any] = answer.to_object()["topics"]
        return described

    async def _create(
        self, admin: AIOKafkaAdminClient, topics: list[str], config: Mapping[str, str]
    ) -> None:
        from aiokafka.admin import NewTopic

        replicas = self._replicas or min(3, await self._brokers(admin))
        new = [
            NewTopic(name, self._partitions, replicas, topic_configs={**KEPT, **config})
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

    async def _limits(self, admin: AIOKafkaAdminClient, topics: list[str]) -> dict[str, int]:
        """Return the bytes that a batch of each topic may have, where this user may know."""
        from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

        asked = dict.fromkeys(KEPT)
        answers = await admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, topic, asked) for topic in topics]
        )
        limits: dict[str, int] = {}
        for answer in answers:
            for code, _, _, topic, entries in answer.resources:
                settings = {name: value for name, value, *_ in entries} if not code else {}
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
    def largest_of_all(self) -> int:
        """Bytes that a batch may have in a topic made here, or in one that is known to take more.

        A topic that takes less refuses what is too large for it, by itself.
        """
        return max([LARGEST_MESSAGE, *(size for size in self._topics.values() if size)])

    def largest(self, topic: str) -> int | None:
        """Return the bytes that a batch of this topic may have; None while that is unknown."""
        return self._topics.get(topic)

    async def _brokers(self, admin: AIOKafkaAdminClient) -> int:
        description = await admin.describe_cluster()
        return len(description["brokers"])

    def forget_topics(self, *topics: str) -> None:
        """Look again before the next use of these topics, or of any, what there is of them."""
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
