"""The command line on a server: what a worker elsewhere does, and a part that cannot do it all."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tests.cli.command import Command
from tests.services import Service


def on_server(service: Service) -> Command:
    """Return the command on a namespace of its own."""
    return Command({"QTASKS_BROKER_URL": service.url, "QTASKS_NAME": f"cli-{uuid4().hex[:8]}"})


def test_redis_run_call_and_status(redis_server: Service) -> None:
    on_redis = on_server(redis_server)
    with on_redis.run("--concurrency", "5") as worker:
        worker.wait_for("knows add")
        found = on_redis.ok("call", "add", "1", "2", "--wait", "20", "--json").json
        assert found["returning"] == 3
        assert on_redis.ok("status", found["uuid"], "--json").json == found
        assert worker.terminate() == 0


NEEDS = {
    ("queues",): ("broker", "depth"),
    ("purge", "default", "--yes"): ("broker", "purge"),
    ("tasks",): ("storage", "query"),
    ("dead", "list"): ("storage", "query"),
    ("dead", "revive", "--all"): ("storage", "query"),
    ("workers",): ("storage", "values"),
}
"""Commands that a part may not be able to carry out yet, and the method that they need."""


@pytest.mark.parametrize("backend", ["redis", "postgres", "rabbitmq", "kafka"])
def test_what_a_part_cannot_do_yet_is_one_line(
    backend: str, request: pytest.FixtureRequest
) -> None:
    service: Service = request.getfixturevalue(f"{backend}_server")
    qtasks = on_server(service)
    told = qtasks.ok("guarantees", "--json").json
    for arguments, (half, method) in NEEDS.items():
        said = qtasks(*arguments)
        if method in told[half]["unsupported"]:
            assert (said.code, said.out) == (4, ""), arguments
            assert said.error.startswith(f"qtasks: {told[half]['part']} ")
            assert said.error.endswith(
                " yet; `qtasks guarantees` lists what else it cannot do; try another backend: "
                "see docs/guarantees.md"
            )
        else:
            assert said.code == 0, arguments
            # A new app has neither tasks nor workers.
            assert said.err == "" or said.error.startswith("no "), arguments
