"""A server in a container, by testcontainers: killed, frozen and started again by the engine."""

from __future__ import annotations

import socket
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from tests.services.images import image
from tests.services.native import free_port
from tests.services.service import NotReady, Unobtainable, Way, in_containers

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

LABEL = "qtasks.run"
"""Marks the containers of a run, so that those of a killed test process can be removed."""


class Contained(Way):
    """The server in a container; a subclass knows its image's variables and its command."""

    how = "container"
    name: str

    port: int  # where clients connect

    def __init__(self, name: str) -> None:
        self.name = name
        self._made: DockerContainer | None = None

    @abstractmethod
    def make(self, image: str) -> DockerContainer:
        """Return the container, with all it needs but the port that is published."""

    @abstractmethod
    def url(self) -> str:
        """Return the server's URL, once `port` is known."""

    @property
    def version(self) -> str:
        """The image, whose tag says the version."""
        return image(self.name)

    @property
    def inside(self) -> int:
        """The port that the server listens on inside; by default the one that is published."""
        return self.port

    def start(self) -> str:
        import docker.errors

        self.port = free_port()
        try:
            self._made = made = self.make(image(self.name))
            # On the loopback only: some of the servers ask for no password.
            made.ports[f"{self.inside}/tcp"] = ("127.0.0.1", self.port)  # type: ignore[assignment]
            made.with_kwargs(labels={LABEL: in_containers()})
            made.start()
        except docker.errors.DockerException as error:
            self.stop()
            raise Unobtainable(f"{image(self.name)}: {error}") from error
        except (TimeoutError, RuntimeError) as error:
            self.stop()
            raise NotReady(str(error)) from error
        except BaseException:
            self.stop()
            raise
        return self.url()

    def listening(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def ended(self) -> str | None:
        container = self._container()
        container.reload()
        if container.status in ("running", "paused"):
            return None
        tail = container.logs(tail=5).decode(errors="replace").strip().replace("\n", " | ")
        return f"ended with {container.attrs['State']['ExitCode']}: {tail or 'it printed nothing'}"

    def kill(self) -> None:
        if self.ended() is None:
            self._container().kill()

    def shut_down(self) -> None:
        self._container().stop(timeout=60)

    def restart(self) -> None:
        self._container().start()

    def freeze(self) -> None:
        self._container().pause()

    def thaw(self) -> None:
        container = self._container()
        container.reload()
        if container.status == "paused":
            container.unpause()

    def detach(self) -> None:
        self.stop()
        raise Unobtainable("containers end with the tests; `docker compose up` keeps them")

    def stop(self) -> None:
        if self._made is None:
            return
        made, self._made = self._made, None
        made.stop()

    def execute(self, *argv: str) -> str:
        """Run a command in the container and return what it prints. Raises `NotReady`."""
        code, output = self._container().exec_run(list(argv))
        text: str = output.decode(errors="replace")
        if code:
            raise NotReady(f"{argv[0]} {argv[1]}: {text}")
        return text

    def _container(self) -> Any:
        if self._made is None:
            raise NotReady(f"the container of {self.name} is not running")
        return self._made.get_wrapped_container()
