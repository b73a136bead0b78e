"""The example on the servers of compose.yaml, as a developer runs them."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.e2e.test_example import SHOP, api, free_port, up
from tests.processes import ROOT, Process, until
from tests.services import SERVICES, Unobtainable, in_containers
from tests.services.install import need_program

PORTS = {"redis": 6379, "postgres": 5432, "rabbitmq": 5672, "kafka": 9092}

pytestmark = pytest.mark.skipif(
    not in_containers(), reason="needs a Docker engine: `make test-containers` runs it"
)


def compose() -> list[str]:
    """Return the command of this machine: docker's own, or the older program, got if need be."""
    docker = shutil.which("docker")
    own = [docker, "compose"] if docker else []
    if own and subprocess.run([*own, "version"], capture_output=True, check=False).returncode == 0:
        return own
    try:
        return [need_program("docker-compose", "docker-compose")]
    except Unobtainable as error:
        pytest.skip(f"no docker compose: {error}")


@pytest.fixture(scope="module")
def composed() -> Iterator[None]:
    """The servers of compose.yaml, all of them healthy."""
    import docker

    taken = [port for port in PORTS.values() if answers(port)]
    if taken:
        pytest.skip(f"compose.yaml publishes ports that are in use: {taken}")
    project = f"qtasks-test-{uuid4().hex[:8]}"
    command = [*compose(), "--project-name", project]
    engine = docker.from_env()
    try:
        subprocess.run([*command, "up", "--detach"], cwd=ROOT, check=True)
        until(lambda: states(engine, project) == healthy(), "healthy servers")
        yield
    finally:
        subprocess.run([*command, "down", "--volumes"], cwd=ROOT, check=True)
        engine.close()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def healthy() -> dict[str, str]:
    return dict.fromkeys(SERVICES, "healthy")


def states(engine: Any, project: str) -> dict[str, str]:
    """Return what its health check says of each server."""
    label = "com.docker.compose"
    found = engine.containers.list(all=True, filters={"label": f"{label}.project={project}"})
    return {
        container.labels[f"{label}.service"]: container.attrs["State"]["Health"]["Status"]
        for container in found
    }


def urls() -> dict[str, str]:
    """Return the URLs that compose.yaml gives in its first lines."""
    lines = (ROOT / "compose.yaml").read_text().splitlines()
    words = [word for line in lines if line.startswith("#") for word in line.split()]
    found = {word.partition(":")[0]: word for word in words if "://" in word}
    return {"redis": found["redis"], "postgres": found["postgresql"],
            "rabbitmq": found["amqp"], "kafka": found["kafka"]}  # fmt: skip


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("pair", ["redis", "postgres", "rabbitmq", "kafka", "kafka+postgres"])
def test_the_example_answers_on_the_servers_of_compose(pair: str) -> None:
    broker, _, storage = pair.partition("+")
    environment = {
        "QTASKS_BROKER_URL": urls()[broker],
        "QTASKS_STORAGE_URL": urls()[storage or broker],
        "QTASKS_NAME": f"e2e-{uuid4().hex[:8]}",
    }
    port = free_port()
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        Process("-m", "shop.qtasks_app", environment=environment, cwd=SHOP) as worker,
        api("shop.api:app", port, environment, SHOP),
    ):
        up(client)
        for _ in range(5):
            assert client.get("/").json() == {"result": 3}
        assert worker.terminate() == 0
