"""A backend of somebody else, written by `docs/backends.md` alone, installed beside the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.installed import ROOT, Installation

STRANGER = ROOT / "tests" / "stranger"
PAGE = ROOT / "docs" / "backends.md"
PROGRAM = """
import asyncio
from qtasks.asyncio import QueueTasks

app = QueueTasks("stranger", "shelf://here")

@app.task()
async def add(x: int, y: int) -> int:
    return x + y

async def main() -> None:
    async with app, app.worker():
        print((await add.add_task(1, 2, timeout=20)).returning)

asyncio.run(main())
"""


def files() -> dict[str, str]:
    """Return the package's files by their paths in it."""
    found = [path for kind in ("*.toml", "*.py") for path in STRANGER.rglob(kind)]
    return {str(path.relative_to(STRANGER)): path.read_text() for path in found}


def test_the_page_shows_the_whole_package() -> None:
    """Each file under its name, as it is, and no block of code that is none of them."""
    shown = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert dict(shown) == files()
    assert PAGE.read_text().count("```") == 2 * len(shown)


def test_it_is_typed(tmp_path: Path) -> None:
    """Strictly, by what the contracts say of their types."""
    here = shutil.copytree(STRANGER, tmp_path / "here")
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "qtasks_shelf"],
        cwd=here, capture_output=True, text=True, timeout=200,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installation:
    """The wheel and the stranger's package, made in a folder that was empty, in one environment."""
    folder = tmp_path_factory.mktemp("empty")
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    directory = tmp_path_factory.mktemp("stranger")
    installation = Installation(directory, wheel, "conformance", str(folder))
    shutil.copytree(folder / "tests", directory / "tests")
    return installation


def test_it_passes_the_kit(installed: Installation) -> None:
    ran = subprocess.run(
        [installed.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=installed.directory, capture_output=True, text=True, timeout=900,
        env={"PATH": "/usr/bin:/bin", "HOME": str(installed.directory)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert re.search(r"\d+ passed", ran.stdout)
    assert "failed" not in ran.stdout


def test_its_url_is_resolved_and_runs_a_task(installed: Installation) -> None:
    assert installed.output("-c", PROGRAM) == "3\n"
