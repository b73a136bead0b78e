"""The API: `uvicorn store.api:api`."""

from __future__ import annotations

from fastapi import FastAPI

from qtasks.integrations.fastapi import install_error_handlers, lifespan

from .queue import queue
from .routes import orders, reports, tasks

api = FastAPI(title="Store", lifespan=lifespan(queue))
install_error_handlers(api)
for module in (orders, reports, tasks):
    api.include_router(module.router)


@api.get("/health")
async def health() -> dict[str, str]:
    broker, storage = queue.guarantees()
    return {"broker": broker.part, "storage": storage.part}
