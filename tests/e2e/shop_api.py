"""The API half of the variation."""

from __future__ import annotations

import os

from fastapi import FastAPI, HTTPException

from qtasks import TaskTimeout
from tests.e2e.shop import add_and_tell, multiply_in_thread

app = FastAPI()


@app.get("/add")
async def add(x: int, y: int, timeout: float = 50) -> dict[str, int]:
    try:
        task = await add_and_tell.add_task(x, y, timeout=timeout)
    except TaskTimeout as error:
        raise HTTPException(504, str(error)) from error
    return {**task.returning, "api": os.getpid()}


@app.get("/multiply")
async def multiply(x: int, y: int) -> dict[str, int]:
    task = await multiply_in_thread.add_task(x, y, timeout=50)
    return {**task.returning, "api": os.getpid()}
