"""The store's app, with all its tasks. The worker runs them, the API enqueues them."""

from __future__ import annotations

from qtasks.asyncio import QueueTasks

from .settings import settings
from .tasks import orders, reports

queue = QueueTasks(settings.name, settings.broker_url, settings.storage_url)
queue.include_router(orders.router)
queue.include_router(reports.router)
