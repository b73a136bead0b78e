"""The fuller example in two processes over HTTP, and its own tests, run as its reader would."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_example import free_port, up
from tests.processes import ROOT, Process, until

STORE = ROOT / "examples" / "fastapi_full"


@pytest.fixture
def store(environment: dict[str, str]) -> dict[str, str]:
    """The environment of both processes."""
    return {
        "STORE_BROKER_URL": environment["QTASKS_BROKER_URL"],
        "STORE_STORAGE_URL": environment["QTASKS_STORAGE_URL"],
        "STORE_PATIENCE": "20",
        "STORE_NAME": environment["QTASKS_NAME"],
    }


@pytest.fixture
def client(store: dict[str, str]) -> Iterator[httpx.Client]:
    port = free_port()
    command = ("-m", "uvicorn", "store.api:api", "--port", str(port))
    with (
        Process(*command, environment=store, cwd=STORE) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        up(client)
        yield client
        # uvicorn ends itself by the signal that it got.
        assert server.terminate() in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output()


def test_its_own_tests(tmp_path: Path) -> None:
    """In a copy, since what this checkout sets for pytest is not there at its reader's."""
    copy = shutil.copytree(STORE, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    with Process("-m", "pytest", "-q", environment={}, cwd=copy) as own:
        status = own.wait()
        assert status == 0, own.output()


@pytest.mark.parametrize("backend", ["sqlite", "redis"], indirect=True)
def test_the_store(store: dict[str, str], client: httpx.Client) -> None:
    order = {"item": "tea", "amount": 2, "mail": "a@b.c"}
    with Process("-m", "store.worker", environment=store, cwd=STORE) as worker:
        assert client.get("/health").json().keys() == {"broker", "storage"}
        receipt = client.post("/orders", json=order).json()
        assert receipt == {"order": order, "price": 9.0}
        sold_out = client.post("/orders", json={"item": "gold", "amount": 1})
        assert sold_out.status_code == 500
        assert "we do not sell gold" in sold_out.json()["detail"]
        started = client.post("/reports/2025", params={"seconds": 0.5})
        assert started.status_code == 202
        url = started.headers["Location"]
        late = client.get(f"{url}/result", params={"wait": 0.1})
        assert (late.status_code, late.json()["uuid"]) == (504, started.json()["uuid"])
        assert client.get(f"{url}/result", params={"wait": 20}).json() == {"year": 2025, "sold": 42}
        assert client.get(url).json()["status"] == "success"
        failed = client.post("/reports/1999").json()["uuid"]
        until(lambda: client.get(f"/tasks/{failed}").json()["status"] == "error", "its end")
        assert "no books for 1999" in client.get(f"/tasks/{failed}").json()["error"]
        assert worker.terminate() == 0
    # Without a worker an order is taken and waits for one.
    waiting = client.post("/reports/2024", params={"seconds": 0}).json()
    assert waiting["status"] == "new"
    with Process("-m", "store.worker", environment=store, cwd=STORE):
        report = client.get(f"/tasks/{waiting['uuid']}/result", params={"wait": 20})
        assert report.json() == {"year": 2024, "sold": 42}


@pytest.mark.parametrize("backend", ["sqlite", "redis"], indirect=True)
def test_a_client_that_stops_waiting_does_not_cancel_the_task(
    store: dict[str, str], client: httpx.Client
) -> None:
    uuid = client.post("/reports/2023", params={"seconds": 1}).json()["uuid"]
    address = (client.base_url.host, client.base_url.port)
    with Process("-m", "store.worker", environment=store, cwd=STORE):
        with socket.create_connection(address) as impatient:
            asked = f"GET /tasks/{uuid}/result?wait=20 HTTP/1.1\r\nHost: store\r\n\r\n"
            impatient.sendall(asked.encode())
            status = client.get(f"/tasks/{uuid}").json()["status"]
        assert status in ("new", "process")
        until(lambda: client.get(f"/tasks/{uuid}").json()["status"] == "success", "its end")
