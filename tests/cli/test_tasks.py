"""`call`, `status`, `tasks`: enqueueing from a shell and looking at what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from math import nan
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest

from qtasks.cli.arguments import read_arguments
from qtasks.cli.output import fitted, text
from qtasks.execution.definition import TaskDefinition, TaskOptions
from tests.cli.command import SHOP, Command, inherited
from tests.processes import ROOT, Process, until


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
    for wait in ("0.2", "5", "60"):
        said = qtasks("call", "add", "1", "2", "--wait", wait)
        if said.code != 3:  # a busy server has not confirmed the task in that time
            break
    assert said.code == 5
    assert f"not finished within {wait} s; no worker has begun it" in said.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "the app '{name}' knows no task 'nope'; it knows add, divide, fail_while and "),
        (("nap", "1"), "knows no task 'nap'; it knows tests.cli.shop.nap"),
        (("divde", "1"), "the app '{name}' knows no task 'divde'; it knows divide"),
        (("add", "1"), "add(x: 'int', y: 'int') -> 'int': missing a required argument: 'y'"),
        (("add", "1", "2", "z=3"), "got an unexpected keyword argument 'z'"),
        (("add", "1", '"two"'), "add: argument 'y': Expected `int`, got `str`"),
        (("add", "1", "two"), "add: argument 'y': two is not JSON; write text in quotes"),
        (("divide", "x=1", "y=2", "x=3"), "divide: argument 'x' is given twice"),
        (("tomorrow", '"soon"'), "tomorrow: argument 'day': Invalid RFC3339 encoded date"),
    ],
)
def test_a_wrong_call_is_one_line(
    qtasks: Command, arguments: tuple[str, ...], message: str
) -> None:
    said = qtasks("call", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.error.startswith("qtasks: ")
    assert message.replace("{name}", qtasks.name) in said.error


def test_without_an_app_no_task_is_known_but_what_is_included(qtasks: Command) -> None:
    said = qtasks("call", "apart", "1", app=None)
    assert said.code == 2
    assert "no task 'apart': the app has no tasks; name your app with -A module:app" in said.error
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
    cancelled = {"uuid": queued, "cancelled": True, "error": None}
    assert qtasks.ok("cancel", queued, "--json").json == cancelled


@pytest.mark.usefixtures("worker")
def test_what_has_ended_or_never_was_cannot_be_cancelled(qtasks: Command) -> None:
    done = qtasks.ok("call", "add", "1", "2", "--wait", "20", "--json").json["uuid"]
    said = qtasks("cancel", done)
    assert (said.code, said.out) == (1, "")
    assert said.error == f"qtasks: task {done} cannot be cancelled: it has already finished"
    nobody = str(uuid4())
    none = f"there is no record of a task {nobody}"
    said = qtasks("cancel", nobody)
    assert (said.code, said.error) == (1, f"qtasks: {none}")
    assert qtasks("cancel").code == 2

    late = qtasks.ok("call", "add", "1", "2", "--delay", "600").line
    said = qtasks("cancel", done, nobody, late, "--json")
    ended = f"task {done} cannot be cancelled: it has already finished"
    assert said.rows == [
        {"uuid": done, "cancelled": False, "error": ended},
        {"uuid": nobody, "cancelled": False, "error": none},
        {"uuid": late, "cancelled": True, "error": None},
    ]
    assert (said.code, said.told) == (1, {"error": f"{ended} (and 1 more)", "exit_code": 1})


def test_a_negative_number_is_no_option(qtasks: Command) -> None:
    uuid = qtasks.ok("call", "divide", "-1", "y=-2", "--delay", "600").line
    assert qtasks.ok("status", uuid, "--json").json["args"] == [-1, -2]
    said = qtasks("call", "divide", "-1", "2", "--wiat=3")
    assert said.code == 2
    assert "No such option '--wiat'. Did you mean '--wait'?" in said.err


def test_a_time_beyond_the_calendar_ends_no_listing() -> None:
    """Another program may have written anything."""
    assert text("created_at", 1e300) == "1e+300"
    assert text("created_at", nan) == '"nan"'


def test_who_stops_listening_ends_a_listing_quietly(qtasks: Command) -> None:
    for x in range(3):
        qtasks.ok("call", "untyped", str(x), f'"{"x" * 70_000}"')
    with subprocess.Popen(
        [sys.executable, "-m", "qtasks", "tasks", "--json"],
        cwd=ROOT, env={**inherited(), **qtasks.environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as listing:  # fmt: skip
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.read(10)
        listing.stdout.close()
        assert listing.stderr.read() == b""


def test_ctrl_c_ends_a_wait(qtasks: Command) -> None:
    arguments = ("-m", "qtasks", "-A", SHOP, "call", "add", "1", "2", "--wait", "600")
    with Process(*arguments, environment=qtasks.environment) as waiting:
        until(lambda: bool(qtasks.ok("tasks", "--json").rows), "a task")
        waiting.signal(signal.SIGINT)
        assert waiting.wait() == 130
        uuid = qtasks.ok("tasks", "--json").json["uuid"]
        assert waiting.output().strip() == (
            f"qtasks: no longer waiting for task add {uuid}, which is not cancelled: "
            f"see `qtasks status {uuid}`"
        )


def test_ctrl_c_names_the_task_in_json_too(qtasks: Command) -> None:
    arguments = ("-m", "qtasks", "-A", SHOP, "call", "add", "1", "2", "--wait", "600", "--json")
    with Process(*arguments, environment=qtasks.environment) as waiting:
        until(lambda: bool(qtasks.ok("tasks", "--json").rows), "a task")
        waiting.signal(signal.SIGINT)
        assert waiting.wait() == 130
        told = json.loads(waiting.output())
    assert (told["uuid"], told["exit_code"]) == (qtasks.ok("tasks", "--json").json["uuid"], 130)


@pytest.mark.parametrize("command", [("tasks",), ("dead", "list"), ("workers",)])
def test_where_nothing_is_found_it_says_where_it_looked(
    qtasks: Command, command: tuple[str, ...]
) -> None:
    said = qtasks(*command)
    assert said.code == 0
    assert said.out.startswith(("UUID", "ID"))
    where = f"of the app '{qtasks.name}' found in its storage, "
    assert where in said.error
    assert said.error.partition(where)[2].startswith(qtasks.url.partition("://")[0])
    assert qtasks.ok(*command, "--json").out == ""


def bare(day: date, name: str, at: datetime | None, uuid: UUID, size: Literal["s", "m"]) -> None:
    pass


def many(number: int, *names: str, **days: date) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "texts", "args", "kwargs"),
    [
        (
            bare,
            ["2026-11-29", "Ann", "2026-11-29T12:00:00Z", f"uuid={UUID(int=7)}", "size=m"],
            [date(2026, 11, 29), "Ann", datetime(2026, 11, 29, 12, tzinfo=UTC), UUID(int=7), "m"],
            {},
        ),
        (
            bare,
            ['"2026-11-29"', '"Ann"', "null", f'"{UUID(int=7)}"', '"s"'],
            [date(2026, 11, 29), "Ann", None, UUID(int=7), "s"],
            {},
        ),
        # What would be another value of JSON is text where nothing but text fits.
        (
            many,
            ["1", "2", "true", "1e3", "[1]", "null"],
            [1, "2", "true", "1e3", "[1]", "null"],
            {},
        ),
        (many, ["1", "day=2026-11-29"], [1], {"day": date(2026, 11, 29)}),
    ],
)
def test_texts_and_dates_need_no_quotes(
    function: Callable[..., None], texts: list[str], args: list[Any], kwargs: dict[str, Any]
) -> None:
    definition = TaskDefinition(function, "t", TaskOptions())
    assert read_arguments(definition, texts) == (args, kwargs)


def test_a_table_fits_the_terminal() -> None:
    """Long cells are cut, the widest first; never the uuid, which the next command needs."""
    columns = ("uuid", "task_name", "error")
    assert fitted([36, 20, 100], columns, 200) == [36, 20, 100]
    assert fitted([36, 20, 100], columns, 80) == [36, 20, 20]
    assert fitted([36, 20, 100], columns, 60) == [36, 10, 10]
    assert fitted([36, 20, 100], columns, 10) == [36, 5, 5]


@pytest.mark.parametrize("width", [80, 160])
def test_listing_on_a_terminal_and_into_a_pipe(qtasks: Command, width: int) -> None:
    name = "with_a_name_that_is_much_longer_than_one_likes_to_read"
    uuid = qtasks.ok("call", name).line
    ours, theirs = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "qtasks", "tasks"],
            cwd=ROOT,
            env={**inherited(), **qtasks.environment, "COLUMNS": str(width)},
            stdout=theirs,
            timeout=60,
            check=True,
        )
        lines = os.read(ours, 10_000).decode().splitlines()
    finally:
        os.close(ours)
        os.close(theirs)
    assert lines[1].startswith(uuid)
    assert all(len(line) <= width for line in lines)
    assert (name in lines[1]) == (width == 160)
    assert name in qtasks.ok("tasks").out
