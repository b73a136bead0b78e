"""The example's three files, copied to an empty folder, against the installed wheel."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import httpx
import pytest

from tests.packaging.installed import ROOT, Installation
from tests.processes import Process

FILES = ("tasks.py", "api.py", "qtasks_app.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An otherwise empty folder with the example's package in it."""
    package = tmp_path / "empty" / "shop"
    package.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / "examples" / "fastapi_shop" / "shop" / name, package)
    return package.parent


def test_the_three_files_run_in_an_empty_folder(wheel: Path, tmp_path: Path, folder: Path) -> None:
    installation = Installation(tmp_path / "environment", wheel, "", "fastapi", "uvicorn")
    # An empty value counts as none: nothing of this checkout is on the path.
    environment = {"XDG_DATA_HOME": str(tmp_path / "data"), "PYTHONPATH": ""}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    uvicorn = ("-m", "uvicorn", "shop.api:app", "--port", str(port))
    python = installation.python
    with (
        Process("-m", "shop.qtasks_app", environment=environment, cwd=folder, python=python) as by,
        Process(*uvicorn, environment=environment, cwd=folder, python=python) as api,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        api.wait_for("Uvicorn running")
        assert [client.get("/").json() for _ in range(3)] == [{"result": 3}] * 3
        assert (tmp_path / "data" / "qtasks" / "qtasks.db").exists()
        assert by.terminate() == 0
        assert "knows shop.tasks.example_task" in by.output()
    assert {path.name for path in folder.iterdir()} == {"shop"}
