"""How each server is started for tests: its image, and its own program."""

from __future__ import annotations

import os
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple
from uuid import uuid4

from qtasks.testing.errors import Unobtainable
from qtasks.testing.native import GuardedProcess, found, free_port

PASSWORD = "qtasks-test"


class Launch(NamedTuple):
    """The command of a server's own program, and what it needs in the environment."""

    argv: list[str]
    environment: Mapping[str, str] = {}


class Recipe(ABC):
    """What is particular about one server."""

    name: ClassVar[str]
    image: ClassVar[str]
    """The container image. The environment variable `QTASKS_IMAGE_<NAME>` replaces it."""
    port: ClassVar[int]
    """The port that the server listens on in its container, unless it tells its address."""
    command: ClassVar[tuple[str, ...]] = ()
    """What the container runs; by default what its image says."""
    environment: ClassVar[Mapping[str, str]] = {}
    """The container's environment."""
    tells_its_address = False
    """Whether clients, and the server itself, go where the server says.

    It must know its address before it starts. In its container it listens on the published port.
    """
    package: ClassVar[str]
    """Debian's package of the server's own program."""
    account: ClassVar[str | None] = None
    """Who runs the program if this process is root's."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGKILL
    """What ends the program. After another signal than SIGKILL it has five seconds."""

    @property
    def chosen_image(self) -> str:
        """The container image, from the environment or else `image`."""
        return os.environ.get(f"QTASKS_IMAGE_{self.name.upper()}") or self.image

    @abstractmethod
    def url(self, host: str, port: int) -> str:
        """Return the URL of the server."""

    def environment_at(self, host: str, port: int) -> dict[str, str]:
        """Return what is added to `environment` of a server that tells its address."""
        return {}

    @abstractmethod
    def program(self) -> str:
        """Return the path of the server's own program. Raises `Unobtainable`."""

    @abstractmethod
    def set_up(self, process: GuardedProcess, program: str, port: int) -> Launch:
        """Prepare the directory of the process, and return how to start the program.

        Raises `NotReady`.
        """

    def start_native(self) -> tuple[GuardedProcess, str]:
        """Start the server's own program; return it with its URL, before it answers.

        Raises `Unobtainable`, and `NotReady`.
        """
        program = self.program()
        process, port = GuardedProcess(self.account, self.stop_signal), free_port()
        try:
            process.start(*self.set_up(process, program, port))
        except BaseException:
            process.stop()
            raise
        return process, self.url("127.0.0.1", port)


class Redis(Recipe):
    """Redis, with an append-only file.

    `appendfsync no`: a write reaches the kernel before it is answered, so what was answered
    survives `kill -9`, though not a failing machine. With `everysec` it does not always: while a
    sync is under way, which on a busy disk takes seconds, answers go out before the write.
    """

    name = "redis"
    image = "redis:8"
    port = 6379
    package = "redis-server"
    command = (
        "redis-server", "--requirepass", PASSWORD,
        "--appendonly", "yes", "--appendfsync", "no", "--save", "",
    )  # fmt: skip

    def url(self, host: str, port: int) -> str:
        return f"redis://:{PASSWORD}@{host}:{port}/0"

    def program(self) -> str:
        return found("redis-server", self.package)

    def set_up(self, process: GuardedProcess, program: str, port: int) -> Launch:
        options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(process.directory))
        return Launch([program, *self.command[1:], *options])


class Postgres(Recipe):
    """PostgreSQL, durable as it comes. Its own program does not run as root."""

    name = "postgres"
    image = "postgres:18"
    port = 5432
    package = "postgresql"
    command = ("postgres", "-c", "max_connections=200")
    environment: ClassVar[Mapping[str, str]] = {"POSTGRES_PASSWORD": PASSWORD}
    account = "postgres"
    # Killed, it would leave a segment of shared memory behind; SIGQUIT stops it at once and clean.
    stop_signal = signal.SIGQUIT

    def url(self, host: str, port: int) -> str:
        return f"postgresql://postgres:{PASSWORD}@{host}:{port}/postgres"

    def program(self) -> str:
        """Return the one in PATH, or else the newest. Debian keeps them out of PATH."""
        if program := shutil.which("postgres"):
            return str(Path(program).resolve())
        versions = Path("/usr/lib/postgresql").glob("*/bin/postgres")
        newest = max(versions, key=lambda path: int(path.parts[-3]), default=None)
        return str(newest or found("postgres", self.package))

    def set_up(self, process: GuardedProcess, program: str, port: int) -> Launch:
        password = process.write("password", PASSWORD)
        options = ("--pgdata=data", "--username=postgres", f"--pwfile={password}", "--no-sync")
        locale = ("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8")
        process.run(str(Path(program).with_name("initdb")), *options, *locale)
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # in the directory, not in /dev/shm
        }
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Launch([program, "-D", "data", "-p", str(port), *self.command[1:], *given])


