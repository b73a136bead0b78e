"""Reports: started here, fetched under `/tasks`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ..models import TaskStatus
from ..tasks.reports import yearly_report
from .tasks import status_of

router = APIRouter(prefix="/reports")


@router.post("/{year}", status_code=202)
async def report(year: int, request: Request, response: Response, seconds: float = 1) -> TaskStatus:
    task = await yearly_report.call(year, seconds).add_task()
    response.headers["Location"] = str(request.url_for("status", uuid=task.uuid))
    return status_of(task)
