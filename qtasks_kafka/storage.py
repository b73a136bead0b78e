"""A storage on Kafka: the log storage on one topic."""

from __future__ import annotations

from pathlib import Path

from qtasks_core.records import RETENTION
from qtasks_kafka.log import KafkaLog
from qtasks_kafka.settings import place_of
from qtasks_log import MEMORY, LogStorage


class KafkaStorage(LogStorage):
    """Keeps records in the compacted topic `NAMESPACE.records`, which every process reads.

    Recent records stay in memory, up to `memory` bytes, the others in a file. With `directory`, the
    file is kept there, and the next start reads only what came after. A second process on the
    machine starts with a copy. Without it, each start reads all.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    Raises `ConfigurationError` if the URL or an option is wrong, or the directory cannot be used.
    """

    driver_loggers = ("aiokafka",)

    def __init__(
        self,
        url: str,
        *,
        partitions: int = 8,
        replicas: int | None = None,
        retention: float | None = RETENTION,
        directory: str | Path | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.place = place_of(url)
        """Which cluster this is on, and as which user."""
        self.log = KafkaLog(url, partitions=partitions, replicas=replicas)
        super().__init__(self.log, retention=retention, directory=directory, memory=memory)
