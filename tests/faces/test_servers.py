"""Servers of several processes: spawned (uvicorn) and forked from one that imported (gunicorn)."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_example import free_port, up
from tests.faces.descriptors import needs_proc
from tests.processes import Process, until

PROCESSES = 4
APIS = ("tests.faces.api_default:api", "tests.faces.api_explicit:api")
pytestmark = [needs_proc, pytest.mark.usefixtures("worker_process")]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def ask_all(url: str) -> dict[int, list[dict[str, int]]]:
    """Ask until each process has answered five times; return the answers by process."""
    answers: dict[int, list[dict[str, int]]] = {}
    with httpx.Client(base_url=url, timeout=60) as client:
        up(client)
    for number in range(2000):
        # A connection each, for another process to take it.
        answer = httpx.get(url, params={"x": number, "y": 1}, timeout=60).json()
        assert answer["sum"] == number + 1
        answers.setdefault(answer["pid"], []).append(answer)
        if len(answers) == PROCESSES and min(map(len, answers.values())) >= 5:
            break
    threaded = httpx.get(f"{url}/thread", params={"x": 2, "y": 2}, timeout=60).json()
    assert threaded == {"sum": 4}
    return answers


def leaks(answers: dict[int, list[dict[str, int]]]) -> bool:
    return any(given[-1]["sockets"] > given[1]["sockets"] for given in answers.values())


@pytest.mark.parametrize("backend", ["sqlite", "redis"], indirect=True)
@pytest.mark.parametrize("api", APIS)
def test_uvicorn_with_workers(api: str, environment: dict[str, str], port: int, url: str) -> None:
    command = ("-m", "uvicorn", api, "--workers", str(PROCESSES), "--port", str(port))
    with Process(*command, environment=environment) as server:
        answers = ask_all(url)
        assert len(answers) == PROCESSES
        assert not leaks(answers)
        assert server.terminate() == 0
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("backend", ["sqlite", "redis"], indirect=True)
@pytest.mark.parametrize(
    ("api", "used"), [(APIS[0], False), (APIS[0], True), (APIS[1], False)],
    ids=["default", "default, used before the fork", "explicit"],
)  # fmt: skip
def test_gunicorn_with_preload(
    api: str, used: bool, environment: dict[str, str], port: int, url: str
) -> None:
    if used:
        environment = {**environment, "USED_BEFORE": "1"}
    command = ("-m", "gunicorn", "--preload", "--workers", str(PROCESSES))
    classes = ("--worker-class", "uvicorn_worker.UvicornWorker", "--bind", f"127.0.0.1:{port}")
    with Process(*command, *classes, api, environment=environment) as server:
        answers = ask_all(url)
        assert len(answers) == PROCESSES
        assert not leaks(answers)
        first = next(iter(answers.values()))[0]
        assert first["imported_by"] not in answers, "it was not forked"
        assert first["before"] == (2 if used else None)
        assert server.terminate() == 0
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("backend", ["sqlite", "redis"], indirect=True)
def test_a_client_that_disconnects_does_not_cancel_its_task(
    environment: dict[str, str], port: int, url: str, tmp_path: Path
) -> None:
    command = ("-m", "uvicorn", APIS[0], "--port", str(port))
    with (
        Process(*command, environment=environment) as server,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        up(client)
        with socket.create_connection(("127.0.0.1", port)) as impatient:
            asked = f"GET /mark?directory={tmp_path} HTTP/1.1\r\nHost: api\r\n\r\n"
            impatient.sendall(asked.encode())
            until(Path(tmp_path, "begun").exists, "its beginning")
        assert not Path(tmp_path, "ended").exists()
        until(Path(tmp_path, "ended").exists, "its end")
        assert client.get("/", params={"x": 1, "y": 1}).json()["sum"] == 2
        assert "Traceback" not in server.output()
