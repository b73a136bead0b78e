"""The blocking face in plain threads, and in a WSGI server that has a thread for each request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import httpx
import pytest

import qtasks.app
from qtasks import QueueTasks, TaskFailed, TaskTimeout
from tests.faces.descriptors import needs_proc, sockets
from tests.faces.sums import add_blocking
from tests.processes import until

BACKENDS = ["sqlite", "redis"]
pytestmark = [needs_proc, pytest.mark.usefixtures("worker_process")]


@pytest.fixture
def default(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process's default app on the worker's parts, closed at the end as at exit."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("qtasks.app._default", None)
    before = sockets_of_the_warm()
    yield
    qtasks.app.default_app()._close_at_exit()
    until(lambda: sockets() <= before, f"no more than {before} sockets")


def sockets_of_the_warm() -> int:
    with QueueTasks("warm-up", "memory://"):
        return sockets()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.usefixtures("default")
def test_threads_that_first_use_it_at_once() -> None:
    barrier = threading.Barrier(16)

    def work(number: int) -> list[int]:
        barrier.wait()
        return [add_blocking.add_task(number, n, timeout=120).returning for n in range(20)]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(work, range(16)))
    assert found == [[number + n for n in range(20)] for number in range(16)]


@pytest.mark.usefixtures("default")
def test_threads_that_end_while_others_go_on() -> None:
    held = sockets()
    for number in range(50):
        thread = threading.Thread(target=lambda n=number: add_blocking.add_task(n, 1, timeout=120))
        thread.start()
        thread.join()
        if number == 0:
            held = sockets()
    assert sockets() == held


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_threads_that_each_enter_an_app_of_their_own(environment: dict[str, str]) -> None:
    before = sockets_of_the_warm()

    def work(number: int) -> int:
        app = QueueTasks(
            environment["QTASKS_NAME"],
            environment["QTASKS_BROKER_URL"],
            environment["QTASKS_STORAGE_URL"],
        )
        with app:
            return add_blocking.using(app).add_task(number, 1, timeout=120).returning

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(30))) == list(range(1, 31))
    until(lambda: sockets() <= before, f"no more than {before} sockets")


Respond = Callable[[str, list[tuple[str, str]]], object]


def site(environ: dict[str, Any], respond: Respond) -> Iterable[bytes]:
    """What a Flask view does, without Flask: enqueue, wait, answer."""
    query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
    status = "200 OK"
    body: dict[str, Any] = {}
    try:
        if environ["PATH_INFO"] == "/add":
            task = add_blocking.add_task(int(query["x"]), int(query["y"]), timeout=120)
            body = {"sum": task.returning, "thread": threading.get_ident()}
        else:
            add_blocking.call(1, 1).add_task(queue="nobody", timeout=0.1)
    except TaskTimeout as error:
        status, body = "504 Gateway Timeout", {"uuid": error.uuid}
    except TaskFailed as error:
        status, body = "500 Internal Server Error", {"error": error.record.error}
    respond(status, [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]


class ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.usefixtures("default")
def test_a_wsgi_site_with_a_thread_for_each_request() -> None:
    server = make_server("127.0.0.1", 0, site, ThreadingServer, Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with ThreadPoolExecutor(8) as pool:

            def ask(number: int) -> int:
                answer = httpx.get(f"{url}/add", params={"x": number, "y": 1}, timeout=30)
                return int(answer.json()["sum"])

            assert list(pool.map(ask, range(100))) == list(range(1, 101))
        late = httpx.get(f"{url}/late", timeout=30)
        assert (late.status_code, bool(late.json()["uuid"])) == (504, True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
