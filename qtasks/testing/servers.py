"""Throwaway servers for tests: from the environment, in a container, or the installed program."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from qtasks.client.client import Client
from qtasks.testing.errors import NotReady, Unobtainable
from qtasks.testing.native import GuardedProcess, free_port
from qtasks.testing.recipes import RECIPES, Recipe
from qtasks_core.errors import MissingDriver, QTasksError
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_core.urls import redact

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

logger = logging.getLogger("qtasks.testing")

START_WITHIN = 180.0
"""Seconds in which a started server has to answer."""
_PROBE = 1.0
"""Seconds that a client tries to connect before the server itself is looked at."""


class Servers:
    """The servers of one test session.

        servers = Servers()
        try:
            url = servers.url("redis")
        finally:
            servers.stop()

    Each is started when a test first asks for it.
    """

    def __init__(self) -> None:
        self._urls: dict[str, str] = {}
        self._failed: dict[str, Unobtainable | NotReady] = {}
        self.started: list[Container | GuardedProcess] = []
        """The servers that `stop` ends."""

    def url(self, name: str) -> str:
        """Return the URL of a server that answers: `redis`, `postgres`, `rabbitmq` or `kafka`.

        It is the server that the environment variable `QTASKS_TEST_<NAME>_URL` names, else one that
        is started in a container, else one whose installed program is started.

        Raises `Unobtainable` if none of them is possible, with the reason for each, and if the
        driver is missing. Raises `NotReady` if the server was started and does not answer within 60
        seconds.
        """
        if name in self._failed:
            raise self._failed[name]
        if name not in self._urls:
            try:
                self._urls[name] = self._obtained(RECIPES[name])
            except (Unobtainable, NotReady) as error:
                self._failed[name] = error
                raise
        return self._urls[name]

    def stop(self) -> None:
        """End the servers that were started, and remove their data. Idempotent."""
        self._urls.clear()
        while self.started:
            self.started.pop().stop()

    def _obtained(self, recipe: Recipe) -> str:
        variable = f"QTASKS_TEST_{recipe.name.upper()}_URL"
        if url := os.environ.get(variable):
            _wait_until_ready(url, lambda: None)
            return url
        reasons = [f"{variable} is not set"]
        for how, start in (("container", _start_container), ("native", _start_native)):
            try:
                server, url = start(recipe)
            except Unobtainable as error:
                logger.info("%s: not as %s: %s", recipe.name, how, error)
                reasons.append(f"{how}: {error}")
                continue
            self.started.append(server)
            _wait_until_ready(url, server.ended)
            return url
        raise Unobtainable(f"there is no {recipe.name} for tests: {'; '.join(reasons)}")


def _start_native(recipe: Recipe) -> tuple[GuardedProcess, str]:
    return recipe.start_native()


class Container:
    """A server in a container."""

    def __init__(self, container: DockerContainer) -> None:
        self._container = container
        self.id = container.get_wrapped_container().id

    def ended(self) -> str | None:
        """Return why the server no longer runs, or None while it does."""
        inner = self._container.get_wrapped_container()
        inner.reload()
        if inner.status == "running":
            return None
        printed = inner.logs(tail=5).decode(errors="replace").strip().replace("\n", " | ")
        return f"its container is {inner.status}: {printed or 'it printed nothing'}"

    def stop(self) -> None:
        """Remove the container with its data."""
        self._container.stop()


def _start_container(recipe: Recipe) -> tuple[Container, str]:
    try:
        from docker.errors import DockerException
        from testcontainers.core.container import DockerContainer
    except ImportError as error:
        raise Unobtainable("testcontainers is missing: pip install testcontainers") from error
    try:
        container = DockerContainer(recipe.chosen_image)
    except DockerException as error:
        raise Unobtainable(f"no Docker engine answers ({error})") from error
    port = recipe.port
    try:
        if recipe.tells_its_address:
            port = free_port()
            container.with_bind_ports(port, port)
        else:
            container.with_exposed_ports(port)
        describe(container, recipe, container.get_docker_client().host(), port)
        container.start()
    except DockerException as error:
        raise Unobtainable(f"{recipe.chosen_image}: {error}") from error
    started = Container(container)
    try:
        host = container.get_container_host_ip()
        return started, recipe.url(host, int(container.get_exposed_port(port)))
    except BaseException:
        started.stop()
        raise


def describe(container: DockerContainer, recipe: Recipe, host: str, port: int) -> None:
    """Set the environment and the command of a container, whose clients use this address."""
    container.with_envs(**recipe.environment, **recipe.environment_at(host, port))
    if recipe.command:
        container.with_command(list(recipe.command))


def _wait_until_ready(url: str, ended: Callable[[], str | None]) -> None:
    """Return when the server answers its broker.

    Raises `NotReady`, and `Unobtainable` if the broker has no driver.
    """
    deadline = time.monotonic() + START_WITHIN
    while True:
        try:
            with ThreadPoolExecutor(1) as thread:  # this one may have a running loop
                thread.submit(asyncio.run, _probe(url)).result()
        except MissingDriver as error:
            raise Unobtainable(str(error)) from error
        except QTasksError as error:
            reason = ended()
            if reason is not None or time.monotonic() > deadline:
                raise NotReady(f"{redact(url)} does not answer: {reason or error}") from error
        else:
            return


async def _probe(url: str) -> None:
    """Connect once. Raises `Unavailable` after a few tries, and `MissingDriver`."""
    client = Client("qtasks-probe", resolve_broker(url), resolve_storage(url))
    await client.start(asyncio.get_running_loop().time() + _PROBE)
    await client.stop()
