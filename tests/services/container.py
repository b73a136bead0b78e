"""A server in a container, by testcontainers: killed, frozen and started again by the engine."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from qtasks.testing.errors import NotReady, Unobtainable
from qtasks.testing.native import free_port
from qtasks.testing.recipes import Recipe
from qtasks.testing.servers import describe
from tests.services.service import Way, in_containers

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

LABEL = "qtasks.run"
"""Marks the containers of a run, so that those of a killed test process can be removed."""


class Contained(Way):
    """The server in a container, with more variables in its environment."""

    how = "container"

    port: int  # where clients connect

    def __init__(self, recipe: Recipe, **environment: str) -> None:
        self.recipe = recipe
        self._environment = environment
        self._made: DockerContainer | None = None

    @property
    def version(self) -> str:
        """The image, whose tag says the version."""
        return self.recipe.chosen_image

    def start(self) -> str:
        import docker.errors
        from testcontainers.core.container import DockerContainer

        self.port = free_port()
        image = self.recipe.chosen_image
        inside = self.port if self.recipe.tells_its_address else self.recipe.port
        try:
            self._made = made = DockerContainer(image)
            describe(made, self.recipe, "127.0.0.1", self.port)
            made.with_envs(**self._environment)
            # On the loopback only: some of the servers ask for no password.
            made.ports[f"{inside}/tcp"] = ("127.0.0.1", self.port)  # type: ignore[assignment]
            made.with_kwargs(labels={LABEL: in_containers()})
            made.start()
        except docker.errors.DockerException as error:
            self.stop()
            raise Unobtainable(f"{image}: {error}") from error
        except BaseException:
            self.stop()
            raise
        return self.recipe.url("127.0.0.1", self.port)

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
            raise NotReady(f"the container of {self.recipe.name} is not running")
        return self._made.get_wrapped_container()
