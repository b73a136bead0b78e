"""The example's three files, copied to an empty folder, against the installed wheel."""

from __future__ import annotations

import re
import shlex
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


def two_commands() -> list[list[str]]:
    """Return the words of the worker's and of the API's command, as the README has them."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (block,) = [block for block in blocks if "uvicorn shop.api:app" in block]
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_the_three_files_run_in_an_empty_folder(wheel: Path, tmp_path: Path, folder: Path) -> None:
    installation = Installation(tmp_path / "environment", wheel, "", "fastapi", "uvicorn")
    # An empty value counts as none: nothing of this checkout is on the path.
    environment = {"XDG_DATA_HOME": str(tmp_path / "data"), "PYTHONPATH": ""}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    worker, uvicorn = two_commands()
    uvicorn += ["--port", str(port)]

    def started(words: list[str]) -> Process:
        program = str(installation.directory / "bin" / words[0])
        return Process(*words[1:], environment=environment, cwd=folder, python=program)

    with (
        started(worker) as by,
        started(uvicorn) as api,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        api.wait_for("Uvicorn running")
        assert [client.get("/").json() for _ in range(3)] == [{"result": 3}] * 3
        assert (tmp_path / "data" / "qtasks" / "qtasks.db").exists()
        assert by.terminate() == 0
        assert "knows shop.tasks.example_task" in by.output()
    assert {path.name for path in folder.iterdir()} == {"shop"}
