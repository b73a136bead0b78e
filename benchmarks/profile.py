"""Where the time of a task goes: a sampling profile by thread, step and layer.

    python -m benchmarks.profile --backend memory|sqlite|redis|... [--tasks 60000]

One process enqueues no-op tasks with `map` and runs them. `py-spy` (`pip install py-spy`) samples
its threads 500 times a second. A sample belongs to the step whose engine function is on its stack,
and to the layer of its innermost known frame. Native code (msgspec, SQLite, a driver's parser)
counts for its caller. A sleeping thread is not counted. A thread that waits for a core or for the
GIL is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.served import BACKENDS, served
from benchmarks.tasks import nothing, router, work_off
from qtasks.asyncio import QueueTasks

NAME = "profile"
CONCURRENCY = 512
STEPS = {
    "enqueue: encode the call": ("AsyncTask.map", "QueueTasks.add_tasks"),
    "enqueue: submit a batch": ("Client._submit", "Client.submit_all"),
    "run: decode, call, encode": ("Runner._run", "Runner._start", "Runner._post"),
    "complete a batch": ("Completer._flush", "Completer.take_back"),
    "admit a batch": ("Consumer._admit",),
    "receive a batch": ("Consumer.receive",),
}
"""The engine's functions for each step, the innermost steps first."""
LAYERS = (
    ("waking loops, waiting to run", r"selectors\.py"),
    ("wire format, records", r"qtasks_core/"),
    (
        "arguments, results",
        r"qtasks/(codec/\w+|execution/definition|declare/\w+|app)\.py",
    ),
    ("crossing", r"qtasks/bridge/crossing\.py"),
    ("engine", r"qtasks/"),
    ("backend", r"qtasks_\w+/"),
    ("the benchmark", r"benchmarks/"),
    ("asyncio", r"asyncio/"),
    ("driver", r"redis/|asyncpg/|aiormq/|aio_pika/|aiokafka/|pamqp/"),
)

Samples = Mapping[str, Counter[str]]


def main() -> None:
    """Profile one backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--backend", default="memory", choices=BACKENDS)
    parser.add_argument("--tasks", type=int, default=60_000)
    parser.add_argument("--target", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        sys.setswitchinterval(0.0005)
        asyncio.run(live(options.target, options.tasks))
        return
    with served(options.backend) as url, TemporaryDirectory(prefix="qtasks-bench-") as directory:
        profile(options.backend, url, options.tasks, directory)


async def live(url: str, tasks: int) -> None:
    """The profiled process: enqueue all tasks, then run them."""
    app = QueueTasks(NAME, url)
    app.include_router(router)
    async with app:
        await nothing.map([()] * tasks)
        await work_off(app, tasks, CONCURRENCY)


def profile(backend: str, url: str, tasks: int, directory: str) -> None:
    """Run the profiled process under py-spy, and print the shares."""
    stacks = Path(directory, "stacks")
    target = [sys.executable, "-m", "benchmarks.profile", "--target", url, "--tasks", str(tasks)]
    spy = ["py-spy", "record", "--rate", "500", "--threads", "--format", "raw", "--output"]
    try:
        subprocess.run([*spy, str(stacks), "--", *target], check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit("py-spy is not installed: pip install py-spy") from None
    by: dict[str, Counter[str]] = {"thread": Counter(), "step": Counter(), "layer": Counter()}
    for line in stacks.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        step, layer = step_of(frames), layer_of(frames)
        if step == layer == "other":
            continue  # imports and the start of the interpreter
        by["thread"][re.sub(r"thread \(\d+\): |[-_]\d+$", "", thread)] += int(count)
        by["step"][step] += int(count)
        by["layer"][layer] += int(count)
    print_shares(backend, tasks, by)


def step_of(frames: list[str]) -> str:
    """Return the step that the innermost known function belongs to."""
    for frame in reversed(frames):
        for step, functions in STEPS.items():
            if frame.partition(" ")[0].removesuffix(".<locals>.<listcomp>") in functions:
                return step
    return "other"


def layer_of(frames: list[str]) -> str:
    """Return the layer of the innermost frame that belongs to one."""
    if frames and "._write_to_self " in frames[-1]:
        return LAYERS[0][0]
    for frame in reversed(frames):
        for layer, files in LAYERS:
            if re.search(rf"\((?:.*/)?(?:{files})", frame):
                return layer
    return "other"


def print_shares(backend: str, tasks: int, by: Samples) -> None:
    """Print shares of all samples, the largest first."""
    print(f"\n{backend}: {tasks} no-op tasks, enqueued and run in one process")
    for kind, counts in by.items():
        total = sum(counts.values())
        print(f"  by {kind}, {total} samples")
        for name, count in counts.most_common():
            print(f"    {name:32}{count / total:7.1%}")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    main()
