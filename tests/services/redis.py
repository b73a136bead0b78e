"""Redis for the tests, with an append-only file."""

from __future__ import annotations

from tests.services.install import need_program
from tests.services.native import PASSWORD, Native, free_port
from tests.services.service import NotReady, Service, Way


class NativeRedis(Native):
    """Debian's redis-server.

    `appendfsync no`: a write reaches the kernel before it is answered, so what was answered
    survives `kill -9`, though not a failing machine. With `everysec` it does not always: while a
    sync is under way, which on a busy disk takes seconds, answers go out before the write.
    """

    def find(self) -> None:
        self._program = need_program("redis-server", "redis-server")

    def prepare(self) -> str:
        self.port = free_port()
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "requirepass": PASSWORD,
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
        }
        return [self._program, *(part for k, v in options.items() for part in (f"--{k}", v))]


class RedisServer(Service):
    name = "redis"

    def native(self) -> Way:
        return NativeRedis()

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
