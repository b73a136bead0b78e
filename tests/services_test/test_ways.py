"""How a server is got: the environment first, then the machine; and what is said otherwise."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from qtasks.testing import native as running
from qtasks.testing.recipes import RECIPES
from tests.services import SERVICES, NotOurs, NotReady, RedisServer, Service, Unobtainable
from tests.services import install as installing

ROOT = Path(__file__).parents[2]


def test_a_url_in_the_environment_goes_first(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTASKS_TEST_REDIS_URL", redis_server.url)
    named = RedisServer()
    assert named.start() == redis_server.url
    assert (named.how, named.version) == ("environment", redis_server.version)
    for deed in (named.kill, named.restart, named.freeze, named.thaw):
        with pytest.raises(NotOurs, match="unset QTASKS_TEST_REDIS_URL"):
            deed()
    named.stop()
    assert RedisServer().start() == redis_server.url, "stop() ended a server of somebody else's"


def test_a_url_that_does_not_answer_is_an_error_and_shows_no_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.services.service.START_WITHIN", 0.2)
    monkeypatch.setenv("QTASKS_TEST_REDIS_URL", "redis://:hidden@127.0.0.1:1/0")
    with pytest.raises(NotReady, match=r"redis at redis://:\*\*\*@127.0.0.1:1/0") as raised:
        RedisServer().start()
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("name", ["redis", "kafka"])
def test_without_any_way_all_reasons_are_told(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = SERVICES[name]()
    monkeypatch.delenv(service.variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unobtainable) as raised:
        service.start()
    assert f"environment: {service.variable} is not set; native: " in str(raised.value)
    assert "apt-get install" in str(raised.value)


def test_a_program_that_ends_is_told_with_what_it_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("QTASKS_TEST_REDIS_URL", raising=False)
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\necho no memory left\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NotReady, match="ended with 3: no memory left"):
        RedisServer().start()


def test_a_failing_installation_is_told_with_what_it_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho cannot resolve\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Unobtainable, match=r"apt-get .* update failed: cannot resolve"):
        installing.install_package("redis-server", "redis-server")


def test_ports_are_outside_the_range_of_outgoing_connections(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lowest = int(running.OUTGOING.read_text().split()[0])
    assert all(running.free_port() < lowest for _ in range(50))
    monkeypatch.setattr(running, "OUTGOING", tmp_path / "not on Linux")
    assert all(running.free_port() < 49_152 for _ in range(50))


def test_the_images_of_compose_are_those_of_the_recipes() -> None:
    lines = [line.partition("=") for line in (ROOT / ".env").read_text().splitlines()]
    images = {name: image for name, _, image in lines if not name.startswith("#")}
    assert images == {f"QTASKS_IMAGE_{name.upper()}": r.image for name, r in RECIPES.items()}
    assert list(RECIPES) == list(SERVICES)
    compose = (ROOT / "compose.yaml").read_text()
    used = re.findall(r"^ +image: (.*)$", compose, re.MULTILINE)
    assert used == [f"${{QTASKS_IMAGE_{name.upper()}}}" for name in SERVICES]
    published = re.findall(r'ports: \["([^"]*)"\]', compose)
    assert len(published) == len(SERVICES)
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_environment_may_name_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTASKS_IMAGE_KAFKA", "stand-in:1")
    assert RECIPES["kafka"].chosen_image == "stand-in:1"


def test_scripts_are_well_formed() -> None:
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
