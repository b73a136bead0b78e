"""The command `qtasks` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.processes import PATIENCE, ROOT, Process

SHOP = "tests.cli.shop:app"


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of its output."""
        (line,) = self.out.splitlines()
        return line

    @property
    def error(self) -> str:
        """The one line that it said of an error."""
        (line,) = self.err.splitlines()
        return line

    @property
    def told(self) -> Any:
        """The one JSON document that it said of an error."""
        return json.loads(self.error)

    @property
    def json(self) -> Any:
        """Its one JSON document."""
        return json.loads(self.line)

    @property
    def rows(self) -> list[Any]:
        """Its JSON objects, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


class Command:
    """Runs `qtasks` with an environment; `-A` names the tests' app unless told otherwise."""

    def __init__(self, environment: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.environment = dict(environment)
        self.cwd = cwd

    @property
    def url(self) -> str:
        """The URL of its broker and storage."""
        return self.environment["QTASKS_BROKER_URL"]

    @property
    def name(self) -> str:
        """The name of the app."""
        return self.environment["QTASKS_NAME"]

    def __call__(self, *arguments: str, app: str | None = SHOP, input: str = "") -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "qtasks", *(("-A", app) if app else ()), *arguments],
            cwd=self.cwd,
            env={**inherited(), **self.environment},
            input=input,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Said(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str, app: str | None = SHOP, input: str = "") -> Said:
        """Run it; it has to end well and say nothing else."""
        said = self(*arguments, app=app, input=input)
        assert (said.code, said.err) == (0, ""), said
        return said

    def run(self, *arguments: str, app: str | None = SHOP, before: bool = False) -> Process:
        """Return a worker that starts; its arguments stand behind the command, or before it."""
        named = ("-A", app) if app else ()
        words = (*arguments, "run") if before else ("run", *arguments)
        return Process("-m", "qtasks", *named, *words, environment=self.environment, cwd=self.cwd)


def inherited() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QTASKS_")}
    return {**kept, "PYTHONPATH": str(ROOT)}
