from qtasks import AsyncRouter

router = AsyncRouter()


@router.task()
async def example_task(x: int, y: int) -> int:
    return x + y
