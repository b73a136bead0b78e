"""What becomes of tasks while workers are killed, and servers are killed and frozen.

    python -m benchmarks.chaos --broker kafka --storage postgres --tasks 100000 \
        --kill-worker 3 --kill-server 12 --freeze-storage 20 --seed 7

Each fault has a mean period in seconds, and 0 leaves it out. The seed decides which faults come,
when, and for how long, so a run can be repeated; only the machine's own timing differs. A killed
worker is started anew, as a supervisor does. Clients repeat an enqueue that raised `Unavailable`,
as users should. Faults come until the last task has been enqueued.

It prints one line of JSON. `lost`: tasks without a final record. `recorded_twice`: tasks of which
the storage accepted the results of two runs. `ran_twice`: tasks whose function was entered more
than once, which at-least-once delivery allows. `drained_s`: seconds from the last enqueue, with all
servers back, to the last result. The exit status is 1 if a task is lost, recorded twice or failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from qtasks.asyncio import QueueTasks
from qtasks.declare.tasks import message_of
from qtasks_core import TaskMessage
from qtasks_core.errors import Unavailable
from tests.e2e.crash import Log, Setting
from tests.pairs import LEASES, Pair, with_lease
from tests.processes import Process
from tests.services import SERVICES, Service

PAIRS = (
    "redis+redis",
    "postgres+postgres",
    "rabbitmq+rabbitmq",
    "kafka+kafka",
    "kafka+postgres",
    "rabbitmq+redis",
    "redis+postgres",
    "postgres+redis",
)
BACKENDS = ("sqlite", *SERVICES)
BATCH = 100
AHEAD = 10
"""Batches that are enqueued and not finished yet, at most."""
WORKERS = 2
PATIENCE = 600.0
"""Seconds after the last enqueue within which all tasks must have finished."""


class Fault(NamedTuple):
    """Something that happens `at` seconds after the start, and lasts for `seconds`."""

    at: float
    kind: str
    seconds: float


def faults(seed: int, periods: dict[str, float]) -> Iterator[Fault]:
    """Yield the faults of a seed, in the order of their times, without end.

    A period of 0 leaves a kind out. A worker is back at once, a killed server after up to 3 s, a
    frozen one after 1 to 10 s.
    """
    kinds = {kind: random.Random(f"{seed} {kind}") for kind, period in periods.items() if period}
    longest = {"kill-worker": (0.0, 0.0), "kill-server": (0.0, 3.0), "freeze-storage": (1.0, 10.0)}

    def after(at: float, kind: str) -> Fault:
        dice = kinds[kind]
        at += periods[kind] * dice.uniform(0.5, 1.5)
        return Fault(at, kind, dice.uniform(*longest[kind]))

    coming = [after(0.0, kind) for kind in kinds]
    while coming:
        fault = min(coming)
        coming[coming.index(fault)] = after(fault.at + fault.seconds, fault.kind)
        yield fault


class Crew:
    """Worker processes that are started anew whenever they end."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._alive: dict[int, Process] = {}
        self._stopping = False

    async def keep(self, place: int) -> None:
        """Run one worker after the other in this place, until `stop`."""
        while not self._stopping:
            with self._setting.worker() as worker:
                self._alive[place] = worker
                await asyncio.to_thread(worker.wait, float("inf"))

    def kill(self, dice: random.Random) -> None:
        """Kill one of the workers with SIGKILL."""
        self._alive[dice.choice(sorted(self._alive))].kill()

    def stop(self) -> None:
        """End all workers, and start none any more."""
        self._stopping = True
        for worker in self._alive.values():
            worker.kill()


