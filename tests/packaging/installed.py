"""The wheel of this checkout, and clean environments that have it installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = """
import importlib.metadata, json
print(json.dumps([found.metadata["Name"] for found in importlib.metadata.distributions()]))
"""
INSTALL_WITHIN = 240.0
"""Seconds; packages may have to be fetched."""


def build_wheel(directory: Path) -> Path:
    """Build the wheel into a directory and return its path."""
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT))
    (wheel,) = directory.glob("qtasks-*.whl")
    return wheel


class Installation:
    """A virtual environment with the wheel, some of its extras and other packages in it."""

    def __init__(self, directory: Path, wheel: Path, extra: str = "", *others: str) -> None:
        self.directory = directory
        # Without pip in it, which is what takes long; ours installs into it from outside.
        command = [sys.executable, "-m", "venv", "--without-pip", str(directory)]
        subprocess.run(command, check=True, timeout=60)
        self.python = str(directory / "bin" / "python")
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        # Python compiles what a test imports; most of it no test does.
        pip(self.python, "install", "--no-compile", wanted, *others)

    def packages(self) -> set[str]:
        """Return the names of all that is installed."""
        return set(json.loads(self.output("-c", LIST)))

    def run(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python in its own directory, with nothing of ours in the environment."""
        return subprocess.run(
            [self.python, *arguments],
            cwd=self.directory,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.directory), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def output(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Run its Python and return what it printed; fail with its complaints when it fails."""
        done = self.run(*arguments, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def pip(python: str, *arguments: str) -> str:
    """Run our pip for an interpreter, heeding what the environment tells pip; return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check",
         *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=INSTALL_WITHIN,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
