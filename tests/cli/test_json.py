"""`--json`: every command has it, and all that is said is JSON then, errors and logs too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from math import inf, nan
from uuid import UUID

import click
import pytest
from pydantic import BaseModel

from qtasks.cli.main import qtasks as command_line
from qtasks.cli.output import plain
from tests.cli.command import Command

NOBODY = "00000000-0000-4000-8000-000000000000"


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Iterate over the commands that do something, `("dead", "list")` for one."""
    if not isinstance(group, click.Group):
        yield path
        return
    for name, command in group.commands.items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands(command_line))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_it_also_for_its_errors(command: tuple[str, ...]) -> None:
    said = Command({})(*command, "--josn", "--json", app="nowhere:app")
    assert (said.code, said.out, said.told["exit_code"]) == (2, "", 2)
    assert said.told.keys() == {"error", "exit_code"}
    assert "--josn" in said.told["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("nothing",), 2, "No such command 'nothing'."),
        (("call", "nope"), 2, "the app 'qtasks' knows no task 'nope'; it knows add"),
        (("call", "add", "1"), 2, "missing a required argument: 'y'"),
        (("call", "add", "1", "2", "--wait", "0.2"), 5, "not finished within 0.2 s"),
        (("status", NOBODY), 1, f"there is no record of a task {NOBODY}"),
        (("status", "soon"), 2, "'soon' is not a valid UUID"),
        (("purge", "default"), 2, "with --json no question is asked: confirm with --yes"),
        (("dead", "drop", "--all"), 2, "with --json no question is asked: confirm with --yes"),
        (("run", "--include", "nowhere"), 2, "--include nowhere: there is no module 'nowhere'"),
    ],
)
def test_an_error_is_one_document(
    qtasks: Command, arguments: tuple[str, ...], code: int, error: str
) -> None:
    said = qtasks(*arguments, "--json")
    assert (said.code, said.out, said.told["exit_code"]) == (code, "", code)
    assert error in said.told["error"]


def test_a_server_out_of_reach_is_one_document() -> None:
    said = Command({"QTASKS_BROKER_URL": "redis://:hidden@127.0.0.1:1/0"})("queues", "--json")
    assert (said.code, said.out, said.told["exit_code"]) == (3, "", 3)
    assert "hidden" not in said.err


@pytest.mark.parametrize("options", [(), ("--processes", "2")], ids=" ".join)
def test_a_worker_logs_json(qtasks: Command, options: tuple[str, ...]) -> None:
    with qtasks.run("--json", *options) as worker:
        worker.wait_for("knows add")
        assert qtasks("call", "divide", "1", "0", "--wait", "20").code == 1
        worker.wait_for("ZeroDivisionError")
        assert worker.terminate() == 0
        lines = [json.loads(line) for line in worker.output().splitlines()]
    assert all(line.keys() == {"time", "level", "logger", "message", "traceback"} for line in lines)
    (failure,) = (line for line in lines if "ZeroDivisionError" in line["message"])
    assert (failure["level"], failure["logger"]) == ("ERROR", "qtasks")
    assert "has stopped" in lines[-1]["message"]


@dataclass
class Reading:
    level: float
    at: complex = 1j


class Level(BaseModel):
    level: float


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (nan, "nan"),
        ([nan, -inf, 1.5], ["nan", "-inf", 1.5]),
        (Reading(nan), {"level": "nan", "at": "1j"}),
        (Level(level=inf), {"level": "inf"}),
        ({(1, 2): b"\xff", UUID(int=1): {2}}, {"(1, 2)": "/w==", str(UUID(int=1)): [2]}),
        (Decimal("1.50"), "1.50"),
        (timedelta(seconds=90), "PT90S"),
        (2**70, 2**70),
    ],
)
def test_what_json_cannot_say_is_said_as_text(value: object, said: object) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(json.dumps(plain(value)), parse_constant=refuse) == said
