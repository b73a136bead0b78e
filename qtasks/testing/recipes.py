"""How each server is started for tests: its image, and its own program."""

from __future__ import annotations

import os
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

from qtasks.testing.errors import Unobtainable
from qtasks.testing.native import GuardedProcess, found, free_port

_PASSWORD = "qtasks"


class Recipe(ABC):
    """What is particular about one server."""

    name: ClassVar[str]
    image: ClassVar[str]
    """The container image. The environment variable `QTASKS_IMAGE_<NAME>` replaces it."""
    port: ClassVar[int]
    """The port that the server listens on in its container."""
    command: ClassVar[tuple[str, ...]] = ()
    """What the container runs; by default what its image says."""
    environment: ClassVar[Mapping[str, str]] = {}
    """The container's environment."""
    tells_its_address = False
    """Whether clients go where the server says. It must know its address before it starts."""

    @abstractmethod
    def url(self, host: str, port: int) -> str:
        """Return the URL of the server."""

    def environment_at(self, host: str, port: int) -> dict[str, str]:
        """Return what is added to `environment` of a server that tells its address."""
        return {}

    @abstractmethod
    def start_native(self) -> tuple[GuardedProcess, str]:
        """Start the server's own program; return it with its URL, before it answers.

        Raises `Unobtainable`, and `NotReady`.
        """


class Redis(Recipe):
    """Redis, with an append-only file."""

    name = "redis"
    image = "redis:8"
    port = 6379
    command = ("redis-server", "--requirepass", _PASSWORD, "--appendonly", "yes")

    def url(self, host: str, port: int) -> str:
        return f"redis://:{_PASSWORD}@{host}:{port}/0"

    def start_native(self) -> tuple[GuardedProcess, str]:
        program = found("redis-server", "redis-server")
        process, port = GuardedProcess(), free_port()
        options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(process.directory))
        process.start((program, *self.command[1:], *options))
        return process, self.url("127.0.0.1", port)


class Postgres(Recipe):
    """PostgreSQL. Its own program does not run as root."""

    name = "postgres"
    image = "postgres:18"
    port = 5432
    environment: ClassVar[Mapping[str, str]] = {"POSTGRES_PASSWORD": _PASSWORD}

    def url(self, host: str, port: int) -> str:
        return f"postgresql://postgres:{_PASSWORD}@{host}:{port}/postgres"

    def start_native(self) -> tuple[GuardedProcess, str]:
        programs = self._programs()
        # It refuses root. SIGQUIT stops it at once, and lets it remove its shared memory.
        process, port = GuardedProcess("postgres", signal.SIGQUIT), free_port()
        password = process.write("password", _PASSWORD)
        options = ("--pgdata=data", "--username=postgres", f"--pwfile={password}", "--no-sync")
        locale = ("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8")
        try:
            process.run(str(programs / "initdb"), *options, *locale)
            listen = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
            process.start((str(programs / "postgres"), "-D", "data", "-p", str(port), *listen))
        except BaseException:
            process.stop()
            raise
        return process, self.url("127.0.0.1", port)

    def _programs(self) -> Path:
        """Return the directory of the newest server's programs. Debian keeps them out of PATH."""
        versions = Path("/usr/lib/postgresql").glob("*/bin/postgres")
        newest = max(versions, key=lambda path: int(path.parts[-3]), default=None)
        return (newest or Path(found("postgres", "postgresql"))).resolve().parent


class RabbitMQ(Recipe):
    """RabbitMQ. Its own program is a node with an epmd of its own."""

    name = "rabbitmq"
    image = "rabbitmq:4.3"
    port = 5672

    def url(self, host: str, port: int) -> str:
        return f"amqp://guest:guest@{host}:{port}/"

    def start_native(self) -> tuple[GuardedProcess, str]:
        program = found("rabbitmq-server", "rabbitmq-server")
        # Debian's program in PATH writes one log for all nodes; the one that it starts does not.
        real = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        process, port = GuardedProcess("rabbitmq"), free_port()
        directory = process.directory
        process.write("rabbitmq.conf", "log.file.level = warning\n")
        environment = {
            "HOME": str(directory),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(process.write("rabbitmq-env.conf", "")),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(process.write("enabled_plugins", "[].\n")),
            "RABBITMQ_NODENAME": f"qtasks-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_ALLOW_INPUT": "true",  # the start script becomes the server
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput",
        }
        for variable in ("MNESIA_BASE", "LOG_BASE", "PID_FILE", "FEATURE_FLAGS_FILE"):
            environment[f"RABBITMQ_{variable}"] = str(directory / variable.lower())
        process.start((real if os.access(real, os.X_OK) else program,), environment)
        return process, self.url("127.0.0.1", port)


class Kafka(Recipe):
    """Kafka: one process, broker and controller."""

    name = "kafka"
    image = "apache/kafka:4.3.1"
    port = 9092
    tells_its_address = True
    settings: ClassVar[Mapping[str, str]] = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
    }
    """One replica of everything."""

    def url(self, host: str, port: int) -> str:
        return f"kafka://{host}:{port}"

    def environment_at(self, host: str, port: int) -> dict[str, str]:
        """Return all settings, as the image reads them from its environment."""
        settings = {
            **self.settings,
            "controller.quorum.voters": "1@127.0.0.1:9093",
            "listeners": f"PLAINTEXT://0.0.0.0:{self.port},CONTROLLER://127.0.0.1:9093",
            "advertised.listeners": f"PLAINTEXT://{host}:{port}",
        }
        return {f"KAFKA_{key.upper().replace('.', '_')}": v for key, v in settings.items()}

    def start_native(self) -> tuple[GuardedProcess, str]:
        java, jars = found("java", "default-jre-headless"), self._jars()
        process, port, controller = GuardedProcess(), free_port(), free_port()
        listeners = f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}"
        settings = {
            **self.settings,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": listeners,
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "log.dirs": str(process.directory / "data"),
        }
        lines = "".join(f"{key}={value}\n" for key, value in settings.items())
        properties = str(process.write("server.properties", lines))
        program = (java, "-Xmx512m", "-cp", f"{jars}/*")
        tool = ("kafka.tools.StorageTool", "format", "--config", properties, "--cluster-id")
        try:
            process.run(*program, *tool, uuid4().hex[:22])
            process.start((*program, "kafka.Kafka", properties))
        except BaseException:
            process.stop()
            raise
        return process, self.url("127.0.0.1", port)

    def _jars(self) -> Path:
        """Return the folder of Kafka's libraries."""
        home = os.environ.get("KAFKA_HOME")
        script = shutil.which("kafka-server-start.sh")
        if home is None and script is not None:
            home = str(Path(script).resolve().parents[1])
        if home is None:
            raise Unobtainable("KAFKA_HOME is not set: it names the folder of an unpacked Kafka")
        jars = Path(home) / "libs"
        if not any(jars.glob("kafka_2.*.jar")):
            raise Unobtainable(f"no Kafka in {jars} (KAFKA_HOME is {home})")
        return jars


RECIPES: dict[str, Recipe] = {r.name: r for r in (Redis(), Postgres(), RabbitMQ(), Kafka())}
"""By the name that a test gives."""
