"""Operations on queues and workers from outside: counting, purging, commands."""

from __future__ import annotations

import asyncio
import logging
import secrets
from asyncio import Task
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import msgspec
from msgspec import Struct
from uuid_utils import uuid7

from qtasks_core import Command, QueueDepth
from qtasks_core.errors import Closed, ConfigurationError, Unavailable, WireError
from qtasks_core.wire import decode_command, encode_command
from qtasks_kafka.connection import LONG_POLL_MS, Connection, close_consumer, topic_name
from qtasks_kafka.looking import Looker, in_flight, looking, places_of
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.writer import Record

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer
    from aiokafka.structs import TopicPartition

logger = logging.getLogger("qtasks.kafka")

CONFIG = {
    "cleanup.policy": "compact",
    "segment.ms": str(10 * 60 * 1000),
    "min.cleanable.dirty.ratio": "0.1",
}
KEYS = 64
"""Keys of commands. Compaction keeps the last record of each, so the topic stays small."""
ASK_AGAIN = 1.0
"""Seconds after which the owners of partitions are asked again to purge them."""
PATIENCE = 5.0
"""Seconds within which the owners of partitions must purge them."""
_KIND = "qtasks"
"""Header: what a record is, if it is no command."""


class Mark(Struct, tag="mark"):
    """A listener writes it to know when it has read all earlier records."""

    id: str


class Purge(Struct, tag="purge"):
    """Asks the owners to drop the undelivered records before these offsets of a topic."""

    id: str
    topic: str
    ends: dict[int, int]


class Purged(Struct, tag="purged"):
    """An owner's answer: how many records it has dropped in each partition."""

    id: str
    dropped: dict[int, int]


Word: TypeAlias = Mark | Purge | Purged
"""What processes say to each other in the topic of commands, besides commands."""

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Word] = msgspec.json.Decoder(Word)


def commands_topic(namespace: str) -> str:
    """Return the topic of commands to all workers."""
    return topic_name(namespace, "commands")


async def depth(
    connection: Connection, namespace: str, topic: str, *, marks: bool = False
) -> QueueDepth:
    """Count messages as the group's last commits show them.

    With `marks`, offsets may have marks of transactions. See `Looker.undelivered`.
    """
    delayed = sum(map(len, (await delayed_keys(connection, namespace, topic)).values()))
    places = places_of(topic, await connection.partitions(topic))
    if not places:
        return QueueDepth(ready=0, delayed=delayed, in_flight=0)
    async with looking(connection, workers_group(namespace)) as (looker, deadline):
        seen = await looker.look(places)
        owners = await looker.owners()
        undelivered = sum(each.undelivered for each in seen.values())
        if marks:
            undelivered = await looker.undelivered(seen, deadline)
    unfinished = sum(len(each.partition.open) for each in seen.values())
    held = in_flight(seen, owners)
    return QueueDepth(ready=undelivered + unfinished - held, delayed=delayed, in_flight=held)


def workers_group(namespace: str) -> str:
    """Return the group whose members receive."""
    return topic_name(namespace, "workers")


async def delayed_keys(
    connection: Connection, namespace: str, target: str
) -> dict[TopicPartition, list[bytes]]:
    """Return the keys of the delayed messages to a topic."""
    from qtasks_kafka.delays import delayed_topic

    topic = delayed_topic(namespace)
    places = places_of(topic, await connection.partitions(topic))
    if not places:
        return {}
    async with looking(connection, topic_name(namespace, "delays")) as (looker, deadline):
        return await looker.waiting(places, target, deadline)


async def purge(connection: Connection, listeners: Listeners, namespace: str, topic: str) -> int:
    """Drop the messages that are not in flight. Return their number.

    First, tombstones delete the delayed ones. Then the owner of each partition drops its
    undelivered records, and commits that. The records of partitions without an owner are deleted.
    """
    dropped = await drop_delayed(connection, namespace, topic)
    left = set(places_of(topic, await connection.partitions(topic)))
    if left:
        async with looking(connection, workers_group(namespace)) as (looker, deadline):
            dropped += await _purge(connection, listeners, looker, left, deadline)
    return dropped


async def drop_delayed(connection: Connection, namespace: str, topic: str) -> int:
    """Delete the delayed messages to a topic by tombstones. Return their number."""
    waiting = await delayed_keys(connection, namespace, topic)
    tombstones = [
        Record(place.topic, None, key, partition=place.partition)
        for place, keys in waiting.items()
        for key in keys
    ]
    for outcome in await connection.running_writer().write(tombstones):
        if outcome.refused is not None:
            raise outcome.refused
    return len(tombstones)


