"""One durable write and its reading, by each server's real driver."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aio_pika
import asyncpg
import redis.asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

WORD = b"kept"


@dataclass(frozen=True)
class Client:
    """`write` returns when the server has promised the word; `read` gives what is there."""

    write: Callable[[str], Coroutine[Any, Any, None]]
    read: Callable[[str], Coroutine[Any, Any, bytes | None]]


async def redis_write(url: str) -> None:
    async with redis.asyncio.Redis.from_url(url, socket_timeout=5) as client:
        await client.set("word", WORD)


async def redis_read(url: str) -> bytes | None:
    async with redis.asyncio.Redis.from_url(url, socket_timeout=2, retry=None) as client:
        found = await client.get("word")
        return found.encode() if isinstance(found, str) else found


async def postgres_write(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CREATE TABLE IF NOT EXISTS words (word bytea)")
        await connection.execute("INSERT INTO words VALUES ($1)", WORD)
    finally:
        await connection.close()


async def postgres_read(url: str) -> bytes | None:
    connection = await asyncpg.connect(url, timeout=2)
    try:
        found: bytes | None = await connection.fetchval("SELECT word FROM words")
        return found
    finally:
        await connection.close()


async def rabbitmq_write(url: str) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        await channel.declare_queue("words", durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(WORD, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, "words")


async def rabbitmq_read(url: str) -> bytes | None:
    async with await aio_pika.connect(url, timeout=2) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue("words")
        message = await queue.get(timeout=10)
        await message.reject(requeue=True)
        return message.body


async def kafka_write(url: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=url.removeprefix("kafka://"), acks="all")
    await producer.start()
    try:
        await producer.send_and_wait("words", WORD)
    finally:
        await producer.stop()


async def kafka_read(url: str) -> bytes | None:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=url.removeprefix("kafka://"), request_timeout_ms=2000
    )
    await consumer.start()
    try:
        partition = TopicPartition("words", 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        found = await consumer.getmany(partition, timeout_ms=5000)
        return next((record.value for record in found.get(partition, ())), None)
    finally:
        await consumer.stop()


CLIENTS = {
    "redis": Client(redis_write, redis_read),
    "postgres": Client(postgres_write, postgres_read),
    "rabbitmq": Client(rabbitmq_write, rabbitmq_read),
    "kafka": Client(kafka_write, kafka_read),
}
