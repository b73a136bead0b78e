from fastapi import FastAPI

from qtasks.integrations.fastapi import install_error_handlers, lifespan

from .tasks import example_task

app = FastAPI(lifespan=lifespan())
install_error_handlers(app)


@app.get("/")
async def read_root():
    task = await example_task.add_task(1, 2, timeout=10)
    return {"result": task.returning}
