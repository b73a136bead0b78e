"""The demo: starts a worker and an API on one SQLite file, sends requests, and stops both.

`python -m examples.demo` uses a temporary directory and leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

SHOP = Path(__file__).parent / "fastapi_shop"
REQUESTS = 200

say = partial(print, flush=True)
"""Print at once, so that the lines stay in order with the output of the other processes."""


def main() -> int:
    """Run the demo; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="qtasks-demo-") as directory:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QTASKS_")}
        environment["XDG_DATA_HOME"] = directory
        port = free_port()
        say("starting a worker:  python -m shop.qtasks_app")
        worker = start([sys.executable, "-m", "shop.qtasks_app"], environment)
        say(f"starting the API:   uvicorn shop.api:app --port {port}")
        uvicorn = [sys.executable, "-m", "uvicorn", "shop.api:app", "--port", str(port)]
        api = start([*uvicorn, "--log-level", "warning"], environment)
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_until_answers(url, [worker, api])
            ask(url)
        finally:
            for name, process in (("API", api), ("worker", worker)):
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=40)
                say(f"stopped the {name}")
    return 0


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in the folder of the example."""
    return subprocess.Popen(command, cwd=SHOP, env=environment)


def ask(url: str) -> None:
    """Send requests; print the first answers and the times of the round trips."""
    took: list[float] = []
    for number in range(REQUESTS):
        begin = time.perf_counter()
        with urllib.request.urlopen(url, timeout=60) as response:
            answer = response.read().decode()
        took.append((time.perf_counter() - begin) * 1000)
        if number < 3:
            say(f"GET {url} -> {answer}  ({took[-1]:.1f} ms)")
    took.sort()
    say(
        f"{REQUESTS} requests, each a task run by the worker process: "
        f"median {statistics.median(took):.1f} ms, p99 {took[int(REQUESTS * 0.99) - 1]:.1f} ms"
    )


def wait_until_answers(url: str, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the API answers a request. That needs the worker too."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in processes:
            if process.poll() is not None:
                raise SystemExit(f"{process.args!r} ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise SystemExit("the API did not answer within 60 s")


def free_port() -> int:
    """Return a TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    raise SystemExit(main())
