"""A variation of the example that shows who answered: both halves as modules of their own.

`python -m tests.e2e.shop` is the worker; `tests.e2e.shop_api:app` the API, which knows the router.
"""

from __future__ import annotations

import os

from qtasks import AsyncRouter
from qtasks.asyncio import QueueTasks

router = AsyncRouter()


@router.task(name="add_and_tell")
async def add_and_tell(x: int, y: int) -> dict[str, int]:
    return {"sum": x + y, "pid": os.getpid()}


@router.task(name="multiply_in_thread")
def multiply_in_thread(x: int, y: int) -> dict[str, int]:
    return {"sum": x * y, "pid": os.getpid()}


def main() -> None:
    app = QueueTasks()
    app.include_router(router)
    app.run_forever()


if __name__ == "__main__":
    main()
