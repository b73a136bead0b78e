"""The backend for Apache Kafka: a consumer group as the broker, a log as the storage."""

from qtasks_core import Backend
from qtasks_core.urls import take_options
from qtasks_kafka.broker import KafkaBroker
from qtasks_kafka.log import KafkaLog
from qtasks_kafka.settings import OURS
from qtasks_kafka.share_broker import ShareGroupKafkaBroker
from qtasks_kafka.storage import KafkaStorage
from qtasks_kafka.transactional_broker import TransactionalKafkaBroker


class KafkaBackend(Backend):
    """Makes the broker and the storage of `kafka://HOST:PORT,HOST:PORT`.

    Its options are `lease=SECONDS`, `partitions=N`, `replicas=N`, and for the storage
    `retention=SECONDS` (`none` for ever) and `directory=PATH`. `kafka://USER:PASSWORD@…` logs in,
    with `sasl_mechanism` (PLAIN by default). The default of `security_protocol` follows from the
    login and the `ssl_` options:

    - `ssl_cafile`: the authority that signed the server's certificate
    - `ssl_certfile`, `ssl_keyfile` and `ssl_password`: this client's certificate
    - `ssl_check_hostname=false`

    `client_id` is this client's name in the server's logs.
    """

    contract = 1
    _broker: type[KafkaBroker] = KafkaBroker

    def broker(self, url: str) -> KafkaBroker:
        """Return the broker of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, OURS)
        for option in ("retention", "directory"):
            options.pop(option, None)
        return self._broker(rest, **options)

    def storage(self, url: str) -> KafkaStorage:
        """Return the storage of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, OURS)
        options.pop("lease", None)
        return KafkaStorage(rest, **options)


class KafkaShareBackend(KafkaBackend):
    """Makes the parts of `kafka+share://HOST:PORT,HOST:PORT`: the broker is on a share group.

    It has the options of `kafka://`. The storage is the same.
    """

    _broker = ShareGroupKafkaBroker


class TransactionalKafkaBackend(KafkaBackend):
    """Makes the parts of `kafka+transactional://HOST:PORT,HOST:PORT`: the broker uses transactions.

    It has the options of `kafka://`. The storage is the same.
    """

    _broker = TransactionalKafkaBroker


__all__ = [
    "KafkaBackend",
    "KafkaBroker",
    "KafkaLog",
    "KafkaShareBackend",
    "KafkaStorage",
    "ShareGroupKafkaBroker",
    "TransactionalKafkaBackend",
    "TransactionalKafkaBroker",
]
