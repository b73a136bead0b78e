"""Redis for the tests, with an append-only file."""

from __future__ import annotations

from qtasks.testing.errors import NotReady
from qtasks.testing.recipes import RECIPES
from tests.services.container import Contained
from tests.services.native import ByRecipe
from tests.services.service import Service, Way


class NativeRedis(ByRecipe):
    """Debian's redis-server."""

    recipe = RECIPES["redis"]


class RedisServer(Service):
    name = "redis"

    def native(self) -> Way:
        return NativeRedis()

    def container(self) -> Way:
        return Contained(RECIPES[self.name])

    async def probe(self, url: str) -> str:
        import redis.asyncio
        import redis.exceptions

        client = redis.asyncio.Redis.from_url(url, socket_timeout=2, retry=None)
        try:
            await client.ping()  # refused while it loads its file; `info` is not
            answer = await client.info("server")
        except (OSError, redis.exceptions.RedisError) as error:
            raise NotReady(str(error)) from error
        finally:
            await client.aclose()
        return str(answer["redis_version"])
