"""A backend on Apache Kafka: a consumer group as the broker, a log as the storage."""

from qtasks_core import Backend
from qtasks_core.urls import take_options
from qtasks_kafka.broker import KafkaBroker
from qtasks_kafka.log import KafkaLog
from qtasks_kafka.storage import KafkaStorage

_OPTIONS = {"lease": float, "partitions": int, "replicas": int}


class KafkaBackend(Backend):
    """Answers for `kafka://HOST:PORT,HOST:PORT?lease=SECONDS&partitions=N&replicas=N`.

    `kafka://USER:PASSWORD@…` with `security_protocol`, `sasl_mechanism` and `ssl_cafile` logs in.
    """

    contract = 1

    def broker(self, url: str) -> KafkaBroker:
        """Return the broker of `url`."""
        rest, options = take_options(url, _OPTIONS)
        return KafkaBroker(rest, **options)

    def storage(self, url: str) -> KafkaStorage:
        """Return the storage of `url`."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return KafkaStorage(rest, **options)


__all__ = ["KafkaBackend", "KafkaBroker", "KafkaLog", "KafkaStorage"]
