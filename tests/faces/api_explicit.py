"""The same API with an app of its own."""

from __future__ import annotations

from qtasks.asyncio import QueueTasks
from qtasks.integrations.fastapi import lifespan
from tests.faces.api_default import api
from tests.faces.sums import blocking, router

app = QueueTasks()
app.include_router(router)
app.include_router(blocking)
api.router.lifespan_context = lifespan(app)
