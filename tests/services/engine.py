"""A Docker engine for the tests in containers: the one that answers, else one of their own."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import docker
import docker.errors
import requests

from qtasks.testing.errors import NotReady, Unobtainable
from tests.services.install import cache, need_program
from tests.services.native import Native
from tests.services.service import FromEnvironment, Service, Way

DEFAULT_SOCKET = "unix:///var/run/docker.sock"


class Answering(FromEnvironment):
    """An engine that somebody else runs; it is left running."""

    how = "answering"

    def start(self) -> str:
        url = os.environ.get("DOCKER_HOST") or DEFAULT_SOCKET
        try:
            connect(url).close()
        except NotReady as error:
            raise Unobtainable(f"none answers at {url}") from error
        return url


class NativeEngine(Native):
    """`dockerd` with a socket of its own, so nobody else finds it, and images that stay.

    Its guard ends it with the process that asked for it.
    """

    stop_signal = signal.SIGTERM

    def find(self) -> None:
        if os.geteuid() != 0:
            raise Unobtainable("dockerd runs as root only; start an engine, or run this as root")
        self._program = need_program("dockerd", "docker.io")

    def prepare(self) -> str:
        return f"unix://{self.directory}/docker.sock"

    def command(self) -> list[str]:
        # Some programs close every file that they might have open, which may be a billion. More
        # than dockerd may have itself is not permitted.
        files = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        return [
            # What it mounts is gone with it, and does not keep its directory from being removed.
            "unshare",
            "--mount",
            self._program,
            f"--host=unix://{self.directory}/docker.sock",
            f"--data-root={cache() / 'docker'}",
            f"--exec-root={self.directory}/exec",
            f"--pidfile={self.directory}/pid",
            f"--default-ulimit=nofile={files}:{files}",
        ]

    def listening(self) -> bool:
        return (self.directory / "docker.sock").exists()


class Engine(Service):
    name = "docker"

    @property
    def variable(self) -> str:
        return "DOCKER_HOST"

    def ways(self) -> tuple[Way, ...]:
        return (Answering(self.variable), self.native())

    def native(self) -> Way:
        return NativeEngine()

    async def probe(self, url: str) -> str:
        client = connect(url)
        try:
            return str(client.version()["Version"])
        finally:
            client.close()


def connect(url: str) -> Any:
    """Return a client of the engine. Raises `NotReady` when it does not answer."""
    try:
        client = docker.DockerClient(base_url=url, version="auto", timeout=60)
        client.ping()
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise NotReady(str(error)) from error
    return client
