"""RabbitMQ for the tests, a node with an epmd of its own."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from qtasks.testing.errors import NotReady
from qtasks.testing.recipes import RECIPES
from tests.services.container import Contained
from tests.services.native import ByRecipe
from tests.services.service import NotInContainers, NotOurs, Service, Way

NEW_QUEUE_NOTED = 1.2  # seconds


class NativeRabbitMQ(ByRecipe):
    """Debian's rabbitmq-server, which wants to be its own user and shares what it is not told."""

    recipe = RECIPES["rabbitmq"]

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` on the node and return what it prints."""
        beside = f"{os.path.dirname(self.program)}/rabbitmqctl"
        done = subprocess.run(
            [beside if os.access(beside, os.X_OK) else "rabbitmqctl", "-q", *arguments],
            env={**os.environ, **self.environment()},
            user=self.process.user,
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


class ContainedRabbitMQ(Contained):
    """RabbitMQ in a container."""

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
        return ContainedRabbitMQ(RECIPES[self.name])

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
