"""Compares the rates of QTasks and of other task queues on the same kind of server, in one run.

    python -m benchmarks.peers --backend redis|postgres|rabbitmq [--tasks 10000] [--only taskiq]

Each peer has a no-op task, one worker and a new server. With RabbitMQ, a Redis keeps the results.
Postgres runs ANALYZE before the worker starts, since a server in use would have statistics.
`enqueue`: by 100 concurrent callers, or by one if the client blocks. `bulk`: as many again, in the
peer's way for many tasks, if it has one. `process`: from the start of the first task until the
result of the last enqueued task is stored, with no other load on the server. `round trip`: enqueue
one task and wait for its result, in the peer's own way; the median.

Install `benchmarks/peers/requirements.txt` first. A peer that is not installed is left out, with a
note.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from benchmarks.peers import rabbitmq
from benchmarks.peers.peer import RESULTS, Peer
from benchmarks.peers.postgres import PgQueuer, Procrastinate
from benchmarks.peers.qtasks import QTasks
from benchmarks.peers.redis import Celery, Dramatiq, Saq, Streaq, Taskiq
from tests.services import SERVICES

PEERS: dict[str, tuple[type[Peer], ...]] = {
    "redis": (QTasks, Taskiq, Streaq, Saq, Dramatiq, Celery),
    "postgres": (QTasks, PgQueuer, Procrastinate),
    "rabbitmq": (rabbitmq.QTasks, rabbitmq.Taskiq, rabbitmq.Dramatiq, rabbitmq.Celery),
}
KEEPS_RESULTS = {"rabbitmq": "redis"}
"""The server with the results, if it is another one than the broker's."""
ROUND_TRIPS = 30
WORKER_LOG = "worker.log"
"""The file with the worker's output, in the client's temporary working directory."""


def main() -> None:
    """Measure the peers of one backend, each in new processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", default="redis", choices=PEERS)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--be", nargs=3, metavar=("ROLE", "PEER", "URL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be:
        role, name, url = options.be
        peer = next(p for p in PEERS[options.backend] if p.package == name)(url)
        peer.work() if role == "worker" else asyncio.run(measure(peer, options))
        return
    only = options.only.split(",") if options.only else None
    peers = [p for p in PEERS[options.backend] if only is None or p.package in only]
    print_rows(peers, options.backend, options.tasks)


def print_rows(peers: list[type[Peer]], backend: str, tasks: int) -> None:
    """Print a row for each peer, with the ratios to the first one."""
    print(f"\n{backend}: {tasks} no-op tasks, {os.cpu_count()} cores, {drivers(backend)}, one run")
    heads = f"{'enqueue':>12}{'bulk':>12}{'process':>12}{'round trip':>14}"
    print(f"  {'':22}{heads}  the first is … times better")
    first: dict[str, float] | None = None
    for peer in peers:
        try:
            label = f"{peer.package} {version(peer.package)}"
        except PackageNotFoundError:
            print(f"  {peer.package:22}is not installed")
            continue
        found = run_alone(peer, backend, tasks)
        if found is None:
            continue
        first = first or found
        rates = "enqueue", "bulk", "process"
        row = "".join(f"{found[rate]:10,.0f}/s" for rate in rates) + f"{found['trip']:11.1f} ms"
        ratios = [*(first[rate] / found[rate] for rate in rates), found["trip"] / first["trip"]]
        shown = "  ".join(f"{ratio:6.1f}" for ratio in ratios)
        print(f"  {label:22}{row}  {shown}  {peer.notes}", flush=True)


def drivers(backend: str) -> str:
    """Return the versions of the drivers that the peers share."""
    names = {
        "redis": ("redis", "hiredis"),
        "postgres": ("asyncpg", "psycopg"),
        "rabbitmq": ("aiormq", "pika", "amqp", "redis"),
    }[backend]
    installed = {dist.metadata["name"]: dist.version for dist in distributions()}
    return ", ".join(f"{name} {installed.get(name, '-')}" for name in names)


def run_alone(peer: type[Peer], backend: str, tasks: int) -> dict[str, float] | None:
    """Start a server, measure one peer in a new process, and stop the server.

    If the peer fails, print the output of its worker and return None.
    """
    with ExitStack() as stack:
        url = started(backend, stack)
        results = KEEPS_RESULTS.get(backend)
        own = {RESULTS: started(results, stack)} if results else {}
        with tempfile.TemporaryDirectory(prefix="qtasks-bench-") as directory:
            environment = {**os.environ, **own, "PEERS_BEGAN": f"{directory}/began"}
            client = subprocess.run(
                [*command(backend, "client", peer.package, url), "--tasks", str(tasks)],
                env=environment,
                check=False,
                stdout=subprocess.PIPE,
                cwd=directory,
            )
            if client.returncode:
                print(f"  {peer.package} failed; the output of its worker:", flush=True)
                print(Path(directory, WORKER_LOG).read_text(), file=sys.stderr)
                return None
        found: dict[str, float] = json.loads(client.stdout.splitlines()[-1])
        return found


def started(backend: str, stack: ExitStack) -> str:
    """Start a server until the end of `stack`, and return its URL."""
    service = SERVICES[backend]()
    url = service.start()
    stack.callback(service.stop)
    return url


def command(backend: str, *role: str) -> list[str]:
    """Return the command that starts a client or a worker."""
    return [sys.executable, "-m", "benchmarks.peers", "--backend", backend, "--be", *role]


async def measure(peer: Peer, options: argparse.Namespace) -> None:
    """Run the client: enqueue, start a worker, wait for the last result, print the rates."""
    await peer.start()
    begin = time.perf_counter()
    await peer.enqueue(options.tasks)
    took = time.perf_counter() - begin
    begin = time.perf_counter()
    await peer.bulk(options.tasks)
    bulk = time.perf_counter() - begin
    if options.backend == "postgres":
        await analyze(peer.url)
    with open(WORKER_LOG, "w") as log:  # noqa: ASYNC230
        worker = subprocess.Popen(  # noqa: ASYNC220  # measured, not awaited
            command(options.backend, "worker", peer.package, peer.url), stdout=log, stderr=log
        )
    try:
        await peer.last()
        finished = time.time()
        began = float(Path(os.environ["PEERS_BEGAN"]).read_text())  # noqa: ASYNC240
        trips = [await round_trip(peer) for _ in range(ROUND_TRIPS)]
    finally:
        worker.terminate()
        worker.wait(30)
    await peer.stop()
    found = {"enqueue": options.tasks / took, "bulk": options.tasks / bulk}
    found["process"] = 2 * options.tasks / (finished - began)
    print(json.dumps({**found, "trip": statistics.median(trips) * 1000}))


async def analyze(url: str) -> None:
    """Update the statistics of the server: without them it plans for empty tables."""
    import asyncpg

    connection = await asyncpg.connect(url)
    await connection.execute("ANALYZE")
    await connection.close()


async def round_trip(peer: Peer) -> float:
    """Return the seconds from enqueuing one task to its result."""
    begin = time.perf_counter()
    await peer.enqueue(1)
    await peer.last()
    return time.perf_counter() - begin


if __name__ == "__main__":
    # The processes must find this package wherever the command is run.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    main()
