"""`run`: a worker process, and `--reload`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from socket import socket
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.cli.command import Command
from tests.processes import Process, until

TASKS = """
from qtasks.asyncio import QueueTasks

app = QueueTasks()


@app.task(name="answer")
async def answer() -> int:
    return {answer}
"""


def test_it_listens_to_the_queues_it_is_told(qtasks: Command) -> None:
    with qtasks.run("--queues", "slow,mail", "--concurrency", "3") as worker:
        worker.wait_for("queues slow, mail, 3 tasks at once, knows add")
        assert qtasks.ok("call", "add", "1", "2", "--queue", "slow", "--wait", "20").line == "3"
        assert qtasks("call", "add", "1", "2", "--wait", "0.2").code == 5
        assert worker.terminate() == 0


def test_included_modules_bring_their_routers(qtasks: Command) -> None:
    include = ("--include", "tests.cli.shop")
    with qtasks.run(*include, app=None) as worker:
        worker.wait_for("knows apart")
        assert qtasks.ok("call", "apart", "4", *include, "--wait", "20", app=None).line == "-4"
        assert worker.terminate() == 0


def test_it_stops_after_the_grace(qtasks: Command) -> None:
    with qtasks.run("--grace", "0.5") as worker:
        worker.wait_for("knows add")
        uuid = qtasks.ok("call", "sleep", "60").line
        wait_for_status(qtasks, uuid, "process")
        assert worker.terminate(timeout=10) == 0
    with qtasks.run("--grace", "0"):
        # It was given back, and not lost.
        assert qtasks.ok("status", uuid, "--json").json["status"] in ("new", "process")


def wait_for_status(qtasks: Command, uuid: str, status: str) -> None:
    for _ in range(100):
        if qtasks.ok("status", uuid, "--json").json["status"] == status:
            return
    raise AssertionError(f"{uuid} never came to {status!r}")


def test_processes_are_started_again_and_make_room(qtasks: Command) -> None:
    with qtasks.run("--processes", "2", "--max-tasks", "2", "--concurrency", "1") as supervisor:
        wait_for_lines(supervisor, "knows add", 2)
        pids = {row["pid"] for row in qtasks.ok("workers", "--json").rows}
        assert len(pids) == 2
        assert supervisor.pid not in pids
        answers = {qtasks.ok("call", "sleep", "0.01", "--wait", "40").line for _ in range(5)}
        assert len(answers) > 2, "each may run two at most"
        assert supervisor.terminate() == 0
    assert qtasks.ok("workers", "--json").rows == []


def test_a_probe_says_that_it_lives_and_is_ready(qtasks: Command) -> None:
    port = free_port()
    with qtasks.run("--health-port", str(port), "--max-memory", "4000") as worker:
        worker.wait_for("knows add")
        for path in ("live", "ready"):
            until(lambda: answers(port, path), f"200 of /{path}")  # noqa: B023
        assert worker.terminate() == 0


def answers(port: int, path: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as said:
            return bool(said.status == 200)
    except URLError:
        return False


def free_port() -> int:
    with socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGTERM, ()), (signal.SIGINT, ("--json",))]
)
def test_reload_runs_what_was_written_last(
    qtasks: Command, tmp_path: Path, number: signal.Signals, options: tuple[str, ...]
) -> None:
    source = tmp_path / "answers.py"
    source.write_text(TASKS.format(answer=1))
    here = Command(qtasks.environment, tmp_path)
    with here.run("--reload", *options, app="answers:app") as worker:
        worker.wait_for("knows answer")
        assert asked(here) == "1"
        source.write_text("this is no Python\n")
        worker.wait_for("answers.py changed; restarting")
        worker.wait_for("SyntaxError")
        worker.wait_for("waiting for a change")
        source.write_text(TASKS.format(answer=23456))
        wait_for_lines(worker, "knows answer", 2)
        assert asked(here) == "23456"
        worker.signal(number)
        assert worker.terminate() == 0
        if options:
            assert all(json.loads(line) for line in worker.output().splitlines())


def asked(qtasks: Command) -> str:
    return qtasks.ok("call", "answer", "--wait", "20", app="answers:app").line


def wait_for_lines(worker: Process, text: str, count: int) -> None:
    until(lambda: worker.output().count(text) >= count, f"{count} times {text!r}")
