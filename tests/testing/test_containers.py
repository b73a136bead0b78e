"""Servers in containers, where a Docker engine answers and has the image already."""

from __future__ import annotations

import asyncio
import os

import docker
import docker.errors
import pytest

from qtasks.asyncio import QueueTasks
from qtasks.testing import AsyncTester
from qtasks.testing.recipes import RECIPES
from qtasks.testing.servers import Container, Servers


def engine_with(image: str) -> docker.DockerClient:
    """Return the engine that has an image; skip the test where there is none."""
    try:
        engine = docker.from_env()
        engine.images.get(image)
    except docker.errors.ImageNotFound:
        pytest.skip(f"the Docker engine has no image {image}")
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers ({error})")
    return engine


@pytest.mark.parametrize("name", RECIPES)
async def test_a_server_in_a_container(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = os.environ.get(f"QTASKS_IMAGE_{name.upper()}") or RECIPES[name].image
    engine = engine_with(image)
    monkeypatch.delenv(f"QTASKS_TEST_{name.upper()}_URL", raising=False)
    servers = Servers()
    try:
        url = await asyncio.to_thread(servers.url, name)
        (started,) = servers.started
        assert isinstance(started, Container)
        app = QueueTasks("contained", "memory://")

        @app.task()
        async def add(x: int, y: int) -> int:
            return x + y

        with AsyncTester(app, url) as tester:
            await add.add_task(1, 2)
            (done,) = await tester.drain()
            assert done.returning == 3
    finally:
        await asyncio.to_thread(servers.stop)
    with pytest.raises(docker.errors.NotFound):
        engine.containers.get(started.id)
