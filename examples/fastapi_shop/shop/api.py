from fastapi import FastAPI

from .tasks import example_task

app = FastAPI()


@app.get("/")
async def read_root():
    task = await example_task.add_task(1, 2, timeout=50)
    return {"result": task.returning}
