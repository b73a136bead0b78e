"""A storage on RabbitMQ: the log storage on a stream."""

from __future__ import annotations

from pathlib import Path

from qtasks_core.records import RETENTION
from qtasks_log import MEMORY, LogStorage
from qtasks_rabbitmq.log import RabbitMQLog


class RabbitMQStorage(LogStorage):
    """Keeps records in a stream, which every process reads.

    Recent records stay in memory, up to `memory` bytes, the others in a file. With `directory`, the
    file is kept there, and the next start reads only what came after. A second process on the
    machine starts with a copy. Without it, each start reads all.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    Raises `ConfigurationError` if the URL is wrong or the directory
    cannot be used.
    """

    driver_loggers = ("aio_pika", "aiormq")

    def __init__(
        self,
        url: str = "amqp://localhost",
        *,
        retention: float | None = RETENTION,
        directory: str | Path | None = None,
        memory: int = MEMORY,
    ) -> None:
        log = RabbitMQLog(url)
        super().__init__(log, retention=retention, directory=directory, memory=memory)
