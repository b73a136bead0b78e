"""Reports take long. The task is a plain function, so it runs in a thread of the worker."""

from __future__ import annotations

import time

from qtasks import AsyncRouter

from ..models import Report

router = AsyncRouter()


@router.task(queue="reports", retention=24 * 3600)
def yearly_report(year: int, seconds: float = 1.0) -> Report:
    if year < 2000:
        raise ValueError(f"there are no books for {year}")
    time.sleep(seconds)  # instead of reading the books
    return Report(year=year, sold=42)
