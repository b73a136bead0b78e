"""The command line on a server: what a worker elsewhere does, and a part that cannot do it all."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tests.cli.command import Command
from tests.services import Service


@pytest.fixture
def on_redis(redis_server: Service) -> Command:
    """The command on a namespace of its own."""
    environment = {"QTASKS_BROKER_URL": redis_server.url, "QTASKS_NAME": f"cli-{uuid4().hex[:8]}"}
    return Command(environment)


def test_redis_run_call_and_status(on_redis: Command) -> None:
    with on_redis.run("--concurrency", "5") as worker:
        worker.wait_for("knows add")
        found = on_redis.ok("call", "add", "1", "2", "--wait", "20", "--json").json
        assert found["returning"] == 3
        assert on_redis.ok("status", found["uuid"], "--json").json == found
        assert worker.terminate() == 0


def test_redis_queues_or_the_part_that_cannot(on_redis: Command) -> None:
    told = on_redis.ok("guarantees", "--json").json["broker"]
    on_redis.ok("call", "add", "1", "2")
    said = on_redis("queues", "--json")
    if "depth" in told["unsupported"]:
        assert (said.code, said.out) == (4, "")
        assert said.error == f"qtasks: {told['part']} cannot tell the depth of a queue yet"
    else:
        assert {"queue": "default", "ready": 1, "delayed": 0, "in_flight": 0} in said.rows
