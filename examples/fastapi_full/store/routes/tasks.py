"""The status and the result of any task, by its uuid."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, HTTPException, Query

from qtasks import Task

from ..models import TaskStatus
from ..queue import queue

router = APIRouter(prefix="/tasks")


def status_of(task: Task[Any]) -> TaskStatus:
    return TaskStatus(
        uuid=task.uuid,
        task_name=task.task_name,
        status=task.status,
        attempt=task.attempt,
        error=task.error,
    )


async def find(uuid: UUID) -> Task[Any]:
    task = await queue.get_task(uuid)
    if task is None:
        raise HTTPException(404, f"there is no task {uuid}")
    return task


@router.get("/{uuid}")
async def status(uuid: UUID) -> TaskStatus:
    return status_of(await find(uuid))


@router.get("/{uuid}/result", response_model=None)
async def result(uuid: UUID, wait: Annotated[float, Query(ge=0, le=60)] = 0) -> Any:
    task = await find(uuid)
    return (await task.wait_result(wait)).returning
