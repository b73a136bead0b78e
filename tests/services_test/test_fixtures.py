"""The fixtures in a run of their own: what is skipped, what fails, and the table at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services import Service

Run = Callable[..., str]

ROOT = Path(__file__).parents[2]

OPTIONS = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-rsfE", "--tb=line", "-q"]

ASKING = """
import pytest
def test_asks(redis_server): assert redis_server.url
def test_kills(redis_server): redis_server.kill()
def test_needs_none(): pass
@pytest.mark.full
def test_takes_long(): pass
"""


@pytest.fixture
def pytest_run(tmp_path: Path) -> Run:
    """Give what runs the tests of ASKING, with options and variables, and returns its text."""

    def run(*arguments: str, **variables: str) -> str:
        (tmp_path / "test_asking.py").write_text(ASKING)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("QTASKS_", "CI"))}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                *OPTIONS,
                f"--rootdir={tmp_path}",
                *arguments,
                tmp_path,
            ],
            cwd=ROOT,
            env={**kept, "PYTHONPATH": str(ROOT), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return done.stdout

    return run


def test_the_table_tells_how_each_server_was_got(pytest_run: Run) -> None:
    printed = pytest_run()
    assert "3 passed, 1 skipped" in printed
    assert "takes long: --full runs it" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert any(line[:2] == ["redis", "native"] for line in lines), printed
    assert ["kafka", "not", "asked", "for"] in lines
    assert "4 passed" in pytest_run("--full")


def test_without_the_server_its_tests_are_skipped_with_the_reason(
    pytest_run: Run, tmp_path: Path
) -> None:
    printed = pytest_run(PATH=str(tmp_path))
    assert "1 passed, 3 skipped" in printed
    assert "redis cannot be had: environment: QTASKS_TEST_REDIS_URL is not set" in printed
    assert any(line.startswith("redis      not had") for line in printed.splitlines()), printed


def test_in_ci_they_fail(pytest_run: Run, tmp_path: Path) -> None:
    printed = pytest_run(PATH=str(tmp_path), CI="true")
    assert "1 passed, 1 skipped, 2 errors" in printed


def test_a_server_of_somebody_elses_is_not_killed(pytest_run: Run, redis_server: Service) -> None:
    named = {"QTASKS_TEST_REDIS_URL": redis_server.url}
    assert "2 passed, 2 skipped" in pytest_run(**named)
    assert "1 failed, 2 passed, 1 skipped" in pytest_run(CI="true", **named)