class Chaos:
    """One run: clients and workers on a pair of parts, and the faults that happen to them."""

    def __init__(
        self, setting: Setting, servers: dict[str, Service | None], options: argparse.Namespace
    ) -> None:
        self._setting = setting
        self._servers = servers
        self._options = options
        self._crew = Crew(setting)
        self._calm = asyncio.Event()
        self._quiet = asyncio.Lock()
        """Held while a fault lasts, so a server that is frozen is not killed."""
        self.happened: Counter[str] = Counter()
        self.refused = 0
        self.statuses: Counter[str] = Counter()
        self.enqueued: set[int] = set()
        self.drained = 0.0

    async def run(self) -> None:
        """Enqueue all tasks and wait for their results while faults happen."""
        async with self._setting.app() as app, asyncio.TaskGroup() as group:
            for place in range(WORKERS):
                group.create_task(self._crew.keep(place))
            try:
                disturbing = group.create_task(self._disturb())
                await self._work(app, disturbing)
            finally:
                self._crew.stop()

    async def _work(self, app: QueueTasks, disturbing: asyncio.Task[None]) -> None:
        room = asyncio.Semaphore(AHEAD)
        waiting: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            for first in range(0, self._options.tasks, BATCH):
                await room.acquire()
                numbers = range(first, min(first + BATCH, self._options.tasks))
                uuids = await self._enqueue(app, numbers)
                task = group.create_task(self._results(app, uuids))
                task.add_done_callback(lambda _: room.release())
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            self._calm.set()
            await disturbing
            began = time.monotonic()
            if waiting:
                _, late = await asyncio.wait(waiting, timeout=PATIENCE)
                for task in late:
                    task.cancel()
            self.drained = time.monotonic() - began

    async def _enqueue(self, app: QueueTasks, numbers: Sequence[int]) -> list[str]:
        """Enqueue tasks, however often that is refused. Return their uuids."""
        definition = app.definition("work")
        messages: list[TaskMessage] = [
            message_of(app, definition, (n, self._options.seconds), {}) for n in numbers
        ]
        while True:
            try:
                await app.submit_all(messages)
                break
            except Unavailable:
                self.refused += 1
        self.enqueued.update(numbers)
        return [message.uuid for message in messages]

    async def _results(self, app: QueueTasks, uuids: Sequence[str]) -> None:
        async with asyncio.TaskGroup() as group:
            for uuid in uuids:
                group.create_task(self._result(app, uuid))

    async def _result(self, app: QueueTasks, uuid: str) -> None:
        record = await app.wait(uuid, None)
        self.statuses[record.status] += 1

    async def _disturb(self) -> None:
        """Let faults happen until all tasks are enqueued. Afterwards all servers are back."""
        periods = {
            "kill-worker": self._options.kill_worker,
            "kill-server": self._options.kill_server,
            "freeze-storage": self._options.freeze_storage,
        }
        dice = random.Random(f"{self._options.seed} victims")
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in faults(self._options.seed, periods):
                try:
                    async with asyncio.timeout_at(
                        asyncio.get_running_loop().time() + began + fault.at - time.monotonic()
                    ):
                        await self._calm.wait()
                        break
                except TimeoutError:
                    pass
                self.happened[fault.kind] += 1
                if fault.kind == "kill-worker":
                    self._crew.kill(dice)
                else:
                    group.create_task(self._away(fault))

    async def _away(self, fault: Fault) -> None:
        """Let a server be away for a while."""
        half = "broker" if fault.kind == "kill-server" else "storage"
        server = self._servers[half]
        assert server is not None, "the options were checked"
        async with self._quiet:
            frozen = fault.kind == "freeze-storage"
            await asyncio.to_thread(server.freeze if frozen else server.kill)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                await asyncio.to_thread(server.thaw if frozen else server.restart)


def report(chaos: Chaos, log: Log, options: argparse.Namespace, took: float) -> dict[str, object]:
    """Return the line of results."""
    begun = Counter(log.numbers("begin"))
    accepted = log.accepted()
    finished = sum(chaos.statuses.values())
    return {
        "broker": options.broker,
        "storage": options.storage,
        "tasks": options.tasks,
        "seed": options.seed,
        "faults": dict(sorted(chaos.happened.items())),
        "refused": chaos.refused,
        "lost": options.tasks - finished,
        "failed": finished - chaos.statuses["success"],
        "recorded_twice": sum(len(runs) > 1 for runs in accepted.values()),
        "never_ran": len(chaos.enqueued - begun.keys()),
        "ran_twice": sum(times > 1 for times in begun.values()),
        "drained_s": round(chaos.drained, 1),
        "took_s": round(took, 1),
    }


def run(options: argparse.Namespace) -> dict[str, object]:
    """Start the servers, let the chaos happen, and return the line of results."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qtasks-chaos-")))
        urls: dict[str, str] = {}
        services: dict[str, Service] = {}
        for backend in {options.broker, options.storage}:
            if backend == "sqlite":
                urls[backend] = f"sqlite:///{directory}/chaos.db"
            else:
                services[backend] = SERVICES[backend]()
                stack.callback(services[backend].stop)
                urls[backend] = services[backend].start()
        lease = options.lease or LEASES[options.broker]
        pair = Pair(with_lease(urls[options.broker], lease), urls[options.storage], lease)
        setting = Setting(pair, directory)
        servers = {half: services.get(getattr(options, half)) for half in ("broker", "storage")}
        chaos = Chaos(setting, servers, options)
        began = time.monotonic()
        asyncio.run(chaos.run())
        return report(chaos, setting.log, options, time.monotonic() - began)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--broker", choices=BACKENDS, default="redis")
    parser.add_argument("--storage", choices=BACKENDS, help="default: the broker's backend")
    parser.add_argument("--all", action="store_true", help=f"one run each of {', '.join(PAIRS)}")
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=0.001, help="how long each task takes")
    parser.add_argument("--lease", type=float, default=0.0, help="of the broker; default 4 or 6 s")
    for fault, period in (("kill-worker", 3.0), ("kill-server", 12.0), ("freeze-storage", 20.0)):
        parser.add_argument(
            f"--{fault}",
            type=float,
            default=period,
            metavar="SECONDS",
            help="mean period; 0: never",
        )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    options.storage = options.storage or options.broker
    for half, fault in (("broker", "kill-server"), ("storage", "freeze-storage")):
        backend = getattr(options, half)
        if backend == "sqlite" and getattr(options, fault.replace("-", "_")):
            parser.error(f"{backend} has no server: give --{fault} 0")
    return options


def main() -> None:
    """Run one pair, or all."""
    options = options_of()
    # Each outage is a few lines of log in each process: the line of results says what counts.
    logging.getLogger("qtasks").setLevel(logging.ERROR)
    pairs = PAIRS if options.all else [f"{options.broker}+{options.storage}"]
    bad = False
    for pair in pairs:
        options.broker, options.storage = pair.split("+")
        result = run(options)
        print(json.dumps(result), flush=True)
        bad |= any(result[what] for what in ("lost", "failed", "recorded_twice", "never_ran"))
    sys.exit(bad)


if __name__ == "__main__":
    main()
