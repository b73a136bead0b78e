"""What importing costs and what it pulls in, seen from an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVERS = {"redis", "aio_pika", "aiormq", "pamqp", "aiokafka", "asyncpg", "confluent_kafka"}
URLS = {
    "memory": "memory://name?lease=5",
    "sqlite": "sqlite:///qtasks.db?lease=5",
    "redis": "redis://:pw@host:1/0?lease=5",
    "rediss": "rediss://:pw@host:1/0?lease=5",
    "valkey": "valkey://host?lease=5",
    "redis+sentinel": "redis+sentinel://:pw@a:1,b:2/shop/0?lease=5",
    "redis+cluster": "redis+cluster://:pw@a:1,b:2?lease=5",
    "rediss+sentinel": "rediss+sentinel://:pw@a:1,b:2/shop/0?lease=5",
    "rediss+cluster": "rediss+cluster://:pw@a:1,b:2?lease=5",
    "postgresql": "postgresql://me:pw@host/db?lease=5",
    "postgres": "postgres://me:pw@host/db?lease=5",
    "amqp": "amqp://me:pw@host/vhost?lease=5",
    "amqps": "amqps://me:pw@host/vhost?lease=5",
    "kafka": "kafka://a:1,b:2?lease=5",
    "kafka+share": "kafka+share://a:1,b:2?lease=5",
    "kafka+transactional": "kafka+transactional://a:1,b:2?lease=5",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BACKENDS: dict[str, str] = PROJECT["project"]["entry-points"]["qtasks.backends"]


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str, *arguments: str) -> set[str]:
    """Return the top-level modules that are imported once `code` has run."""
    report = "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    found: list[str] = json.loads(python(code + report, *arguments))
    return set(found)


@pytest.mark.parametrize(
    "package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
)
def test_importing_a_package_imports_no_driver(package: str) -> None:
    if package == "qtasks_conformance":
        pytest.importorskip("pytest_asyncio")
    imported = modules_after(f"import {package}")
    assert package in imported
    assert not imported & DRIVERS


def test_import_qtasks_imports_no_backend() -> None:
    backends = {value.partition(":")[0] for value in BACKENDS.values()}
    assert not modules_after("import qtasks") & (backends | {"qtasks_log", "qtasks_conformance"})


def test_import_qtasks_imports_no_command_line() -> None:
    imported = modules_after("import qtasks.asyncio, qtasks.control")
    assert "click" not in imported


def test_every_scheme_has_a_url_here() -> None:
    assert URLS.keys() == BACKENDS.keys()


@pytest.mark.parametrize("scheme", BACKENDS)
def test_building_both_parts_imports_no_driver(scheme: str) -> None:
    """The same URL names the broker and the storage, and nothing is connected before `start`."""
    package, _, name = BACKENDS[scheme].partition(":")
    code = f"""
import sys
from {package} import {name}
from qtasks_core import CONTRACT_VERSION, Broker, Storage
backend = {name}()
broker, storage = backend.broker(sys.argv[1]), backend.storage(sys.argv[1])
assert isinstance(broker, Broker) and isinstance(storage, Storage)
assert backend.contract == CONTRACT_VERSION
assert broker.guarantees.lease == 5, broker.guarantees
"""
    assert not modules_after(code, URLS[scheme]) & DRIVERS


EXTRAS = {"redis": "redis", "postgresql": "postgres", "amqp": "rabbitmq", "kafka": "kafka"}


@pytest.mark.parametrize("half", ["broker", "storage"])
@pytest.mark.parametrize("scheme", EXTRAS)
def test_missing_driver_is_one_line_that_names_the_extra(scheme: str, half: str) -> None:
    package, _, name = BACKENDS[scheme].partition(":")
    code = f"""
import asyncio, sys
for driver in {sorted(DRIVERS)!r}:
    sys.modules[driver] = None
from {package} import {name}
from qtasks_core.errors import MissingDriver
part = {name}().{half}(sys.argv[1])
try:
    asyncio.run(part.start("app"))
except MissingDriver as error:
    print(error)
"""
    said = python(code, URLS[scheme]).strip()
    assert said.count("\n") == 0
    assert said.endswith(f"pip install '.[{EXTRAS[scheme]}]' in the checkout")


def test_every_package_is_typed_and_part_of_the_wheel() -> None:
    packages = {path.parent.name for path in ROOT.glob("qtasks*/__init__.py")}
    assert packages == set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    for package in packages:
        assert (ROOT / package / "py.typed").exists(), package


def seconds(code: str) -> float:
    """Return the CPU time that a process takes for some code."""
    return float(python(f"{code}\nimport time\nprint(time.process_time())"))


def test_import_qtasks_costs_little() -> None:
    """At most 150 ms of CPU time over the bare interpreter.

    The least of many runs, taken in turns: load on the machine only ever adds. Repeated while the
    bar is missed, since load may last.
    """
    assert find_spec("qtasks") is not None
    bare = full = float("inf")
    for _ in range(20):
        for _ in range(3):
            bare, full = min(bare, seconds("pass")), min(full, seconds("import qtasks"))
        if full - bare <= 0.150:
            return
    raise AssertionError(f"import qtasks takes {full - bare:.3f} s over a bare {bare:.3f} s")
