"""A storage on Kafka: the records are proposals in one topic that every process reads."""

from __future__ import annotations

from qtasks_kafka.log import KafkaLog
from qtasks_log.storage import LogStorage


class KafkaStorage(LogStorage):
    """Remembers tasks in the topic `NAMESPACE.records`."""

    driver_loggers = ("aiokafka",)

    def __init__(self, url: str, *, partitions: int = 8, replicas: int | None = None) -> None:
        super().__init__(KafkaLog(url, partitions=partitions, replicas=replicas))
