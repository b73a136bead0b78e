"""The fixtures, in a project of their own that has the plugin in its conftest.py."""

from __future__ import annotations

import socket
import textwrap
from pathlib import Path

import pytest

from qtasks.testing.errors import NotReady, Unobtainable
from qtasks.testing.servers import Servers
from qtasks_core.urls import redact
from tests.processes import Process
from tests.services import Service

NO_DOCKER = {"DOCKER_HOST": "tcp://127.0.0.1:1"}
APP = """
from qtasks.asyncio import QueueTasks

app = QueueTasks("project", "redis://127.0.0.1:1")


@app.task()
async def add(x: int, y: int) -> int:
    return x + y
"""
CONFTEST = """
import pytest
from project import app

pytest_plugins = ["qtasks.testing.pytest"]


@pytest.fixture
def qtasks_app():
    return app
"""
INI = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"


class Project:
    """The folder of a project with tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.write("project.py", APP)
        self.write("conftest.py", CONFTEST)
        self.write("pytest.ini", INI)

    def write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(textwrap.dedent(text))

    def test(self, code: str, **environment: str) -> str:
        """Run a test module and return what pytest printed."""
        self.write("test_it.py", code)
        arguments = ("-m", "pytest", "-ra", "-q", "-p", "no:cacheprovider")
        with Process(*arguments, environment=environment, cwd=self._folder) as run:
            run.wait()
            return run.output()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_each_test_begins_with_nothing(project: Project) -> None:
    printed = project.test(
        """
        import asyncio
        from project import add, app

        async def test_first(qtasks_tester):
            await add.add_task(1, 2)
            assert len(qtasks_tester.enqueued(add, args=[1, 2])) == 1

        async def test_second(qtasks_tester):
            await add.add_task(3, 4)
            [done] = await qtasks_tester.drain()
            assert done.returning == 7

        def test_third(qtasks_sync_tester):
            asyncio.run(enqueue())
            [done] = qtasks_sync_tester.drain()
            assert done.returning == 11
            assert len(qtasks_sync_tester.enqueued()) == 1

        async def enqueue():
            await add.add_task(5, 6)

        def test_the_app_is_its_own_again():
            assert app.addresses()[0] == "redis://127.0.0.1:1"
        """
    )
    assert "4 passed" in printed


def test_a_failed_assertion_shows_what_was_enqueued(project: Project) -> None:
    printed = project.test(
        """
        from project import add

        async def test_it(qtasks_tester):
            await add.add_task(1, 2)
            assert qtasks_tester.enqueued(add, args=[2, 1])
        """
    )
    assert "1 failed" in printed
    assert "[] (enqueued: project.add(1, 2) with queue='default', priority=5, delay=0)" in printed


def test_without_the_app_a_line_says_what_is_missing(project: Project) -> None:
    project.write("conftest.py", 'pytest_plugins = ["qtasks.testing.pytest"]')
    code = """
        async def test_it(qtasks_tester):
            assert await qtasks_tester.drain() == []
        """
    printed = project.test(code)
    assert "1 error" in printed
    assert "Write a fixture `qtasks_app`" in printed
    assert "1 passed" in project.test(code, QTASKS_APP="project:app")


ON = """
    import pytest
    from project import add
    from qtasks import NotSupported

    @pytest.mark.parametrize("qtasks_url", ["{}"], indirect=True)
    async def test_it(qtasks_tester, qtasks_url):
        await add.add_task(1, 2)
        await add.add_task(3, 4, delay=3600)
        [done] = await qtasks_tester.drain()
        assert done.returning == 3
        assert len(qtasks_tester.enqueued(add)) == 2
        if "memory" in qtasks_url:
            qtasks_tester.travel(3600)
            assert (await qtasks_tester.run_one()).returning == 7
        else:
            with pytest.raises(NotSupported, match="needs the memory broker"):
                qtasks_tester.travel(3600)
    """


@pytest.mark.parametrize("name", ["memory", "sqlite"])
def test_without_a_server(project: Project, name: str) -> None:
    assert "1 passed" in project.test(ON.format(name), CI="true")


def test_a_program_that_is_installed(project: Project, redis_server: Service) -> None:
    """The fixture of this project's own tests has installed it, unless its server is elsewhere."""
    if redis_server.how != "native":
        pytest.skip("the tests' own Redis is not run natively here")
    assert "1 passed" in project.test(ON.format("redis"), CI="true", **NO_DOCKER)


def test_a_server_of_the_environment(project: Project, redis_server: Service) -> None:
    printed = project.test(ON.format("redis"), QTASKS_TEST_REDIS_URL=redis_server.url, CI="true")
    assert "1 passed" in printed


def test_a_broker_and_another_storage(
    project: Project, rabbitmq_server: Service, postgres_server: Service
) -> None:
    code = ON.replace('"qtasks_url", ["{}"]', '("qtasks_url", "qtasks_storage_url"), [{}]')
    printed = project.test(
        code.format('("rabbitmq", "postgres")'),
        QTASKS_TEST_RABBITMQ_URL=rabbitmq_server.url,
        QTASKS_TEST_POSTGRES_URL=postgres_server.url,
        CI="true",
    )
    assert "1 passed" in printed


def test_on_kafka(project: Project, kafka_server: Service) -> None:
    printed = project.test(ON.format("kafka"), QTASKS_TEST_KAFKA_URL=kafka_server.url, CI="true")
    assert "1 passed" in printed


def test_no_way_to_a_server_skips_the_test_and_fails_it_in_ci(
    project: Project, tmp_path: Path
) -> None:
    nothing = {**NO_DOCKER, "PATH": str(tmp_path), "KAFKA_HOME": str(tmp_path)}
    printed = project.test(ON.format("kafka"), CI="", **nothing)
    assert "1 skipped" in printed
    for reason in ("QTASKS_TEST_KAFKA_URL is not set", "no Docker engine answers", "native: "):
        assert reason in printed
    printed = project.test(ON.format("kafka"), CI="true", **nothing)
    assert "1 error" in printed
    assert "there is no kafka for tests" in printed


def test_a_name_that_is_none(project: Project) -> None:
    printed = project.test(ON.format("reddis"))
    assert "'reddis' is none of memory, sqlite, redis, postgres, rabbitmq, kafka" in printed


def test_a_server_starts_once_and_is_gone_after_stop(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    if redis_server.how != "native":
        pytest.skip("the tests' own Redis is not run natively here")
    monkeypatch.delenv("QTASKS_TEST_REDIS_URL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", NO_DOCKER["DOCKER_HOST"])
    servers = Servers()
    try:
        url = servers.url("redis")
        assert servers.url("redis") == url
        port = int(url.rpartition(":")[2].partition("/")[0])
        socket.create_connection(("127.0.0.1", port), 5).close()
    finally:
        servers.stop()
        servers.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_a_url_that_does_not_answer_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtasks.testing.servers.START_WITHIN", 0.0)
    url = "redis://:hidden@127.0.0.1:1/0"
    monkeypatch.setenv("QTASKS_TEST_REDIS_URL", url)
    servers = Servers()
    with pytest.raises(NotReady) as raised:
        servers.url("redis")
    assert redact(url) in str(raised.value)
    assert "hidden" not in str(raised.value)


def test_a_refusal_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QTASKS_TEST_KAFKA_URL", raising=False)
    monkeypatch.setenv("DOCKER_HOST", NO_DOCKER["DOCKER_HOST"])
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    servers = Servers()
    with pytest.raises(Unobtainable) as first:
        servers.url("kafka")
    with pytest.raises(Unobtainable) as second:
        servers.url("kafka")
    assert first.value is second.value