async def _purge(
    connection: Connection,
    listeners: Listeners,
    looker: Looker,
    left: set[TopicPartition],
    deadline: asyncio.Timeout,
) -> int:
    """Drop the undelivered records of all these partitions of one topic."""
    clock = asyncio.get_running_loop().time
    (topic,) = {place.topic for place in left}
    ends = {place: seen.end for place, seen in (await looker.look(sorted(left))).items()}
    dropped = 0
    give_up = clock() + PATIENCE
    async with listeners.hearing() as heard:
        while clock() < give_up:
            deadline.reschedule(clock() + REQUEST)
            owners = await looker.owners()
            if owners.settled and (free := left - owners.owned):
                dropped += await _delete(connection, looker, {at: ends[at] for at in free})
                left -= free
            if not left:
                return dropped
            request = Purge(uuid7().hex, topic, {at.partition: ends[at] for at in left})
            await listeners.say(request)
            for number, count in (await _answers(heard, request)).items():
                place = next(iter(places_of(topic, [number])))
                if place in left:
                    left.discard(place)
                    dropped += count
    raise Unavailable(
        f"not every worker with partitions of {topic} has purged them within {PATIENCE:g} s; "
        "call again"
    )


async def _answers(heard: asyncio.Queue[Heard], request: Purge) -> dict[int, int]:
    """Wait for owners' answers to a request. Return what they have dropped, by partition."""
    dropped: dict[int, int] = {}
    try:
        async with asyncio.timeout(ASK_AGAIN):
            while dropped.keys() < request.ends.keys():
                word = await heard.get()
                if isinstance(word, Exception):
                    raise word
                if isinstance(word, Purged) and word.id == request.id:
                    dropped = {**word.dropped, **dropped}
    except TimeoutError:
        logger.debug("not all owners of %s have answered yet", request.topic)
    return dropped


async def _delete(
    connection: Connection, looker: Looker, ends: Mapping[TopicPartition, int]
) -> int:
    """Delete the records of partitions that no member of the group has. Return their number."""
    from aiokafka.admin import RecordsToDelete

    seen = await looker.look(sorted(ends))
    count = sum(
        max(0, ends[place] - each.partition.position)
        + sum(offset < ends[place] for offset in each.partition.open)
        for place, each in seen.items()
    )
    if count:
        wanted = {place: RecordsToDelete(end) for place, end in ends.items()}
        try:
            with connection.reaching():
                await connection.started().delete_records(wanted, timeout_ms=int(REQUEST * 1000))
        except ConfigurationError as error:
            (topic,) = {place.topic for place in ends}
            raise ConfigurationError(
                f"{error}. A purge needs the right to DELETE the topic {topic}, unless workers "
                "have all of its partitions (docs/rights.md)"
            ) from error
    return count


async def broadcast(listeners: Listeners, command: Command) -> None:
    """Append a command to the topic that every listener reads."""
    await listeners.append(encode_command(command), str(secrets.randbelow(KEYS)).encode())


async def migrated(connection: Connection, namespace: str) -> list[str]:
    """Create the topics that a namespace needs, and return a line for each created one.

    The topics of queues are created at their first use, because nothing lists their names.
    """
    from qtasks_kafka import delays

    await connection.start()
    try:
        created = await connection.ensure([delays.delayed_topic(namespace)], delays.CONFIG)
        created += await connection.ensure([commands_topic(namespace)], CONFIG, partitions=1)
    finally:
        await connection.stop()
    return [f"topic {topic} created" for topic in created]


Heard: TypeAlias = Command | Word | Exception


