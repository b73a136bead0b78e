"""A storage on Kafka: the log storage on one topic."""

from __future__ import annotations

from qtasks_core.records import RETENTION
from qtasks_kafka.log import KafkaLog
from qtasks_log.storage import LogStorage


class KafkaStorage(LogStorage):
    """Keeps records in the topic `NAMESPACE.records`, and reads the whole topic at the start.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    Raises `ConfigurationError` if the URL or an option is wrong.
    """

    driver_loggers = ("aiokafka",)

    def __init__(
        self,
        url: str,
        *,
        partitions: int = 8,
        replicas: int | None = None,
        retention: float | None = RETENTION,
    ) -> None:
        log = KafkaLog(url, partitions=partitions, replicas=replicas)
        super().__init__(log, retention=retention)
