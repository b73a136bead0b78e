"""The backend for RabbitMQ: a broker on quorum queues, a storage on a stream."""

from qtasks_core import Backend
from qtasks_core.options import RETENTION_TIME, TEXT
from qtasks_core.urls import take_options
from qtasks_rabbitmq.broker import RabbitMQBroker
from qtasks_rabbitmq.log import RabbitMQLog
from qtasks_rabbitmq.servers import LEASE_TIME
from qtasks_rabbitmq.storage import RabbitMQStorage

_OPTIONS = {"lease": LEASE_TIME, "retention": RETENTION_TIME, "directory": TEXT}


class RabbitMQBackend(Backend):
    """Makes the broker and the storage of `amqp://USER:PASSWORD@HOST:PORT/VHOST?lease=SECONDS`.

    `retention=SECONDS` (`none` for ever) and `directory=PATH` are for the storage. `amqps://` uses
    TLS.
    """

    contract = 1

    def broker(self, url: str) -> RabbitMQBroker:
        """Return the broker of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        for option in ("retention", "directory"):
            options.pop(option, None)
        return RabbitMQBroker(rest, **options)

    def storage(self, url: str) -> RabbitMQStorage:
        """Return the storage of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return RabbitMQStorage(rest, **options)


__all__ = ["RabbitMQBackend", "RabbitMQBroker", "RabbitMQLog", "RabbitMQStorage"]
