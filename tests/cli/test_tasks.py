"""`call`, `status`, `tasks`: enqueueing from a shell and looking at what became of it."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from tests.cli.command import Command


def test_a_call_prints_the_uuid_and_status_knows_it(qtasks: Command) -> None:
    uuid = qtasks.ok("call", "add", "1", "y=2").line
    assert UUID(uuid)
    found = qtasks.ok("status", uuid, "--json").json
    assert found["uuid"] == uuid
    assert (found["status"], found["task_name"], found["attempt"]) == ("new", "add", 1)
    assert (found["args"], found["kwargs"], found["returning"]) == ([1, 2], {}, None)
    shown = qtasks.ok("status", uuid).out
    assert f"uuid        {uuid}\n" in shown
    assert "traceback" not in shown


@pytest.mark.usefixtures("worker")
def test_waiting_prints_the_result(qtasks: Command) -> None:
    assert qtasks.ok("call", "add", "1", "2", "--wait", "20").line == "3"
    found = qtasks.ok("call", "add", "20", "22", "--wait", "20", "--json").json
    assert (found["status"], found["returning"]) == ("success", 42)
    assert found["created_at"] <= found["started_at"] <= found["finished_at"]


@pytest.mark.usefixtures("worker")
def test_arguments_are_read_into_the_annotated_types(qtasks: Command) -> None:
    assert qtasks.ok("call", "tomorrow", '"2030-01-31"', "--wait", "20").line == '"2030-02-01"'
    said = qtasks.ok("call", "untyped", '{"a": [1]}', "2", "k=null", "--wait", "20").json
    assert said == {
        "value": {"a": [1]},
        "more": [2],
        "named": {"k": None},
        "bytes": "/w==",
        "set": [1],
    }


@pytest.mark.usefixtures("worker")
def test_a_failed_task_is_one_line_and_status_has_the_traceback(qtasks: Command) -> None:
    said = qtasks("call", "divide", "1", "0", "--wait", "20")
    assert (said.code, said.out) == (1, "")
    assert "divide" in said.error
    assert said.error.endswith("ended in 'error': ZeroDivisionError: division by zero")
    uuid = said.error.split()[3]
    found = qtasks.ok("status", uuid, "--json").json
    assert "return x / y" in found["traceback"]
    assert "return x / y" in qtasks.ok("status", uuid).out


def test_options_of_a_call(qtasks: Command) -> None:
    uuid = qtasks.ok(
        "call", "add", "1", "2", "--queue", "slow", "--priority", "9", "--delay", "600"
    ).line
    found = qtasks.ok("status", uuid, "--json").json
    assert (found["queue"], found["priority"], found["status"]) == ("slow", 9, "scheduled")
    assert found["due_at"] == pytest.approx(found["created_at"] + 600)


@pytest.mark.usefixtures("worker")
def test_calls_with_one_key_are_one_task(qtasks: Command) -> None:
    uuid = qtasks.ok("call", "add", "1", "2", "--key", "order 7").line
    assert qtasks.ok("call", "add", "3", "4", "--key", "order 7", "--wait", "20").line == "3"
    assert qtasks.ok("call", "add", "5", "6", "--key", "order 7").line == uuid
    assert qtasks.ok("call", "add", "5", "6", "--key", "order 8").line != uuid


def test_nobody_works_and_the_wait_is_over(qtasks: Command) -> None:
    said = qtasks("call", "add", "1", "2", "--wait", "0.2")
    assert said.code == 5
    assert "no end within 0.2 s; no worker has begun it" in said.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "the app 'qtasks' knows no task 'nope'; it knows add, divide, fail_while and "),
        (("nap", "1"), "knows no task 'nap'; it knows tests.cli.shop.nap"),
        (("divde", "1"), "the app 'qtasks' knows no task 'divde'; it knows divide"),
        (("add", "1"), "add(x: 'int', y: 'int') -> 'int': missing a required argument: 'y'"),
        (("add", "1", "2", "z=3"), "got an unexpected keyword argument 'z'"),
        (("add", "1", '"two"'), "add: argument 'y': Expected `int`, got `str`"),
        (("add", "1", "two"), "add: argument 'y': two is not JSON; a text is written in quotes"),
        (("tomorrow", '"soon"'), "tomorrow: argument 'day': Invalid RFC3339 encoded date"),
    ],
)
def test_a_wrong_call_is_one_line(
    qtasks: Command, arguments: tuple[str, ...], message: str
) -> None:
    said = qtasks("call", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.error.startswith("qtasks: ")
    assert message in said.error


def test_without_an_app_no_task_is_known_but_what_is_included(qtasks: Command) -> None:
    said = qtasks("call", "apart", "1", app=None)
    assert said.code == 2
    assert said.error.endswith("'apart': say where tasks are by -A module:app or --include")
    assert qtasks.ok("call", "apart", "1", "--include", "tests.cli.shop", app=None).line


def test_a_uuid_that_nobody_knows(qtasks: Command) -> None:
    uuid = str(uuid4())
    said = qtasks("status", uuid)
    assert (said.code, said.error) == (1, f"qtasks: there is no record of a task {uuid}")
    said = qtasks("status", "soon")
    assert said.code == 2
    assert "'soon' is not a valid UUID" in said.err


@pytest.mark.usefixtures("worker")
def test_a_cancelled_task_is_cancelled_for_whoever_waits(qtasks: Command) -> None:
    queued = qtasks.ok("call", "add", "1", "2", "--delay", "600").line
    running = qtasks.ok("call", "sleep", "600").line
    assert qtasks.ok("cancel", queued, running).out == f"{queued} cancelled\n{running} cancelled\n"
    for uuid in (queued, running):
        assert qtasks.ok("status", uuid, "--json").json["status"] == "cancel"
    assert qtasks.ok("cancel", queued, "--json").json == {"uuid": queued, "cancelled": True}


@pytest.mark.usefixtures("worker")
def test_what_has_ended_or_never_was_cannot_be_cancelled(qtasks: Command) -> None:
    done = qtasks.ok("call", "add", "1", "2", "--wait", "20", "--json").json["uuid"]
    said = qtasks("cancel", done)
    assert (said.code, said.out) == (1, "")
    assert said.error == f"qtasks: task {done} had ended before it was cancelled"
    nobody = str(uuid4())
    said = qtasks("cancel", nobody)
    assert (said.code, said.error) == (1, f"qtasks: there is no record of a task {nobody}")
    assert qtasks("cancel").code == 2
