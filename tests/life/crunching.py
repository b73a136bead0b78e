"""Run by test_children.py as a script: a worker whose functions run in child processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from qtasks.asyncio import QueueTasks
from qtasks.executors import ProcessExecutor

app = QueueTasks("crunching", f"sqlite:///{os.environ['CRUNCHING']}/tasks.db?lease=2")


@app.task(executor=ProcessExecutor(2))
def crunch(file: str, seconds: float) -> int:
    print(f"crunching in {__name__}")
    Path(f"{file}.part").write_text(str(os.getpid()))
    Path(f"{file}.part").rename(file)
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        pass
    return os.getpid()


if __name__ == "__main__":
    app.run_forever()