class Listeners:
    """Reads the topic of commands once for all that listen in this process."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self._connection = connection
        self._topic = commands_topic(namespace)
        self._heard: set[asyncio.Queue[Heard]] = set()
        self._opening = asyncio.Lock()
        self._reading: Task[None] | None = None
        self._stopped = False

    async def append(self, value: bytes, key: bytes, headers: Iterable[str] = ()) -> None:
        """Append a record to the topic."""
        await self._connection.ensure([self._topic], CONFIG, partitions=1)
        marked = tuple((name, b"") for name in headers)
        (written,) = await self._connection.running_writer().write(
            [Record(self._topic, value, key, marked, partition=0)]
        )
        if written.refused is not None:
            raise written.refused

    async def say(self, word: Word) -> None:
        """Append a word for other processes."""
        await self.append(_encoder.encode(word), b"word", (_KIND,))

    async def follow(self) -> AsyncIterator[Command]:
        """Yield the commands that are sent from now on."""
        async with self.hearing() as heard:
            while not self._stopped:
                word = await heard.get()
                if isinstance(word, Exception):
                    raise word
                if isinstance(word, Command):
                    yield word
        raise Closed("KafkaBroker was stopped")

    @asynccontextmanager
    async def hearing(self) -> AsyncIterator[asyncio.Queue[Heard]]:
        """Give a queue of all that is said from now on. An error is the last item of it."""
        heard: asyncio.Queue[Heard] = asyncio.Queue()
        self._heard.add(heard)
        try:
            await self._catch_up(heard)
            yield heard
        finally:
            self._heard.discard(heard)

    async def _catch_up(self, heard: asyncio.Queue[Heard]) -> None:
        """Skip all that was said before."""
        mark = Mark(uuid7().hex)
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST):
                await self._open()
                await self.say(mark)
                while (word := await heard.get()) != mark:
                    if isinstance(word, Exception):
                        raise word

    async def _open(self) -> None:
        """Make sure that the topic is being read, at its end."""
        async with self._opening:
            if self._stopped:
                raise Closed("KafkaBroker was stopped")
            if self._reading is None or self._reading.done():
                consumer = await self._connect()
                self._reading = asyncio.create_task(self._read(consumer))

    async def _connect(self) -> AIOKafkaConsumer:
        consumer = self._connection.consumer(
            group_id=None, fetch_max_wait_ms=LONG_POLL_MS, auto_offset_reset="latest"
        )
        try:
            # While the server is away, this fails before `ensure`, whose lock publishers wait for.
            await consumer.start()
            await self._connection.ensure([self._topic], CONFIG, partitions=1)
            (place,) = places_of(self._topic, [0])
            consumer.assign([place])
            consumer.seek(place, (await consumer.end_offsets([place]))[place])
        except BaseException:
            await close_consumer(consumer)
            raise
        return consumer

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """Pass on all that comes. However reading ends, everybody who waits is told."""
        ended: Exception = Unavailable("commands cannot be heard: reading them was cancelled")
        try:
            with self._connection.reaching():
                while True:
                    for records in (await consumer.getmany(timeout_ms=60_000)).values():
                        for record in records:
                            self._pass_on(bool(record.headers), record.value or b"")
        except Exception as error:  # noqa: BLE001 (everybody who waits raises it)
            ended = error
        finally:
            try:
                await close_consumer(consumer)
            finally:
                # Nothing is awaited after it: who hears of it finds this task done, and reads anew.
                self._tell(ended)

    def _pass_on(self, is_word: bool, value: bytes) -> None:
        try:
            self._tell(_decoder.decode(value) if is_word else decode_command(value))
        except (WireError, msgspec.MsgspecError) as error:
            logger.warning("a command was passed over: %s", error)

    def _tell(self, word: Heard) -> None:
        for heard in self._heard:
            heard.put_nowait(word)

    async def stop(self) -> None:
        """Finish all iterators. Idempotent."""
        self._stopped = True
        self._tell(Closed("KafkaBroker was stopped"))
        async with self._opening:
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.wait({self._reading})


Drop: TypeAlias = Callable[[str, Mapping[int, int]], Awaitable[dict[int, int]]]
"""Drops undelivered records before these offsets of a topic. Returns their number by partition."""


class Obeying:
    """Carries out purges in the partitions of this process, in a task of its own."""

    def __init__(self, listeners: Listeners, drop: Drop) -> None:
        self._listeners = listeners
        self._drop = drop
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_obeys_no_more)

    async def stop(self) -> None:
        """Stop to obey."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        told = False
        while True:
            try:
                async with self._listeners.hearing() as heard:
                    told = False
                    while True:
                        await self._obey(await heard.get())
            except ConfigurationError as error:
                if not told:
                    logger.warning("this worker cannot be asked to purge a queue: %s", error)
                told = True
            except Closed:
                return
            except Unavailable as error:
                logger.debug("purges are not heard for the moment: %s", error)
            await asyncio.sleep(ASK_AGAIN)

    async def _obey(self, word: Heard) -> None:
        if isinstance(word, Exception):
            raise word
        if isinstance(word, Purge) and (dropped := await self._drop(word.topic, word.ends)):
            await self._listeners.say(Purged(word.id, dropped))


def _obeys_no_more(task: Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("this worker cannot be asked to purge a queue any more", exc_info=error)
