"""A storage on RabbitMQ: the log storage on a stream."""

from __future__ import annotations

from qtasks_log import LogStorage
from qtasks_rabbitmq.log import RabbitMQLog


class RabbitMQStorage(LogStorage):
    """Keeps records in a stream, and reads the whole stream at the start.

    Raises `ConfigurationError` if the URL is wrong.
    """

    driver_loggers = ("aio_pika", "aiormq")

    def __init__(self, url: str = "amqp://localhost") -> None:
        super().__init__(RabbitMQLog(url))
