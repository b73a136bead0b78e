"""The peers that use RabbitMQ as their broker. All of them keep their results in Redis."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import qtasks, redis
from benchmarks.peers.peer import CONCURRENCY


class QTasks(qtasks.QTasks):
    """A quorum queue, with confirmed publishes."""

    notes = "quorum queue, publishes confirmed"


class Taskiq(redis.Taskiq):
    """A quorum queue, with confirmed publishes."""

    notes = "quorum queue, publishes confirmed"

    def make_broker(self) -> Any:
        from taskiq_aio_pika import AioPikaBroker

        return AioPikaBroker(self.url, qos=CONCURRENCY)


class Dramatiq(redis.Dramatiq):
    """A classic queue; publishes are not confirmed."""

    notes = "classic queue, publishes not confirmed; blocking client; 8 threads, its default"

    def make_broker(self) -> Any:
        from dramatiq.brokers.rabbitmq import RabbitmqBroker

        return RabbitmqBroker(url=self.url)


class Celery(redis.Celery):
    """A classic queue; publishes are not confirmed."""

    notes = "classic queue, publishes not confirmed; blocking client; one process per core"
