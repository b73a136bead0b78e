"""The integration tests with every server in a container: `make test-containers`.

It uses the Docker engine that answers, else installs and starts one of its own, and stops that at
the end. The images are those of the recipes, or stand-ins where no registry can be reached
(tests/services/stand_ins). `--short` only checks that containers start, survive a kill and go on
after a freeze, and fetches, installs and builds nothing: where that cannot be done it says so.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import docker.errors
import requests

from qtasks.testing.recipes import RECIPES
from tests.services import SERVICES, NotReady, Unobtainable, stand_ins
from tests.services.container import LABEL
from tests.services.engine import Answering, Engine, connect
from tests.services.install import locate, one_at_a_time

NOT_RUN = 77
"""An exit status that no test run has."""
INTERRUPTED_WITHIN = 60.0  # seconds
ROOT = Path(__file__).parent.parent
SHORT = ("tests/services_test/test_servers.py", "-m", "not native")
ALL = (
    *SHORT[:1],
    "tests/e2e/test_compose.py",
    "tests/e2e/test_example.py",
    *(f"tests/conformance/test_{name}.py" for name in SERVICES),
    "tests/conformance/test_pairs.py",
    "tests/faults",
    *(f"tests/{name}" for name in SERVICES),
)


def main() -> int:
    """Run the tests; return pytest's status, or NOT_RUN if `--short` has no engine or no image."""
    parser = argparse.ArgumentParser(prog="python -m tests.containers", description=__doc__)
    parser.add_argument("--short", action="store_true", help="half a minute of it")
    arguments, options = parser.parse_known_args()
    try:
        if arguments.short:
            need_nothing()
        with one_at_a_time("containers", wait=not arguments.short), running() as (host, engine):
            images = Images(engine, stored_only=arguments.short)
            tags = {name: images.obtain(name) for name in SERVICES}
            chosen = SHORT if arguments.short else ALL
            return run(host, engine, tags, [*options, *chosen])
    except (Unobtainable, NotReady) as error:
        print(f"no tests in containers: {error}", file=sys.stderr)
        return NOT_RUN if arguments.short else 1


def need_nothing() -> None:
    """Raise `Unobtainable` if an engine would have to be installed."""
    try:
        Answering(Engine().variable).start()
    except Unobtainable:
        if os.geteuid() != 0 or not locate("dockerd"):
            raise Unobtainable(
                "no Docker engine answers; start one, or let `make test-containers` install one"
            ) from None


@contextmanager
def running() -> Iterator[tuple[str, Any]]:
    """Give the address of an engine and a client; one that was started here is stopped."""
    service = Engine()
    host = service.start()
    try:
        print(f"engine: {service.how}, Docker {service.version}", flush=True)
        client = connect(host)
        try:
            yield host, client
        finally:
            client.close()
    finally:
        service.stop()


class Images:
    """The images of the servers: the official ones, or stand-ins for what cannot be pulled."""

    def __init__(self, engine: Any, *, stored_only: bool) -> None:
        self._engine = engine
        self._stored_only = stored_only
        wanted = os.environ.get("QTASKS_TEST_STAND_INS")
        # Why no registry is asked, or not again: to wait for one that does not answer takes long.
        self._no_registry = "QTASKS_TEST_STAND_INS is set" if wanted else ""

    def obtain(self, name: str) -> str:
        """Return the image of a server once the engine has it. Raises `Unobtainable`."""
        official, standing_in = RECIPES[name].chosen_image, stand_ins.tag(name)
        if stand_ins.stored(self._engine, official):
            print(f"image: {official}", flush=True)
            return official
        if self._stored_only:
            if not stand_ins.stored(self._engine, standing_in):
                raise Unobtainable(f"no image of {name} is stored; `make test-containers` gets one")
            print(f"image: {standing_in}", flush=True)
            return standing_in
        reason = self._no_registry or self._pull(official)
        if not reason:
            print(f"image: {official}, pulled", flush=True)
            return official
        print(f"image: {standing_in}, as {official} is not pulled: {reason}", flush=True)
        return stand_ins.build(self._engine, name)

    def _pull(self, official: str) -> str:
        """Pull an image; return "", or the reason why that cannot be done."""
        try:
            self._engine.images.pull(official)
        except docker.errors.NotFound as error:
            return str(error.explanation)
        except (docker.errors.APIError, requests.RequestException) as error:
            self._no_registry = str(getattr(error, "explanation", None) or error)
            return self._no_registry
        return ""


def run(host: str, engine: Any, images: Mapping[str, str], options: list[str]) -> int:
    """Run pytest with all servers in containers, and remove what containers it has left."""
    name = uuid.uuid4().hex
    environment = {
        **{key: value for key, value in os.environ.items() if not is_url_of_a_server(key)},
        **{f"QTASKS_IMAGE_{server.upper()}": tag for server, tag in images.items()},
        "DOCKER_HOST": host,
        "QTASKS_TEST_CONTAINERS": name,
        # Containers are reached by the ports that they publish, also from within a container.
        "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
        "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
        "TC_POOLING_INTERVAL": "0.1",  # seconds
        "TC_MAX_TRIES": "1200",
        # It is one more image to get, and what it removes is removed below.
        "TESTCONTAINERS_RYUK_DISABLED": "true",
    }
    try:
        command = [sys.executable, "-m", "pytest", *options]
        with subprocess.Popen(command, cwd=ROOT, env=environment) as tests:
            try:
                return tests.wait()
            except BaseException:
                tests.send_signal(signal.SIGINT)  # so that it ends what it has started
                tests.wait(timeout=INTERRUPTED_WITHIN)
                raise
            finally:
                tests.kill()
    finally:
        for container in engine.containers.list(all=True, filters={"label": f"{LABEL}={name}"}):
            remove(container)


def remove(container: Any) -> None:
    """Remove a container that a test process may be removing too."""
    try:
        container.remove(force=True, v=True)
    except docker.errors.APIError as error:
        if error.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
            raise


def is_url_of_a_server(variable: str) -> bool:
    """Tell whether a variable names a server that somebody else runs."""
    return variable in {service().variable for service in SERVICES.values()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of each `finally`
    sys.exit(main())
