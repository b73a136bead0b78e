"""`python -m tests.services`: servers that stay up until they are told to go."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from tests.services_test.clients import CLIENTS, WORD
from tests.services_test.processes import alive, gone

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment with its own notes of what is up, so that a developer's are left alone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("QTASKS_TEST_")}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path)}


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.services", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_up_list_and_down(elsewhere: dict[str, str], tmp_path: Path) -> None:
    up = command(elsewhere, "up", "redis")
    try:
        exported = re.fullmatch(r"export QTASKS_TEST_REDIS_URL='?(redis://[^']*)'?\n", up.stdout)
        assert exported, up
        asyncio.run(CLIENTS["redis"].write(exported[1]))
        assert command(elsewhere, "up", "redis").stdout == up.stdout, "a second one was started"
        assert asyncio.run(CLIENTS["redis"].read(exported[1])) == WORD
        note = tmp_path / "qtasks" / "up-redis.json"
        assert note.stat().st_mode & 0o077 == 0, "others can read the password"
        listed = command(elsewhere, "list").stdout
        assert re.search(r"^redis +native, up +\d[\d.]* +redis://:\*\*\*@", listed, re.MULTILINE)
        assert re.search(r"^kafka +- ", listed, re.MULTILINE)
    finally:
        down = command(elsewhere, "down")
    assert down.stdout == "unset QTASKS_TEST_REDIS_URL\n"
    with pytest.raises(redis.ConnectionError):
        asyncio.run(CLIENTS["redis"].read(exported[1]))
    assert command(elsewhere, "down").stdout == ""


def test_down_leaves_a_process_alone_that_only_has_the_number(
    elsewhere: dict[str, str], tmp_path: Path
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        note = tmp_path / "qtasks" / "up-redis.json"
        note.parent.mkdir()
        note.write_text(
            '{"name": "redis", "url": "redis://127.0.0.1:1", "version": "7", '
            f'"guard": {bystander.pid}, "begun": 1}}'
        )
        assert command(elsewhere, "down").returncode == 0
        assert alive(bystander.pid)
        assert not note.exists()
    finally:
        bystander.kill()
        bystander.wait()
    assert gone([bystander.pid], within=1)


def test_what_cannot_be_had_is_told_and_fails(elsewhere: dict[str, str], tmp_path: Path) -> None:
    told = command({**elsewhere, "PATH": str(tmp_path)}, "up", "redis")
    assert told.returncode == 1
    assert told.stdout == ""
    assert told.stderr.startswith("redis: environment: QTASKS_TEST_REDIS_URL is not set; native: ")


def test_an_unknown_name_is_told(elsewhere: dict[str, str]) -> None:
    told = command(elsewhere, "up", "mysql")
    assert told.returncode == 2
    assert "unknown: mysql; there are redis, postgres, rabbitmq, kafka" in told.stderr
