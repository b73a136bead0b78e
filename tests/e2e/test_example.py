"""The example, as it stands, in two processes over HTTP, on each backend and two mixed pairs."""

from __future__ import annotations

import random
import re
import shutil
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

    until(answers, "the API")


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
        late: list[httpx.Response] = []

        def is_too_late() -> bool:
            """Say whether the answer is that of a task that nobody has run.

            The first call starts the app, within its own time, which a busy machine may need more
            than once.
            """
            late.append(client.get("/add", params={"x": 1, "y": 2, "timeout": 8}))
            return late[-1].status_code == 504

        until(is_too_late, "a call without a worker")
        assert "no worker has begun it" in late[-1].json()["detail"]
        with Process("-m", "tests.e2e.shop", environment=environment) as worker:
            for path, of in (("/add", int.__add__), ("/multiply", int.__mul__)):
                x, y = random.randrange(10**6), random.randrange(10**6)
                answer = client.get(path, params={"x": x, "y": y}).json()
                assert answer == {"sum": of(x, y), "pid": worker.pid, "api": front.pid}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """The example, whose worker names its broker in the code, as the README shows."""
    package = tmp_path / "shop"
    shutil.copytree(SHOP / "shop", package)
    app = package / "qtasks_app.py"
    url = f"sqlite:///{tmp_path}/tasks.db"
    code = app.read_text()
    assert "QueueTasks()" in code
    app.write_text(code.replace("QueueTasks()", f"QueueTasks(broker={url!r})"))
    return tmp_path


def test_a_broker_in_the_workers_code_reaches_the_api_by_the_apps_name(
    shop: Path, port: int, client: httpx.Client
) -> None:
    readme = (ROOT / "README.md").read_text()
    (name,) = re.findall(r"^export QTASKS_APP=(\S+)$", readme, re.MULTILINE)
    environment = {"XDG_DATA_HOME": str(shop / "data")}
    with (
        Process("-m", "shop.qtasks_app", environment=environment, cwd=shop) as worker,
        api("shop.api:app", port, {**environment, "QTASKS_APP": name}, shop),
    ):
        up(client)
        assert client.get("/").json() == {"result": 3}
        assert worker.terminate() == 0
    assert not (shop / "data").exists()


def test_without_the_apps_name_the_api_says_where_it_writes(
    shop: Path, port: int, client: httpx.Client
) -> None:
    """At its start, and in the answer and the log of a request that nobody serves."""
    environment = {"XDG_DATA_HOME": str(shop / "data")}
    where = f"sqlite:///{shop}/data/qtasks/qtasks.db"
    with api("shop.api:app", port, environment, shop) as front:
        front.wait_for(f"no worker of the app 'qtasks' is alive at {where}")
        up(client)
        late = client.get("/")
        assert late.status_code == 504
        assert "no worker has ever been seen" in late.json()["detail"]
        assert "sqlite" not in late.text
        front.wait_for(f"default app 'qtasks' uses the broker {where}")
