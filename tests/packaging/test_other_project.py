"""The package index has another project called `qtasks`: what is said when both meet."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

GUARANTEES = """
from qtasks.asyncio import QueueTasks
from qtasks_core.errors import ConfigurationError
try:
    QueueTasks(broker="memory://")
except ConfigurationError as error:
    print(error)
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A directory of packages with the other project in it, as an installer leaves it there."""
    (tmp_path / "qtasks").mkdir()
    (tmp_path / "qtasks" / "__init__.py").write_text("")
    metadata = tmp_path / "qtasks-1.7.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qtasks\nVersion: 1.7.3\n")
    return tmp_path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with our packages, which are not installed."""
    place = tmp_path / "checkout"
    place.mkdir()
    for package in ROOT.glob("qtasks*/__init__.py"):
        (place / package.parent.name).symlink_to(package.parent)
    return place


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A directory with what our packages need, and without us."""
    place = tmp_path / "libraries"
    place.mkdir()
    for name in ("click", "msgspec", "uuid_utils"):
        found = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__path__[0])"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout.strip()  # fmt: skip
        (place / name).symlink_to(found)
    return place


def run(paths: list[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that has these directories on its path and nothing that is installed."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(map(str, paths))}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=paths[0], env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_ours_in_a_checkout_beside_the_other_installed(
    checkout: Path, other: Path, libraries: Path
) -> None:
    done = run([checkout, other, libraries], "-c", GUARANTEES)
    (line,) = done.stdout.splitlines()
    assert "the installed qtasks 1.7.3 is another project of that name" in line
    assert "pip uninstall qtasks, then pip install " in line
    version = run([checkout, other, libraries], "-m", "qtasks", "--version")
    assert "1.7.3" not in version.stdout
    assert version.returncode == 0, version.stderr


def test_ours_in_a_checkout_that_is_not_installed(checkout: Path, libraries: Path) -> None:
    (line,) = run([checkout, libraries], "-c", GUARANTEES).stdout.splitlines()
    assert line.endswith(f"its backends are not found: pip install {checkout}")


def test_the_other_in_front_of_ours(checkout: Path, other: Path, libraries: Path) -> None:
    done = run([other, checkout, libraries], "-c", "import qtasks_redis")
    package = other / "qtasks" / "__init__.py"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {package} is another project named qtasks")


def test_no_page_and_no_message_installs_the_other_project() -> None:
    """An installer asks the index for a bare name; ours comes from a checkout or a wheel's path."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    by_name = re.compile(
        r"(?:pip3?|pipx|uv|poetry|pdm)\b[^\n`]*\b(?:install|add)\b[^\n`]*?[\s'\"]qtasks(?![-\w/.:])"
    )
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__) and name != "tests/docs/test_shell_blocks.py":
            try:
                text = path.read_text()
            except UnicodeDecodeError:
                continue
            found += [f"{name}: {match[0]}" for match in by_name.finditer(text)]
    assert found == []
