"""`check`: what it says of real servers, and its exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from redis import Redis

from qtasks.asyncio import QueueTasks
from qtasks.bridge.crossing import io_thread
from qtasks.cli.check import look
from qtasks.testing.native import free_port
from qtasks_core.urls import redact
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.cli.command import Command
from tests.pairs import url_of
from tests.services import Service

PAYMENTS = """
from qtasks import Requires
from qtasks.asyncio import QueueTasks

app = QueueTasks()


@app.task(name="charge", requires=Requires(survives="machine crash"))
async def charge() -> None: ...
"""


def command(broker: str, storage: str | None = None, cwd: Path | None = None) -> Command:
    """Return the command for an app of its own; with `cwd`, the module `payments` is there."""
    environment = {"QTASKS_BROKER_URL": broker, "QTASKS_NAME": f"cli-{uuid4().hex[:8]}"}
    if storage is not None:
        environment["QTASKS_STORAGE_URL"] = storage
    if cwd is None:
        return Command(environment)
    (cwd / "payments.py").write_text(PAYMENTS)
    return Command(environment, cwd)


@contextmanager
def redis_with(service: Service, **settings: str) -> Iterator[Redis]:
    """Change settings of the server while the block runs."""
    with Redis.from_url(service.url) as server:
        before = {name: server.config_get(name)[name] for name in settings}
        try:
            for name, value in settings.items():
                server.config_set(name, value)
            yield server
        finally:
            for name, value in before.items():
                server.config_set(name, value)


@pytest.mark.parametrize("backend", ["sqlite", "redis", "postgres"])
def test_all_is_well(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    qtasks = command(url_of(request, backend, tmp_path))
    found = qtasks.ok("check", "--json").json
    assert (found["exit_code"], found["problems"], found["advice"]) == (0, [], [])
    assert found["workers"] == 0
    assert [queue["queue"] for queue in found["queues"]] == ["default", "mail"]
    told = qtasks.ok("guarantees", "--json").json
    for half in ("broker", "storage"):
        row = found[half]
        for name in ("part", "server", "survives", "durability"):
            assert row[name] == told[half][name]
        assert (row["error"], row["address"]) == (None, redact(qtasks.url))
        assert row["round_trip_ms"] > 0
        # The server runs on this machine.
        assert (row["clock_ahead"] is None) == (backend == "sqlite")
        assert abs(row["clock_ahead"] or 0) < 60
    lines = qtasks.ok("check").out.splitlines()
    assert lines[-1] == "all is well"
    assert f"server      {told['storage']['server']}" in lines
    assert f"because     {told['storage']['durability']}" in lines
    assert sum(line.startswith("round trip  ") for line in lines) == 2


def test_a_setting_that_would_give_more_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/qtasks.db"
    row = command(url).ok("check", "--json").json["storage"]
    assert (row["at_best"], row["best_settings"]) == ("machine crash", "?synchronous=full")
    assert "better      machine crash, with ?synchronous=full" in command(url).ok("check").out
    full = command(f"{url}?synchronous=full").ok("check")
    assert "better" not in full.out


def test_what_redis_does_not_survive(redis_server: Service, tmp_path: Path) -> None:
    qtasks = command(redis_server.url, cwd=tmp_path)
    with redis_with(redis_server, appendonly="no"):
        said = qtasks("check", app="payments:app")
        found = qtasks("check", "--json", app="payments:app").json
    assert (said.code, said.err) == (2, "")
    for part in ("RedisBroker", "RedisStorage"):
        problem = (
            f"charge requires survives='machine crash', but {part} has survives='client crash' "
            "(appendonly no: at most snapshots); set appendonly yes, appendfsync always, "
        )
        assert f"\nproblem: {problem}" in said.out
        assert any(each.startswith(problem) for each in found["problems"])
    assert found["exit_code"] == 2
    assert "all is well" not in said.out
    with redis_with(redis_server, appendonly="yes", appendfsync="always"):
        assert qtasks.ok("check", app="payments:app").out.endswith("all is well\n")


def test_advice_does_not_change_the_exit_code(redis_server: Service) -> None:
    qtasks = command(redis_server.url)
    with redis_with(redis_server, maxmemory="900mb", **{"maxmemory-policy": "allkeys-lru"}):
        out = qtasks.ok("check").out
        found = qtasks.ok("check", "--json").json
    assert out.count("\nadvice: maxmemory-policy allkeys-lru can drop messages and records") == 1
    assert "all is well" not in out
    assert (found["exit_code"], found["problems"], len(found["advice"])) == (0, [], 1)


def test_rights_that_are_missing(redis_server: Service) -> None:
    port = urlsplit(redis_server.url).port
    user = f"user-{uuid4().hex[:8]}"
    with Redis.from_url(redis_server.url) as server:
        try:
            rights = ["reset", "on", ">hidden", "~*", "&*", "+@all"]
            qtasks = command(f"redis://{user}:hidden@127.0.0.1:{port}")
            server.execute_command("ACL", "SETUSER", user, *rights, "-info")
            told = qtasks.ok("check").out
            server.execute_command("ACL", "SETUSER", user, *rights, "-blpop")
            refused = qtasks("check")
        finally:
            server.acl_deluser(user)
    assert "\nadvice: the durability is not known completely: give the user the right +info" in told
    assert refused.code == 2
    (problem,) = [line for line in refused.out.splitlines() if line.startswith("problem: ")]
    assert "the user lacks rights that docs/rights.md lists: BLPOP on keys" in problem
    for said in (told, refused.out, refused.err):
        assert "hidden" not in said


@pytest.mark.parametrize("away", ["redis", "postgresql", "amqp", "kafka"])
def test_a_server_that_is_away(away: str, tmp_path: Path) -> None:
    sqlite = f"sqlite:///{tmp_path}/qtasks.db"
    qtasks = command(f"{away}://me:hidden@127.0.0.1:{free_port()}/0", sqlite, tmp_path)
    said = qtasks("check", app="payments:app")
    assert (said.code, said.err) == (3, "")
    problems = [line for line in said.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2
    assert f"{away}://me:***@127.0.0.1" in problems[0]
    assert problems[1] == "problem: not compared with the servers: requires= of charge"
    # The other half is looked at all the same.
    assert "storage     SqliteStorage\n" in said.out
    assert said.out.count("round trip  ") == 1
    document = qtasks("check", "--json", app="payments:app")
    assert (document.code, document.err) == (3, "")
    found = document.json
    assert found["exit_code"] == 3
    assert found["broker"]["error"] in found["problems"]
    assert (found["broker"]["survives"], found["storage"]["error"]) == (None, None)
    assert (found["workers"], found["queues"]) == (0, [])
    for text in (said.out, document.out):
        assert "hidden" not in text


def test_a_queue_with_tasks_and_no_worker(tmp_path: Path) -> None:
    qtasks = command(f"sqlite:///{tmp_path}/qtasks.db")
    qtasks.ok("call", "add", "1", "2")
    qtasks.ok("call", "fail_while", "x", "--delay", "600")
    said = qtasks.ok("check").out
    left_alone = "advice: the queue 'default' has 1 task, and no worker receives from it\n"
    assert left_alone in said
    assert "advice: the queue 'mail' has 1 task, and no worker receives from it\n" in said
    assert "workers  none\n" in said
    with qtasks.run("--queues", "default,night") as worker:
        worker.wait_for("knows add")
        found = qtasks.ok("check", "--json").json
        assert worker.terminate() == 0
    assert found["workers"] == 1
    assert [queue["queue"] for queue in found["queues"]] == ["default", "mail", "night"]
    assert found["advice"] == ["the queue 'mail' has 1 task, and no worker receives from it"]


def test_rabbitmq(rabbitmq_server: Service) -> None:
    found = command(rabbitmq_server.url).ok("check", "--json").json
    assert found["problems"] == []
    version = found["broker"]["server"].removeprefix("RabbitMQ ").split(".")
    told = sum("consumer_timeout" in line for line in found["advice"])
    assert told == (tuple(map(int, version[:2])) < (4, 3))
    assert found["broker"]["round_trip_ms"] > 0


def test_kafka(kafka_server: Service) -> None:
    qtasks = command(kafka_server.url)
    qtasks.ok("call", "add", "1", "2")
    found = qtasks.ok("check", "--json").json
    # The tests' server is one machine.
    assert found["advice"] == [
        f"{qtasks.name}.queue.default: replication factor 1: a lost machine takes it along; "
        "3 is usual",
        f"{qtasks.name}.records: replication factor 1: a lost machine takes it along; 3 is usual",
        "the queue 'default' has 1 task, and no worker receives from it",
    ]
    assert found["storage"]["round_trip_ms"] > 0


async def test_clocks_that_differ() -> None:
    name, thread = uuid4().hex, io_thread()
    app = QueueTasks("skewed", MemoryBroker(name), MemoryStorage(name))
    assert (await thread.ask(partial(look, app))).advice() == []
    server = MemoryBroker(name)

    async def travel() -> None:
        await server.start("skewed")
        server.travel(3600)

    await thread.run(travel)
    try:
        found = await thread.ask(partial(look, app))
    finally:
        await thread.run(server.stop)
    assert found.broker.ahead == pytest.approx(3600, abs=100)
    (advice,) = found.advice()
    assert advice.startswith("this machine's clock is 3")
    assert "s behind the server's: the times in records and the list of workers are by " in advice
