"""A storage on Kafka: the log storage on one topic."""

from __future__ import annotations

from qtasks_kafka.log import KafkaLog
from qtasks_log.storage import LogStorage


class KafkaStorage(LogStorage):
    """Keeps records in the topic `NAMESPACE.records`, and reads the whole topic at the start.

    Raises `ConfigurationError` if the URL or an option is wrong.
    """

    driver_loggers = ("aiokafka",)

    def __init__(self, url: str, *, partitions: int = 8, replicas: int | None = None) -> None:
        super().__init__(KafkaLog(url, partitions=partitions, replicas=replicas))
