"""How long a log storage takes to start: from nothing, and from what it kept in its directory.

    python -m benchmarks.log_start --backend kafka [--tasks 200000]

Saves a `new` and a `success` record of each task. Then each row is a process of its own: the bare
driver reads the whole log; a storage without a directory starts and gets one record, and so does
one that kept what it read before. Memory is what the process has at its end, above a storage on an
empty log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from benchmarks.served import served
from qtasks_core import Task
from qtasks_core.errors import Unavailable
from qtasks_core.lookup import resolve_storage

if TYPE_CHECKING:
    from qtasks_core import Storage

T = TypeVar("T")

BATCH = 1000
NAME = "log-start"


def uuid_of(number: int) -> str:
    """Return the uuid of a task. They rise, as those of real tasks do."""
    return f"{number:012x}-0000-7000-8000-{number:012x}"


def record(number: int, status: Any) -> Task:
    """Return a record of the usual size: arguments of 50 bytes, a small result."""
    final = status == "success"
    return Task(
        uuid=uuid_of(number), task_name="benchmarks.tasks:nothing", status=status, args=b"x" * 50,
        created_at=time.time(), execution="e" * 32 if final else "", reply_to="r" * 36,
        returning=b"\xc0" if final else None, finished_at=time.time() if final else None,
        worker="host:12345" if final else None,
    )  # fmt: skip


async def fill(url: str, namespace: str, tasks: int) -> None:
    """Save two records of each task, some batches at a time."""
    storage = resolve_storage(url)
    await storage.start(namespace)
    try:
        for at in range(0, tasks, BATCH):
            numbers = range(at, min(at + BATCH, tasks))
            for status in ("new", "success"):
                records = [record(number, status) for number in numbers]
                await answered(partial(storage.save, records))
    finally:
        await storage.stop()


async def answered(call: Callable[[], Awaitable[T]]) -> T:
    """Call until the server answers: a busy machine may take too long for it."""
    while True:
        try:
            return await call()
        except Unavailable as error:
            print(error, file=sys.stderr)


async def start(url: str, namespace: str, tasks: int) -> dict[str, float]:
    """Start a storage, get one record, and list a page."""
    storage: Storage = resolve_storage(url)
    began = time.perf_counter()
    await storage.start(namespace)
    found = await answered(partial(storage.get, [uuid_of(tasks // 2)])) if tasks else []
    took = time.perf_counter() - began
    assert None not in found
    row = {"first get": took, "cpu": time.process_time(), "memory": memory()}
    await storage.stop()
    return row


async def bare_kafka(url: str, namespace: str, tasks: int) -> dict[str, float]:
    """Read the whole topic by aiokafka."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    from qtasks_kafka.connection import topic_name

    topic = topic_name(namespace, "records")
    consumer = AIOKafkaConsumer(bootstrap_servers=url.partition("://")[2].partition("?")[0])
    began = time.perf_counter()
    await consumer.start()
    try:
        places = [TopicPartition(topic, number) for number in range(8)]
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        ends = await consumer.end_offsets(places)
        while any([await consumer.position(place) < end for place, end in ends.items()]):
            await consumer.getmany(timeout_ms=1000)
    finally:
        await consumer.stop()
    took = time.perf_counter() - began
    return {"first get": took, "cpu": time.process_time(), "memory": memory()}


async def bare_rabbitmq(url: str, namespace: str, tasks: int) -> dict[str, float]:
    """Read the stream by aiormq until both records of all tasks have come."""
    import aiormq

    from qtasks_rabbitmq.topology import Names

    began = time.perf_counter()
    connection = await aiormq.connect(url.partition("?")[0])
    channel = await connection.channel()
    await channel.basic_qos(prefetch_count=2000)
    done = asyncio.Event()
    count = 0

    async def arrived(message: Any) -> None:
        nonlocal count
        count += 1
        if count % 1000 == 0:
            await channel.basic_ack(message.delivery_tag, multiple=True)
        if count >= 2 * tasks:
            done.set()

    await channel.basic_consume(
        Names(namespace).log, arrived, arguments={"x-stream-offset": "first"}
    )
    await done.wait()
    took = time.perf_counter() - began
    row = {"first get": took, "cpu": time.process_time(), "memory": memory()}
    await connection.close()
    return row


def memory() -> float:
    """Return the resident memory of this process in MiB, at its highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


CHILDREN: dict[str, Callable[[str, str, int], Awaitable[Any]]] = {
    "fill": fill, "start": start, "kafka": bare_kafka, "rabbitmq": bare_rabbitmq,
}  # fmt: skip


def child(what: str, url: str, namespace: str, tasks: int) -> Any:
    """Run one measurement in a process of its own, and return what it printed."""
    command = [sys.executable, "-m", "benchmarks.log_start", "--child", what]
    command += ["--url", url, "--namespace", namespace, "--tasks", str(tasks)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout or "null")


def measure(backend: str, tasks: int) -> None:
    """Measure on a new server, and print the rows."""
    namespace = f"{NAME}-{uuid4().hex[:8]}"
    with served(backend) as url, tempfile.TemporaryDirectory() as directory:
        kept = f"{url}{'&' if '?' in url else '?'}directory={directory}"
        child("fill", url, namespace, tasks)
        empty = child("start", url, f"{namespace}-empty", 0)["memory"]
        print(f"\n{backend}: {tasks:,} tasks, two records each")
        bare = 0.0
        for name, what, at in (
            ("bare read", backend, url),
            ("from nothing", "start", url),
            ("keeps what it reads", "start", kept),
            ("from what was kept", "start", kept),
        ):
            row = child(what, at, namespace, tasks)
            took, more = row["first get"], row["memory"] - empty
            bare = bare or took
            print(
                f"  {name:20} {took:7.2f} s   {took / bare:5.2f} x bare"
                f"   {row['cpu']:6.2f} s of CPU   {more:+7.1f} MiB",
                flush=True,
            )


def main() -> None:
    """Measure a backend, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", choices=["kafka", "rabbitmq"], default="kafka")
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--namespace", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work = CHILDREN[options.child](options.url, options.namespace, options.tasks)
        print(json.dumps(asyncio.run(_of(work))))
    else:
        measure(options.backend, options.tasks)


async def _of(work: Awaitable[Any]) -> Any:
    return await work


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    main()
