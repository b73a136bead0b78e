"""Each server starts, keeps what it promised through a kill, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.services import SERVICES, KafkaServer, PostgresServer, Service
from tests.services.kafka import asking, topics_of_clients
from tests.services_test.clients import CLIENTS, WORD
from tests.services_test.processes import below, gone

# Starts a server, tells what it consists of, and waits to be killed.
STARTER = """
import json, os, sys, time
from tests.services import SERVICES
from tests.services_test.processes import below
service = SERVICES[sys.argv[1]]()
service.start()
service.freeze() if sys.argv[2] == "frozen" else None
print(json.dumps([below(os.getpid()), str(service._way.directory)]), flush=True)
time.sleep(600)
"""


@pytest.fixture(params=list(SERVICES))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def server(name: str, request: pytest.FixtureRequest) -> Service:
    shared: Service = request.getfixturevalue(f"{name}_server")
    return shared


@pytest.mark.parametrize("how", ["kill", "shut_down"])
async def test_what_was_promised_survives_an_end(server: Service, how: str) -> None:
    client = CLIENTS[server.name]
    await client.write(server.url)
    url = server.url
    await asyncio.to_thread(getattr(server, how))
    with socket.socket() as knocking:
        assert knocking.connect_ex(("127.0.0.1", urlsplit(url).port)) == errno.ECONNREFUSED
    with pytest.raises(Exception):  # noqa: B017  each driver has its own word for it
        await asyncio.wait_for(client.read(url), 10)
    await asyncio.to_thread(server.restart)
    assert server.url == url
    assert await asyncio.wait_for(client.read(url), 30) == WORD


async def test_a_frozen_server_says_nothing_and_goes_on_when_thawed(server: Service) -> None:
    client = CLIENTS[server.name]
    await client.write(server.url)
    await asyncio.to_thread(server.freeze)
    try:
        with pytest.raises(Exception):  # noqa: B017
            await asyncio.wait_for(client.read(server.url), 1)
    finally:
        await asyncio.to_thread(server.thaw)
    assert await asyncio.wait_for(client.read(server.url), 30) == WORD


async def test_what_others_have_in_their_server_stays(
    kafka_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await CLIENTS["kafka"].write(kafka_server.url)
    monkeypatch.setenv(kafka_server.variable, kafka_server.url)
    of_others = KafkaServer()
    monkeypatch.delenv("QTASKS_TEST_CONTAINERS", raising=False)
    await asyncio.to_thread(of_others.start)
    await asyncio.to_thread(of_others.clear)
    async with asking(kafka_server.url) as admin:
        assert "words" in await topics_of_clients(admin)


@pytest.mark.native
def test_stop_leaves_no_process_and_no_directory(name: str) -> None:
    already = set(below(os.getpid()))
    service = SERVICES[name]()
    service.start()
    pids = [pid for pid in below(os.getpid()) if pid not in already]
    directory = Path(service._way.directory)  # type: ignore[attr-defined]
    assert len(pids) > 1
    assert directory.is_dir()
    service.stop()
    assert gone(pids, within=0)
    assert not directory.exists()
    service.stop()


@pytest.mark.native
@pytest.mark.parametrize("killed_before", [False, True])
def test_postgres_leaves_no_shared_memory(killed_before: bool) -> None:
    service = PostgresServer()
    service.start()
    directory = service._way.directory  # type: ignore[attr-defined]
    segment = (directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]
    assert segment in segments()
    if killed_before:
        service.kill()
    service.stop()
    assert segment not in segments()


def segments() -> set[str]:
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {line.split()[1] for line in lines}


@pytest.mark.native
@pytest.mark.parametrize("state", ["running", "frozen"])
def test_a_killed_starter_leaves_nothing(name: str, state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, name, state], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout
        pids, directory = json.loads(starter.stdout.readline())
        assert len(pids) > 1
        starter.kill()
    assert gone(pids, within=10)
    assert not Path(directory).exists()


@pytest.mark.native
def test_a_killed_guard_takes_the_server_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, "redis", "running"], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout
        (guard, *servers), directory = json.loads(starter.stdout.readline())
        os.kill(guard, signal.SIGKILL)
        assert gone(servers, within=5)
        starter.kill()
    subprocess.run(["rm", "-r", directory], check=True)  # the one thing a dead guard cannot do


def test_a_forked_child_does_not_end_its_parents_server(redis_server: Service) -> None:
    child = os.fork()
    if child == 0:
        try:
            redis_server.stop()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    asyncio.run(CLIENTS["redis"].write(redis_server.url))
