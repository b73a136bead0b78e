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


LEAVING = """
import asyncio
from tests.services.kafka import asking, topics_of_clients
from tests.services_test.clients import CLIENTS
async def found(url):
    async with asking(url) as admin: return await topics_of_clients(admin)
def test_one_leaves_a_topic(kafka_server):
    asyncio.run(CLIENTS["kafka"].write(kafka_server.url))
    assert asyncio.run(found(kafka_server.url)) == ["words"]
def test_one_finds_no_topic(kafka_server):
    assert asyncio.run(found(kafka_server.url)) == []
"""


def test_what_a_test_leaves_in_kafka_is_gone_before_the_next(
    pytest_run: Run, tmp_path: Path
) -> None:
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    printed = pytest_run("-k", "test_one")
    assert "2 passed" in printed, printed


WAITING = """
import os, time
def seen():
    open(f"{SEEN}/{os.getpid()}", "w").close()
    deadline = time.monotonic() + 30
    while not SHARES and len(os.listdir(SEEN)) < 2:
        assert time.monotonic() < deadline, "no other process has one of these"
        time.sleep(0.02)
"""


def test_a_directory_that_shares_has_one_process_and_others_have_many(
    pytest_run: Run, tmp_path: Path
) -> None:
    for directory in ("kit", "other"):
        seen = tmp_path / directory
        seen.mkdir()
        path = tmp_path / "tests" / directory / f"test_{directory}.py"
        path.parent.mkdir(parents=True)
        tests = "".join(f"def test_number_{n}(): seen()\n" for n in range(9))
        shares = directory == "kit"
        # Those of a directory that does not share wait until a second process has one of them.
        path.write_text(f"SEEN, SHARES = {str(seen)!r}, {shares}\n{WAITING}{tests}")
    printed = pytest_run("-n", "2", "-k", "number")
    assert "18 passed" in printed
    processes = {name: len(list((tmp_path / name).iterdir())) for name in ("kit", "other")}
    assert processes == {"kit": 1, "other": 2}, printed
