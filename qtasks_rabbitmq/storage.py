"""A storage on RabbitMQ: the log storage on a stream."""

from __future__ import annotations

from qtasks_core.records import RETENTION
from qtasks_log import LogStorage
from qtasks_rabbitmq.log import RabbitMQLog


class RabbitMQStorage(LogStorage):
    """Keeps records in a stream, and reads the whole stream at the start.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    Raises `ConfigurationError` if the URL is wrong.
    """

    driver_loggers = ("aio_pika", "aiormq")

    def __init__(
        self, url: str = "amqp://localhost", *, retention: float | None = RETENTION
    ) -> None:
        super().__init__(RabbitMQLog(url), retention=retention)