class RabbitMQ(Recipe):
    """RabbitMQ. Its own program is a node with an epmd of its own."""

    name = "rabbitmq"
    image = "rabbitmq:4.3"
    port = 5672
    package = "rabbitmq-server"
    account = "rabbitmq"
    # No spinning schedulers: the machine is shared with the tests. And a delayed message that the
    # server was moving when it crashed is moved again after 10 s, instead of 3 minutes.
    erlang = (
        "+sbwt none +sbwtdcpu none +sbwtdio none "
        "-rabbit dead_letter_worker_publisher_confirm_timeout 10000"
    )
    environment: ClassVar[Mapping[str, str]] = {"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erlang}

    def url(self, host: str, port: int) -> str:
        return f"amqp://guest:guest@{host}:{port}/"

    def program(self) -> str:
        program = found("rabbitmq-server", self.package)
        # Debian's program in PATH writes one log for all nodes; the one that it starts does not.
        real = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        debian = Path(program).parent in (Path("/usr/sbin"), Path("/usr/bin"))
        return real if debian and os.access(real, os.X_OK) else program

    def set_up(self, process: GuardedProcess, program: str, port: int) -> Launch:
        directory = process.directory
        settings = "log.file.level = warning\ndisk_free_limit.absolute = 50MB\n"
        process.write("rabbitmq.conf", settings)
        environment = {
            "HOME": str(directory),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": str(process.write("rabbitmq-env.conf", "")),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(process.write("enabled_plugins", "[].\n")),
            "RABBITMQ_NODENAME": f"qtasks-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Its start script then becomes the server instead of waiting for it.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput {self.erlang}",
        }
        for variable in ("MNESIA_BASE", "LOG_BASE", "PID_FILE", "FEATURE_FLAGS_FILE"):
            environment[f"RABBITMQ_{variable}"] = str(directory / variable.lower())
        return Launch([program], environment)


class Kafka(Recipe):
    """Kafka: one process, broker and controller."""

    name = "kafka"
    image = "apache/kafka:4.3.1"
    port = 9092
    package = "default-jre-headless"
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
    jvm: ClassVar[tuple[str, ...]] = ("-Xmx512m",)
    """Options of Java."""

    def url(self, host: str, port: int) -> str:
        return f"kafka://{host}:{port}"

    def settings_at(self, listen: str, address: str, controller: int) -> dict[str, str]:
        """Return all settings but the directory.

        `listen` and `address` are hosts with the same port. Clients, and the server itself, connect
        to `address`. `controller` is a port of its own.
        """
        return {
            **self.settings,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://{listen},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://{address}",
        }

    def environment_at(self, host: str, port: int) -> dict[str, str]:
        """Return all settings, as the image reads them from its environment."""
        settings = {
            **self.settings_at(f"0.0.0.0:{port}", f"{host}:{port}", 9093),
            "log.dirs": "/var/lib/kafka/data",
        }
        variables = {f"KAFKA_{key.upper().replace('.', '_')}": v for key, v in settings.items()}
        return {**variables, "KAFKA_HEAP_OPTS": " ".join(self.jvm)}

    def program(self) -> str:
        java = found("java", self.package)
        self.libraries()
        return java

    def set_up(self, process: GuardedProcess, program: str, port: int) -> Launch:
        settings = self.native_settings(process, port)
        lines = "".join(f"{key}={value}\n" for key, value in settings.items())
        properties = str(process.write("server.properties", lines))
        java = (program, *self.jvm, "-cp", f"{self.libraries()}/*")
        tool = ("kafka.tools.StorageTool", "format", "--config", properties, "--cluster-id")
        process.run(*java, *tool, uuid4().hex[:22])
        return Launch([*java, "kafka.Kafka", properties])

    def native_settings(self, process: GuardedProcess, port: int) -> dict[str, str]:
        """Return all settings of the server's own program."""
        address = f"127.0.0.1:{port}"
        return {
            **self.settings_at(address, address, free_port()),
            "log.dirs": str(process.directory / "data"),
        }

    def libraries(self) -> Path:
        """Return the folder of Kafka's libraries. Raises `Unobtainable`."""
        home = os.environ.get("KAFKA_HOME")
        script = shutil.which("kafka-server-start.sh")
        if home is None and script is not None:
            home = str(Path(script).resolve().parents[1])
        if home is None:
            raise Unobtainable("KAFKA_HOME is not set: it names the folder of an unpacked Kafka")
        libraries = Path(home) / "libs"
        if not any(libraries.glob("kafka_2.*.jar")):
            raise Unobtainable(f"no Kafka in {libraries} (KAFKA_HOME is {home})")
        return libraries


RECIPES: dict[str, Recipe] = {r.name: r for r in (Redis(), Postgres(), RabbitMQ(), Kafka())}
"""By the name that a test gives."""
