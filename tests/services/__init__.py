"""The servers that the tests need: got from the environment, or found or installed and run here."""

from tests.services.kafka import KafkaServer
from tests.services.postgres import PostgresServer
from tests.services.rabbitmq import RabbitMQServer
from tests.services.redis import RedisServer
from tests.services.service import NotOurs, NotReady, Service, Unobtainable

SERVICES: dict[str, type[Service]] = {
    service.name: service for service in (RedisServer, PostgresServer, RabbitMQServer, KafkaServer)
}

__all__ = [
    "SERVICES",
    "KafkaServer",
    "NotOurs",
    "NotReady",
    "PostgresServer",
    "RabbitMQServer",
    "RedisServer",
    "Service",
    "Unobtainable",
]
