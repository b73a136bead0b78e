"""The servers that the tests need: from the environment, run on this machine, or in containers."""

from qtasks.testing.errors import NotReady, Unobtainable
from tests.services.kafka import KafkaServer
from tests.services.postgres import PostgresServer
from tests.services.rabbitmq import RabbitMQServer
from tests.services.redis import RedisServer
from tests.services.service import NotInContainers, NotOurs, Service, in_containers

SERVICES: dict[str, type[Service]] = {
    service.name: service for service in (RedisServer, PostgresServer, RabbitMQServer, KafkaServer)
}

__all__ = [
    "SERVICES",
    "KafkaServer",
    "NotInContainers",
    "NotOurs",
    "NotReady",
    "PostgresServer",
    "RabbitMQServer",
    "RedisServer",
    "Service",
    "Unobtainable",
    "in_containers",
]
