"""Servers in containers: which tests get one, which image it has, and what is said otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from qtasks.testing.recipes import RECIPES
from tests import containers
from tests.containers import Images
from tests.services import SERVICES, NotInContainers, RedisServer, Unobtainable, stand_ins
from tests.services.secured_kafka import SecuredKafka

ROOT = Path(__file__).parents[2]


def image(name: str) -> str:
    return RECIPES[name].chosen_image


class Store:
    """An engine as far as images go: those it has, and whether a registry answers it."""

    UNKNOWN = "redis:no-such-tag"

    def __init__(self, *stored: str, registry: bool) -> None:
        self.stored, self.registry = set(stored), registry
        self.asked: list[str] = []

    @property
    def images(self) -> Store:
        return self

    def get(self, image: str) -> None:
        if image not in self.stored:
            raise docker.errors.ImageNotFound(image)

    def pull(self, image: str) -> None:
        self.asked.append(image)
        if not self.registry:
            raise docker.errors.APIError("internal error", explanation="no such host")
        if image == self.UNKNOWN:
            raise docker.errors.NotFound("not found", explanation="manifest unknown")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-ins that were built, which takes no time here."""
    names: list[str] = []

    def build(engine: Any, name: str) -> str:
        names.append(name)
        return stand_ins.tag(name)

    monkeypatch.delenv("QTASKS_TEST_STAND_INS", raising=False)
    monkeypatch.setattr(stand_ins, "build", build)
    return names


def test_an_official_image_that_is_stored_is_used(built: list[str]) -> None:
    store = Store(image("redis"), stand_ins.tag("redis"), registry=True)
    for stored_only in (True, False):
        assert Images(store, stored_only=stored_only).obtain("redis") == image("redis")
    assert (store.asked, built) == ([], [])


def test_an_image_is_pulled_where_a_registry_answers(built: list[str]) -> None:
    store = Store(stand_ins.tag("redis"), registry=True)
    assert Images(store, stored_only=False).obtain("redis") == image("redis")
    assert (store.asked, built) == ([image("redis")], [])


def test_without_a_registry_stand_ins_are_built_and_the_reason_told(
    built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(registry=False)
    images = Images(store, stored_only=False)
    assert [images.obtain(name) for name in SERVICES] == [stand_ins.tag(n) for n in SERVICES]
    assert built == list(SERVICES)
    assert store.asked == [image("redis")], "the registry that does not answer was asked again"
    for name, line in zip(SERVICES, capsys.readouterr().out.splitlines(), strict=True):
        told = f"image: {stand_ins.tag(name)}, as {image(name)} is not pulled: no such host"
        assert line == told


def test_a_registry_without_an_image_is_asked_for_the_next(
    built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTASKS_IMAGE_REDIS", Store.UNKNOWN)
    store = Store(registry=True)
    images = Images(store, stored_only=False)
    assert images.obtain("redis") == stand_ins.tag("redis")
    assert images.obtain("kafka") == image("kafka")
    assert built == ["redis"]


def test_no_registry_is_asked_if_stand_ins_are_wanted(
    built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTASKS_TEST_STAND_INS", "1")
    store = Store(registry=True)
    assert Images(store, stored_only=False).obtain("kafka") == stand_ins.tag("kafka")
    assert (store.asked, built) == ([], ["kafka"])


def test_the_short_form_gets_nothing(built: list[str]) -> None:
    store = Store(stand_ins.tag("redis"), registry=True)
    images = Images(store, stored_only=True)
    assert images.obtain("redis") == stand_ins.tag("redis")
    with pytest.raises(Unobtainable, match=r"no image of kafka is stored; `make test-containers`"):
        images.obtain("kafka")
    assert (store.asked, built) == ([], [])


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--short"], containers.NOT_RUN, "no Docker engine answers; start one, or let `make test"),
        ([], 1, "answering: none answers at unix://"),
    ],
)
def test_without_an_engine_it_is_told(
    options: list[str],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def not_found(program: str, package: str) -> str:
        raise Unobtainable(f"{program} is missing; install {package}")

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(containers, "locate", lambda program: None)
    monkeypatch.setattr("tests.services.engine.need_program", not_found)
    monkeypatch.setattr(sys, "argv", ["containers", *options])
    assert containers.main() == status
    assert capsys.readouterr().err.startswith(f"no tests in containers: {said}")


def test_a_tag_tells_what_its_image_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: stand_ins.tag(name) for name in SERVICES}
    assert len(set(before.values())) == len(SERVICES)
    for name in SERVICES:
        shutil.copytree(stand_ins.HERE / name, tmp_path / name)
    monkeypatch.setattr(stand_ins, "HERE", tmp_path)
    assert {name: stand_ins.tag(name) for name in SERVICES} == before
    with (tmp_path / "redis" / "Dockerfile").open("a") as file:
        file.write("# changed\n")
    changed = {name for name in SERVICES if stand_ins.tag(name) != before[name]}
    assert changed == {"redis"}
    monkeypatch.setattr("tests.services.kafka.POM", "another version")
    changed = {name for name in SERVICES if stand_ins.tag(name) != before[name]}
    assert changed == {"redis", "kafka"}


def test_in_containers_nothing_runs_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTASKS_TEST_CONTAINERS", "a-run")
    monkeypatch.setenv("QTASKS_TEST_REDIS_URL", "redis://127.0.0.1:1/0")
    assert [way.how for way in RedisServer().ways()] == ["container"]
    with pytest.raises(NotInContainers, match="securedkafka is run natively: `make test`"):
        SecuredKafka().start()


def test_scripts_of_stand_ins_are_well_formed() -> None:
    scripts = [path for path in stand_ins.HERE.glob("*/*") if os.access(path, os.X_OK)]
    assert len(scripts) == 4
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
