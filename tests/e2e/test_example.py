"""The example, as it stands, in two processes over HTTP, on each backend and two mixed pairs."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.pairs import pair_of
from tests.processes import ROOT, Process, until

PAIRS = (
    "default",
    "redis",
    "postgres",
    "rabbitmq",
    "kafka",
    "kafka+postgres",
    "rabbitmq+redis",
)
SHOP = ROOT / "examples" / "fastapi_shop"


@pytest.fixture(params=PAIRS)
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """How both processes find their parts; on the embedded default nothing says it."""
    if request.param == "default":
        return {"XDG_DATA_HOME": str(tmp_path)}
    return {
        **pair_of(request, request.param, tmp_path).environment,
        "QTASKS_NAME": f"e2e-{uuid4().hex[:8]}",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client


def api(module: str, port: int, environment: dict[str, str], cwd: Path = ROOT) -> Process:
    return Process("-m", "uvicorn", module, "--port", str(port), environment=environment, cwd=cwd)


def up(client: httpx.Client) -> None:
    """Wait until the API takes connections."""

    def answers() -> bool:
        try:
            return client.get("/openapi.json").status_code == 200
        except httpx.TransportError:
            return False

    until(answers, 40, "the API")


def test_the_example_answers(environment: dict[str, str], port: int, client: httpx.Client) -> None:
    with (
        Process("-m", "shop.qtasks_app", environment=environment, cwd=SHOP) as worker,
        api("shop.api:app", port, environment, SHOP),
    ):
        up(client)
        for _ in range(5):
            assert client.get("/").json() == {"result": 3}
        assert worker.terminate() == 0


def test_another_process_answers_and_without_it_nothing_does(
    environment: dict[str, str], port: int, client: httpx.Client
) -> None:
    with api("tests.e2e.shop_api:app", port, environment) as front:
        up(client)
        # The first call starts the app, within its own time.
        late = client.get("/add", params={"x": 1, "y": 2, "timeout": 8})
        assert late.status_code == 504
        assert "no worker has begun it" in late.json()["detail"]
        with Process("-m", "tests.e2e.shop", environment=environment) as worker:
            for path, of in (("/add", int.__add__), ("/multiply", int.__mul__)):
                x, y = random.randrange(10**6), random.randrange(10**6)
                answer = client.get(path, params={"x": x, "y": y}).json()
                assert answer == {"sum": of(x, y), "pid": worker.pid, "api": front.pid}
