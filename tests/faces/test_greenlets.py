"""Web servers whose threads are greenlets are refused, with the way out."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path

import pytest

from tests.processes import ROOT, Process

pytest.importorskip("gevent", reason="gevent is in the dev extra")

SITE = """
from qtasks import QueueTasks

queue = QueueTasks("site", "memory://")

@queue.task()
def one():
    return 1

def application(environment, answer):
    with queue:
        said = one.add_task().status
    answer("200 OK", [])
    return [said.encode()]
"""
LATE = """
from qtasks import QueueTasks
from gevent import monkey

monkey.patch_all()
with QueueTasks("site", "memory://"):
    pass
"""
REFUSAL = "gevent has replaced the threads of this process by greenlets"


def gunicorn(place: Path, kind: str, port: int) -> Process:
    (place / "site_of_ours.py").write_text(SITE)
    options = ["-k", kind, "--threads", "2", "-b", f"127.0.0.1:{port}", "site_of_ours"]
    return Process(
        "-m", "gunicorn", *options, environment={"PYTHONPATH": f"{place}:{ROOT}"}, cwd=place
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_gunicorn_with_greenlets_says_which_worker_class_to_take(tmp_path: Path) -> None:
    with gunicorn(tmp_path, "gevent", free_port()) as server:
        assert server.wait() != 0
        said = server.output()
    assert REFUSAL in said
    assert "take the worker class gthread (-k gthread --threads 8) instead" in said


def test_gunicorn_with_threads_serves(tmp_path: Path) -> None:
    port = free_port()
    with gunicorn(tmp_path, "gthread", port) as server:
        server.wait_for("Booting worker")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=120) as answer:
            assert answer.read() == b"new"
        assert server.terminate() == 0


def test_threads_that_are_replaced_after_the_import(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(LATE)
    with Process(str(tmp_path / "program.py"), environment={}) as program:
        assert program.wait() == 1
        assert f"ConfigurationError: {REFUSAL}" in program.output()
