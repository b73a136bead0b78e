"""RabbitMQ for the tests, a node with an epmd of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services.container import Contained
from tests.services.install import need_program
from tests.services.native import Native, free_port
from tests.services.service import NotInContainers, NotOurs, NotReady, Service, Way

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

NEW_QUEUE_NOTED = 1.2  # seconds
# No spinning schedulers: the machine is shared with the tests.
QUIET = "+sbwt none +sbwtdcpu none +sbwtdio none"


class NativeRabbitMQ(Native):
    """Debian's rabbitmq-server, which wants to be its own user and shares what it is not told."""

    account = "rabbitmq"

    def find(self) -> None:
        program = need_program("rabbitmq-server", "rabbitmq-server")
        # Debian's wrapper in PATH writes to one log for all nodes; what it wraps does not.
        wrapped = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        self._program = wrapped if os.access(wrapped, os.X_OK) else program

    def prepare(self) -> str:
        self.port, self._distribution, self._epmd = free_port(), free_port(), free_port()
        self.write("enabled_plugins", "[].\n")
        self.write("rabbitmq-env.conf", "")
        self.write("rabbitmq.conf", "log.file.level = warning\ndisk_free_limit.absolute = 50MB\n")
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def command(self) -> list[str]:
        return [self._program]

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on the node and return what it prints."""
        beside = f"{os.path.dirname(self._program)}/rabbitmqctl"
        done = subprocess.run(
            [beside if os.access(beside, os.X_OK) else "rabbitmqctl", "-q", *arguments],
            env={**os.environ, **self.environment()},
            user=self.user,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NotReady(f"rabbitmqctl {arguments[0]}: {done.stderr or done.stdout}")
        return done.stdout

    def kill(self) -> None:
        """Kill it once it has noted every queue that was declared before.

        The name of a new quorum queue reaches the disk up to a second after its declaration was
        answered (Ra's names.dets, saved every 500 ms when at rest). Killed earlier, RabbitMQ loses
        the queue and all that was confirmed in it, and the queue has no leader from then on. That
        is the server's own durability; a test of ours that ran into it would test nothing else.
        """
        time.sleep(NEW_QUEUE_NOTED)
        super().kill()

    def environment(self) -> Mapping[str, str]:
        below = self.directory
        return {
            "HOME": str(below),
            "RABBITMQ_NODENAME": f"qtasks-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": str(below / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(below / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(below / "advanced"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(below / "enabled_plugins"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(below / "feature_flags"),
            "RABBITMQ_MNESIA_BASE": str(below / "mnesia"),
            "RABBITMQ_LOG_BASE": str(below / "log"),
            "RABBITMQ_PID_FILE": str(below / "pid"),
            # Its start script then becomes the server instead of waiting for it.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-noinput {QUIET}",
        }


class ContainedRabbitMQ(Contained):
    """RabbitMQ in a container; the class of testcontainers wants one more driver."""

    inside = 5672

    def make(self, image: str) -> DockerContainer:
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        return (
            DockerContainer(image)
            .with_env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", QUIET)
            .waiting_for(LogMessageWaitStrategy("Server startup complete"))
        )

    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` in the container and return what it prints."""
        return self.execute("rabbitmqctl", "-q", *arguments)

    def kill(self) -> None:
        """Kill it, late for the same reason as the native one."""
        time.sleep(NEW_QUEUE_NOTED)
        super().kill()


class RabbitMQServer(Service):
    name = "rabbitmq"

    def native(self) -> Way:
        return NativeRabbitMQ()

    def container(self) -> Way:
        return ContainedRabbitMQ(self.name)

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on the server. Raises `NotOurs` if somebody else runs it."""
        if not isinstance(self._way, NativeRabbitMQ | ContainedRabbitMQ):
            raise NotOurs("rabbitmqctl is used on a server of the tests' own only")
        return self._way.control(*arguments)

    def give(self, file: Path) -> Path:
        """Copy a file to where the server may read it. Raises `NotOurs`."""
        if isinstance(self._way, ContainedRabbitMQ):
            raise NotInContainers("a listener that is added later has no published port")
        if not isinstance(self._way, NativeRabbitMQ):
            raise NotOurs("files are given to a server of the tests' own only")
        return self._way.write(file.name, file.read_text())

    async def probe(self, url: str) -> str:
        import aiormq

        connection = aiormq.Connection(url)
        try:
            await connection.connect()
        except (OSError, aiormq.exceptions.AMQPError) as error:
            raise NotReady(str(error)) from error
        try:
            version = connection.server_properties["version"]
        finally:
            await connection.close()
        return version.decode() if isinstance(version, bytes) else str(version)
