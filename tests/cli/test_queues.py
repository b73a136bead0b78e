"""`queues`, `purge`, `tasks`, `dead`, `migrate`: looking after what is there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qtasks_core import Running, WorkerInfo
from qtasks_core.lookup import resolve_storage
from tests.cli.command import SHOP, Command, inherited
from tests.processes import ROOT, Process, until

REVIVED_FROM = "revived_from"


def test_queues_are_those_of_the_tasks_or_those_named(qtasks: Command) -> None:
    began = time.monotonic()
    for _ in range(3):
        qtasks.ok("call", "add", "1", "2")
    qtasks.ok("call", "add", "1", "2", "--delay", "600")
    default = {"queue": "default", "ready": 3, "delayed": 1, "in_flight": 0}
    mail = {"queue": "mail", "ready": 0, "delayed": 0, "in_flight": 0, "oldest_age": None}
    one, other = qtasks.ok("queues", "--json").rows
    age = one.pop("oldest_age")
    assert (one, other) == (default, mail)
    knows = qtasks.url.startswith(("redis:", "sqlite:", "postgresql:"))
    assert 0 < age < time.monotonic() - began if knows else age is None
    assert qtasks.ok("queues", "mail", "--json").rows == [mail]
    head, first, second = (line.split() for line in qtasks.ok("queues").out.splitlines())
    assert head == ["QUEUE", "READY", "DELAYED", "IN_FLIGHT", "OLDEST_AGE"]
    assert first[:4] == ["default", "3", "1", "0"]
    assert second == ["mail", "0", "0", "0", "-"]


def test_purge_asks_and_drops(qtasks: Command) -> None:
    for _ in range(3):
        qtasks.ok("call", "add", "1", "2")
    said = qtasks("purge", "default", input="n\n")
    assert said.code == 1
    assert "Aborted" in said.err
    assert qtasks("purge", "default").code == 1, "nobody was there to say yes"
    assert qtasks.ok("queues", "default", "--json").rows[0]["ready"] == 3
    assert qtasks.ok("purge", "default", "--yes", "--json").json == {
        "queue": "default",
        "dropped": 3,
    }
    assert qtasks.ok("purge", "default", "--yes").line == "dropped 0 messages"
    assert qtasks.ok("queues", "default", "--json").rows[0]["ready"] == 0


def test_tasks_are_chosen_and_listed_newest_first(qtasks: Command) -> None:
    uuids = [qtasks.ok("call", "add", str(x), "0").line for x in range(3)]
    late = qtasks.ok("call", "divide", "1", "2", "--delay", "600").line
    mail = qtasks.ok("call", "fail_while", '"x"').line

    def listed(*options: str) -> list[str]:
        return [row["uuid"] for row in qtasks.ok("tasks", "--json", *options).rows]

    assert listed() == [mail, late, *reversed(uuids)]
    assert listed("--status", "new") == [mail, *reversed(uuids)]
    assert listed("--status", "new", "--status", "scheduled") == [mail, late, *reversed(uuids)]
    assert listed("--queue", "mail") == [mail]
    assert listed("--name", "divide") == [late]
    assert listed("--limit", "2") == [mail, late]
    assert listed("--dead") == []
    assert listed("--before", "2001-01-01") == []
    assert listed("--after", "2001-01-01T00:00+00:00", "--limit", "1") == [mail]
    head, first, *_ = qtasks.ok("tasks").out.splitlines()
    assert " ".join(head.split()) == "UUID TASK_NAME STATUS QUEUE ATTEMPT CREATED_AT ERROR"
    assert first.split()[:5] == [mail, "fail_while", "new", "mail", "1"]


@pytest.mark.usefixtures("worker")
def test_a_revived_task_names_the_dead_one_and_runs_once(qtasks: Command, tmp_path: Path) -> None:
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    said = qtasks("call", "fail_while", f'"{obstacle}"', "--wait", "20")
    assert said.code == 1
    dead = said.error.split()[3]
    (row,) = qtasks.ok("dead", "list", "--json").rows
    assert (row["uuid"], row["task_name"], row["queue"]) == (dead, "fail_while", "mail")
    assert row["dead"]
    assert dead in qtasks.ok("dead", "list").out
    os.unlink(obstacle)

    revived = qtasks.ok("dead", "revive", dead, "--json").json
    assert revived["uuid"] == dead
    assert revived["revived_as"] != dead
    assert revived["revived_before"] is False
    again = f"{dead} -> {revived['revived_as']} (revived before)"
    assert qtasks.ok("dead", "revive", dead).line == again
    assert qtasks.ok("dead", "revive", dead, "--json").json["revived_before"] is True
    found = ended(qtasks, revived["revived_as"])
    assert (found["status"], found["returning"]) == ("success", "done")
    assert found["headers"] == {REVIVED_FROM: dead}
    assert qtasks.ok("status", dead, "--json").json["status"] == "error"

    said = qtasks("dead", "revive", found["uuid"])
    assert (said.code, said.out) == (1, "")
    assert said.error == f"qtasks: task {found['uuid']} is not dead: its status is 'success'"


@pytest.mark.usefixtures("worker")
def test_all_dead_tasks_at_once(qtasks: Command) -> None:
    dead = {qtasks("call", "divide", "1", "0", "--wait", "20").error.split()[3] for _ in range(3)}
    rows = qtasks.ok("dead", "revive", "--all", "--name", "divide", "--json").rows
    assert {row["uuid"] for row in rows} == dead
    again = {ended(qtasks, row["revived_as"])["uuid"] for row in rows}
    listed = {row["uuid"] for row in qtasks.ok("dead", "list", "--json").rows}
    assert listed == dead | again
    assert qtasks("dead", "drop", "--all").code == 1, "nobody was there to say yes"
    one = min(dead)
    assert qtasks.ok("dead", "drop", one).line == one
    rows = qtasks.ok("dead", "drop", "--all", "--yes", "--json").rows
    assert {row["uuid"] for row in rows} == (dead | again) - {one}
    assert all((row["dropped"], row["error"]) == (True, None) for row in rows)
    assert qtasks.ok("dead", "list", "--json").rows == []
    assert qtasks("status", one).code == 1


@pytest.mark.parametrize("command", ["revive", "drop"])
def test_which_dead_tasks_has_to_be_said(qtasks: Command, command: str) -> None:
    uuid = qtasks.ok("call", "add", "1", "2").line
    wrong: list[list[str]] = [[], [uuid, "--all"], ["--name", "add"], [uuid, "--name", "add"]]
    for arguments in wrong:
        said = qtasks("dead", command, *arguments)
        assert said.code == 2
        assert "give the uuids of tasks, or --all with any of --name, --queue" in said.err
    reason = f"task {uuid} is not dead: its status is 'new'"
    said = qtasks("dead", command, uuid)
    assert (said.code, said.error) == (1, f"qtasks: {reason}")
    (row,) = qtasks("dead", command, uuid, "--json").rows
    nothing: dict[str, Any] = {"dropped": False}
    if command == "revive":
        nothing = {"revived_as": None, "revived_before": False}
    assert row == {"uuid": uuid, **nothing, "error": reason}


async def test_workers_are_those_that_told_of_themselves(qtasks: Command) -> None:
    assert qtasks.ok("workers", "--json").rows == []
    now = time.time() + 300  # it must still count as alive when a busy machine has looked
    worker = WorkerInfo(
        id="w1", host="here", pid=7, queues=("mail", "slow"), concurrency=3,
        running=(Running("u1", "add", 1e9),), started_at=1e9, seen_at=now, version="1.0",
    )  # fmt: skip
    storage = resolve_storage(qtasks.url)
    await storage.start(qtasks.name)
    await storage.set("worker/w1", msgspec.msgpack.encode(worker))
    await storage.stop()
    (row,) = qtasks.ok("workers", "--json").rows
    assert (row["id"], row["host"], row["queues"], row["seen_at"]) == (
        "w1", "here", ["mail", "slow"], now,
    )  # fmt: skip
    assert row["running"] == [{"uuid": "u1", "task_name": "add", "started_at": 1e9}]
    shown = qtasks.ok("workers").out.splitlines()[1]
    assert shown.startswith("w1  here  7    mail, slow")
    assert shown.endswith("  add")
    assert [row["queue"] for row in qtasks.ok("queues", "--json").rows] == [
        "default", "mail", "slow",
    ]  # fmt: skip


@pytest.mark.parametrize("qtasks", ["sqlite"], indirect=True)
def test_migrate_says_what_it_did(qtasks: Command) -> None:
    first = qtasks.ok("migrate", "--json").json
    if qtasks.url.startswith("sqlite:"):
        file = qtasks.url.removeprefix("sqlite:///")
        assert first == {
            "SqliteBroker": [f"{file} created, now has schema 3", "app 'qtasks' added"],
            "SqliteStorage": [],
        }
        other = Command({**qtasks.environment, "QTASKS_NAME": "other"})
        assert "SqliteBroker   app 'other' added\n" in other.ok("migrate").out
    broker, storage = first
    width = len(storage)
    assert qtasks.ok("migrate").out == (
        f"{broker.ljust(width)}  up to date\n{storage}  up to date\n"
    )
    assert qtasks.ok("migrate", "--json").json == {broker: [], storage: []}


def test_what_is_purged_is_cancelled(qtasks: Command) -> None:
    """Or somebody would wait for it until the end of days."""
    now, later = (qtasks.ok("call", "add", "1", "2", "--delay", delay).line for delay in "09")
    elsewhere = qtasks.ok("call", "add", "1", "2", "--queue", "slow").line
    assert qtasks.ok("purge", "default", "--yes").line == "dropped 2 messages"
    for uuid, status in ((now, "cancel"), (later, "cancel"), (elsewhere, "new")):
        assert qtasks.ok("status", uuid, "--json").json["status"] == status


def test_who_waits_for_what_is_purged_hears_of_it(qtasks: Command) -> None:
    arguments = ("-m", "qtasks", "-A", SHOP, "call", "add", "1", "2", "--wait", "600")
    with Process(*arguments, environment=qtasks.environment) as waiting:
        until(lambda: bool(qtasks.ok("tasks", "--json").rows), "a task")
        assert qtasks.ok("purge", "default", "--yes").line == "dropped 1 messages"
        assert waiting.wait() == 1
        assert waiting.output().strip().endswith("ended in 'cancel'")


def ended(qtasks: Command, uuid: str) -> dict[str, Any]:
    """Wait for a task's end and return what is known of it."""
    for _ in range(100):
        found: dict[str, Any] = qtasks.ok("status", uuid, "--json").json
        if found["finished_at"] is not None:
            return found
    raise AssertionError(f"{uuid} never ended")


@pytest.mark.usefixtures("worker")
def test_many_tasks_have_a_progress_bar_on_the_terminal(qtasks: Command) -> None:
    dead = {qtasks("call", "divide", "1", "0", "--wait", "20").error.split()[3] for _ in range(2)}
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qtasks", "-A", SHOP, "dead", "revive", "--all"],
            cwd=ROOT,
            env={**inherited(), **qtasks.environment},
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=60,
            check=True,
        )
        assert {line.split()[0] for line in done.stdout.decode().splitlines()} == dead
        told = os.read(ours, 10_000).decode()
        assert "choosing" in told
        assert "reviving" in told
    finally:
        os.close(ours)
        os.close(theirs)
